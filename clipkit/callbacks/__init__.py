"""Evaluation and measurement inside training."""

from clipkit.callbacks.zero_shot import ZeroShot, ZeroShotClassification, ZeroShotRetrieval

__all__ = ["ZeroShot", "ZeroShotClassification", "ZeroShotRetrieval"]
