"""Contrastive losses: a pure function and a thin class each."""

from clipkit.losses.base import ContrastiveLoss, Duplicates, Ids, LossTerms
from clipkit.losses.info_nce import InfoNCELoss, info_nce, info_nce_both_ways
from clipkit.losses.siglip import SigLIPLoss, siglip

__all__ = [
    "ContrastiveLoss",
    "Duplicates",
    "Ids",
    "InfoNCELoss",
    "LossTerms",
    "SigLIPLoss",
    "info_nce",
    "info_nce_both_ways",
    "siglip",
]
