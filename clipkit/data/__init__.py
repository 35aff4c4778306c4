"""Rows to batches: where pairs come from, and how they become tensors."""

from clipkit.data.huggingface import HuggingFacePairs
from clipkit.data.images import Augmentation
from clipkit.data.pairs import PairBatch, PairDataModule
from clipkit.data.shapes import ShapesPairs
from clipkit.data.streaming import Streaming

__all__ = [
    "Augmentation",
    "HuggingFacePairs",
    "PairBatch",
    "PairDataModule",
    "ShapesPairs",
    "Streaming",
]
