"""The pairwise sigmoid loss of SigLIP (https://arxiv.org/abs/2303.15343)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipkit.losses.base import ContrastiveLoss, Duplicates, Ids, LossTerms, duplicate_columns, wide


class SigLIPLoss(ContrastiveLoss):
    """Every (image, text) pair is a binary question; the sum is divided by B, not by B squared.

    It wants a bias: ``model.temperature: {init: 0.1, bias: prior}``, or -10 as in the paper.

    Args:
        duplicates: what a column is that repeats a row's own caption or picture: ``ignore`` (not
            asked), ``positive`` or ``negative`` (as other implementations have it).
    """

    def __init__(self, *, duplicates: Duplicates = "ignore") -> None:
        super().__init__()
        self.duplicates = duplicates

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        all_image: Tensor,
        all_text: Tensor,
        *,
        offset: int,
        scale: Tensor,
        bias: Tensor | None = None,
        ids: Ids | None = None,
        all_ids: Ids | None = None,
    ) -> LossTerms:
        # Each rank asks its own images about all texts; together that is every pair once.
        repeated = None
        if ids is not None and all_ids is not None and self.duplicates != "negative":
            repeated = duplicate_columns(ids, all_ids, offset)
        return LossTerms(
            siglip(
                image,
                all_text,
                offset=offset,
                scale=scale,
                bias=bias,
                repeated=repeated,
                repeated_are_positive=self.duplicates == "positive",
            )
        )


def siglip(
    rows: Tensor,
    columns: Tensor,
    *,
    offset: int,
    scale: Tensor,
    bias: Tensor | None = None,
    repeated: Tensor | None = None,
    repeated_are_positive: bool = False,
) -> Tensor:
    """Return -1/b times the sum of log sigmoid(z (scale * cosine + bias)), z = +1 on positives.

    Args:
        rows: (b, D) of unit norm.
        columns: (N, D) of unit norm.
        offset: the column of the first row's positive.
        scale: multiplies the cosines.
        bias: is added to them.
        repeated: (b, N) bool, the columns that repeat the row's own positive.
        repeated_are_positive: whether those count as positives; otherwise they are left out.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows, columns, scale = wide(rows, columns, scale)
        logits = scale * rows @ columns.T  # (b, N)
        if bias is not None:
            logits = logits + wide(bias)[0]
        own = torch.arange(len(rows), device=rows.device)
        positive = torch.zeros_like(logits, dtype=torch.bool)
        positive[own, own + offset] = True
        if repeated is not None and repeated_are_positive:
            positive |= repeated
        terms = F.logsigmoid(torch.where(positive, logits, -logits))
        if repeated is not None and not repeated_are_positive:
            terms = terms.masked_fill(repeated, 0.0)
        return -terms.sum() / len(rows)
