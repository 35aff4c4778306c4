"""Evaluation and measurement inside training."""

from clipkit.callbacks.last_checkpoint import LastCheckpoint
from clipkit.callbacks.pictures import EvaluationPictures
from clipkit.callbacks.probes import LinearProbe, NearestNeighbours
from clipkit.callbacks.throughput import Throughput
from clipkit.callbacks.zero_shot import ZeroShotClassification, ZeroShotRetrieval

__all__ = [
    "EvaluationPictures",
    "LastCheckpoint",
    "LinearProbe",
    "NearestNeighbours",
    "Throughput",
    "ZeroShotClassification",
    "ZeroShotRetrieval",
]
