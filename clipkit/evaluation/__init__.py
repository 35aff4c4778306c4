"""Embeddings to numbers with error bars: the one definition of each number in the kit."""

from clipkit.evaluation.classification import (
    ClassificationOutcomes,
    MultilabelOutcomes,
    build_classifier,
    classification_intervals,
    classification_metrics,
    classify,
    classify_multilabel,
    multilabel_metrics,
)
from clipkit.evaluation.prompts import (
    TEMPLATES,
    Prompts,
    class_name_warnings,
    collect,
    expand,
    fill,
    readable,
    resolve_templates,
)
from clipkit.evaluation.retrieval import (
    BatchAccuracy,
    QueryOutcomes,
    RetrievalOutcomes,
    batch_accuracy,
    retrieval_intervals,
    retrieval_metrics,
    retrieve,
)
from clipkit.evaluation.statistics import (
    Interval,
    class_mean_interval,
    interval,
    mean_interval,
    median_interval,
    wilson,
)
from clipkit.evaluation.ties import TIE_TOLERANCE

__all__ = [
    "TEMPLATES",
    "TIE_TOLERANCE",
    "BatchAccuracy",
    "ClassificationOutcomes",
    "Interval",
    "MultilabelOutcomes",
    "Prompts",
    "QueryOutcomes",
    "RetrievalOutcomes",
    "batch_accuracy",
    "build_classifier",
    "class_mean_interval",
    "class_name_warnings",
    "classification_intervals",
    "classification_metrics",
    "classify",
    "classify_multilabel",
    "collect",
    "expand",
    "fill",
    "interval",
    "mean_interval",
    "median_interval",
    "multilabel_metrics",
    "readable",
    "resolve_templates",
    "retrieval_intervals",
    "retrieval_metrics",
    "retrieve",
    "wilson",
]
