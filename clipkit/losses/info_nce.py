"""InfoNCE over a batch of pairs, CLIP's loss (https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from clipkit.losses.base import ContrastiveLoss, Duplicates, Ids, LossTerms, duplicate_columns, wide


class InfoNCELoss(ContrastiveLoss):
    """Mean of the two cross-entropies of picking each row's partner among the batch.

    Args:
        label_smoothing: share of the target spread evenly over the candidates.
        duplicates: what a column is that repeats a row's own caption or picture: ``ignore`` (no
            candidate), ``positive`` (shares the target evenly, as in UniCL,
            https://arxiv.org/abs/2204.03610) or ``negative`` (as other implementations have it).
    """

    def __init__(self, *, label_smoothing: float = 0.0, duplicates: Duplicates = "ignore") -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
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
        repeated = None
        if ids is not None and all_ids is not None and self.duplicates != "negative":
            repeated = duplicate_columns(ids, all_ids, offset)
        image_to_text, text_to_image = (
            info_nce(
                rows,
                columns,
                offset=offset,
                scale=scale,
                bias=bias,
                repeated=None if repeated is None else repeated[:, : len(columns)],
                repeated_are_positive=self.duplicates == "positive",
                label_smoothing=self.label_smoothing,
            )
            for rows, columns in ((image, all_text), (text, all_image))
        )
        return LossTerms((image_to_text + text_to_image) / 2, image_to_text, text_to_image)


def info_nce(
    rows: Tensor,
    columns: Tensor,
    *,
    offset: int,
    scale: Tensor,
    bias: Tensor | None = None,
    repeated: Tensor | None = None,
    repeated_are_positive: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy of finding column ``offset + i`` for row i.

    Args:
        rows: (b, D) of unit norm.
        columns: (N, D) of unit norm.
        offset: the column of the first row's positive.
        scale: multiplies the cosines.
        bias: is added to them; it cancels in the softmax.
        repeated: (b, N) bool, the columns that repeat the row's own positive.
        repeated_are_positive: whether those share the target; otherwise they are no candidates.
        label_smoothing: share of the target spread evenly over the candidates.
    """
    with torch.autocast(rows.device.type, enabled=False):
        rows, columns, scale = wide(rows, columns, scale)
        logits = scale * rows @ columns.T  # (b, N)
        if bias is not None:
            logits = logits + wide(bias)[0]
        own = torch.arange(len(rows), device=rows.device) + offset
        if repeated is None:
            return F.cross_entropy(logits, own, label_smoothing=label_smoothing)
        target = F.one_hot(own, len(columns)).to(logits.dtype)
        candidates = torch.ones_like(target)
        if repeated_are_positive:
            target = (target + repeated) / (1 + repeated.sum(1, keepdim=True))
        else:
            candidates = candidates.masked_fill(repeated, 0.0)
            # The finite stand-in for -inf keeps 0 * logit free of NaN.
            logits = logits.masked_fill(repeated, torch.finfo(logits.dtype).min)
        uniform = candidates / candidates.sum(1, keepdim=True)
        target = (1 - label_smoothing) * target + label_smoothing * uniform
        log_probability = F.log_softmax(logits, dim=1).masked_fill(candidates == 0, 0.0)
        return -(target * log_probability).sum(1).mean()
