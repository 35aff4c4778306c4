"""Evaluation and measurement inside training."""

from clipkit.callbacks.pictures import EvaluationPictures
from clipkit.callbacks.probes import LinearProbe, NearestNeighbours
from clipkit.callbacks.throughput import Throughput
from clipkit.callbacks.zero_shot import ZeroShotClassification, ZeroShotRetrieval

__all__ = [
    "EvaluationPictures",
    "LinearProbe",
    "NearestNeighbours",
    "Throughput",
    "ZeroShotClassification",
    "ZeroShotRetrieval",
]
