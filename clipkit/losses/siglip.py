"""The pairwise sigmoid loss of SigLIP (https://arxiv.org/abs/2303.15343)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clipkit.losses.base import ContrastiveLoss, Duplicates, Ids, LossTerms, wide
from clipkit.losses.tiles import Repeats, Tile, repeats_of, tiles


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
        return LossTerms(
            siglip(
                image,
                all_text,
                offset=offset,
                scale=scale,
                bias=bias,
                ids=ids,
                all_ids=all_ids,
                duplicates=self.duplicates,
            )
        )


def siglip(
    rows: Tensor,
    columns: Tensor,
    *,
    offset: int = 0,
    scale: Tensor,
    bias: Tensor | None = None,
    ids: Ids | None = None,
    all_ids: Ids | None = None,
    duplicates: Duplicates = "ignore",
) -> Tensor:
    """Return -1/b times the sum of log sigmoid(z (scale * cosine + bias)), z = +1 on positives.

    Memory grows with b + N; value and gradients are those of the whole matrix of logits.

    Args:
        rows: (b, D) of unit norm.
        columns: (N, D) of unit norm, or (N + E, D) with E that are negatives only.
        offset: the column of the first row's positive.
        scale: multiplies the cosines.
        bias: is added to them.
        ids: ids of the rows, (b,) each; without them nothing is a duplicate.
        all_ids: ids of the columns: caption (N + E,), image (N,).
        duplicates: what a column is that repeats a row's own positive.
    """
    inputs = wide(rows, columns, scale, scale.new_zeros(()) if bias is None else bias)
    # The sum needs nothing of the other tiles, so that the gradient is made in the same pass.
    wanted = torch.is_grad_enabled() and any(one.requires_grad for one in inputs)
    repeats = repeats_of(ids, all_ids, offset, duplicates)
    settings = _Settings(offset, repeats, duplicates == "positive", wanted)
    return _TiledSigLIP.apply(*inputs, settings)  # type: ignore[no-any-return]


class _Settings(NamedTuple):
    offset: int
    repeats: Repeats | None
    repeats_are_positive: bool
    wants_gradient: bool


class _TiledSigLIP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, settings: _Settings
    ) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            own = slice(settings.offset, settings.offset + len(rows))
            logits = scale * (rows * columns[own]).sum(1) + bias
            total = -F.logsigmoid(logits).sum()
            pull = -torch.sigmoid(-logits)  # (b,) the gradient of the rows' own logits
            to_rows, to_columns = torch.empty_like(rows), torch.zeros_like(columns)
            if settings.wants_gradient:
                torch.mul(pull[:, None], columns[own], out=to_rows)
                to_columns[own] = pull[:, None] * rows
            to_bias = pull.sum()
            for tile in tiles(rows, columns):
                signed, repeated = _signed(rows, columns, scale, bias, tile, settings)
                total -= F.logsigmoid(-signed).sum()
                if settings.wants_gradient:
                    gradient = torch.sigmoid(signed)
                    if repeated is not None and settings.repeats_are_positive:
                        gradient = torch.where(repeated, -gradient, gradient)
                    to_rows[tile.rows].addmm_(gradient, columns[tile.columns])
                    to_columns[tile.columns].addmm_(gradient.T, rows[tile.rows])
                    to_bias += gradient.sum()
            if settings.wants_gradient:
                to_scale = (to_rows * rows).sum()
                ctx.save_for_backward(to_rows * scale, to_columns * scale, to_scale, to_bias)
        ctx.num_rows = len(rows)
        return total / len(rows)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        weight = upstream[0] / ctx.num_rows
        return (*(weight * gradient for gradient in ctx.saved_tensors), None)


def _signed(
    rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor, tile: Tile, settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    """Return a tile's logits as the negatives they are, and its repeats.

    What is left out is -inf, which weighs nothing: ignored repeats, and the rows' own positives,
    counted apart. The sign of repeats that are positives is turned.
    """
    logits = (rows[tile.rows] @ columns[tile.columns].T).mul_(scale).add_(bias)
    repeated = None if settings.repeats is None else settings.repeats.of(tile)
    if repeated is not None and settings.repeats_are_positive:
        logits = torch.where(repeated, -logits, logits)
    elif repeated is not None:
        logits.masked_fill_(repeated, -torch.inf)
    if tile.holds_positives(settings.offset):
        logits.diagonal(tile.diagonal(settings.offset)).fill_(-torch.inf)
    return logits, repeated
