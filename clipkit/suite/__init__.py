"""Evaluation data sets, and embedding one once per weights."""

from clipkit.suite.encoding import embed_data
from clipkit.suite.eval_data import Classes, EvalData, open_classes

__all__ = ["Classes", "EvalData", "embed_data", "open_classes"]
