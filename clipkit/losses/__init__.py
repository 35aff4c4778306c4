"""Contrastive losses: a pure function and a thin class each."""

from clipkit.losses.base import ContrastiveLoss, Duplicates, Ids, LossTerms
from clipkit.losses.info_nce import InfoNCELoss, info_nce
from clipkit.losses.siglip import SigLIPLoss, siglip

__all__ = [
    "ContrastiveLoss",
    "Duplicates",
    "Ids",
    "InfoNCELoss",
    "LossTerms",
    "SigLIPLoss",
    "info_nce",
    "siglip",
]
