"""Rows to batches: where pairs come from, and how they become tensors."""

from clipkit.data.filters import Filters
from clipkit.data.huggingface import HuggingFacePairs
from clipkit.data.images import Augmentation
from clipkit.data.mixed import MixedPairs
from clipkit.data.pair_source import PairSource
from clipkit.data.pairs import PairDataModule
from clipkit.data.samples import PairBatch
from clipkit.data.shapes import ShapesPairs
from clipkit.data.streaming import Streaming

__all__ = [
    "Augmentation",
    "Filters",
    "HuggingFacePairs",
    "MixedPairs",
    "PairBatch",
    "PairDataModule",
    "PairSource",
    "ShapesPairs",
    "Streaming",
]
