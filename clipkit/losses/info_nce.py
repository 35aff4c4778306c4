"""InfoNCE over a batch of pairs, CLIP's loss (https://arxiv.org/abs/2103.00020)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkit.losses.base import ContrastiveLoss, Duplicates, Ids, LossTerms, wide
from clipkit.losses.tiles import Repeats, Tile, repeats_of, tiles
from clipkit.ranges import check_ratio


class InfoNCELoss(ContrastiveLoss):
    """Mean of the two cross-entropies of picking each row's partner among the batch.

    Args:
        label_smoothing: share of the target spread evenly over the candidates.
        duplicates: what a column is that repeats a row's own caption or picture: ``ignore`` (no
            candidate), ``positive`` (shares the target evenly, as in UniCL,
            https://arxiv.org/abs/2204.03610) or ``negative`` (as other implementations have it).
    """

    def __init__(self, *, label_smoothing: float = 0.0, duplicates: Duplicates = "ignore") -> None:
        check_ratio("model.loss.label_smoothing", label_smoothing)
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
        repeats = repeats_of(ids, all_ids, offset, self.duplicates)
        positive = self.duplicates == "positive"
        one_process = all_image is image
        settings = _Settings(offset, repeats, positive, self.label_smoothing, one_process)
        image_to_text, text_to_image = _tiled(image, all_text, scale, settings)
        if text_to_image is None:
            text_to_image, _ = _tiled(text, all_image, scale, settings)
        loss = (image_to_text + text_to_image) / 2
        if bias is not None:
            loss = loss + 0 * bias  # it cancels in the softmax, and has a gradient: zero
        return LossTerms(loss, image_to_text, text_to_image)


def info_nce(
    rows: Tensor,
    columns: Tensor,
    *,
    offset: int = 0,
    scale: Tensor,
    ids: Ids | None = None,
    all_ids: Ids | None = None,
    duplicates: Duplicates = "ignore",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy of finding column ``offset + i`` for row i.

    Memory grows with b + N; value and gradients are those of the whole matrix of logits.

    Args:
        rows: (b, D) of unit norm.
        columns: (N, D) of unit norm, or (N + E, D) with E that are negatives only.
        offset: the column of the first row's positive.
        scale: multiplies the cosines.
        ids: ids of the rows, (b,) each; without them nothing is a duplicate.
        all_ids: ids of the columns: caption (N + E,), image (N,).
        duplicates: what a column is that repeats a row's own positive.
        label_smoothing: share of the target spread evenly over the candidates.
    """
    repeats = repeats_of(ids, all_ids, offset, duplicates)
    settings = _Settings(offset, repeats, duplicates == "positive", label_smoothing, False)
    return _tiled(rows, columns, scale, settings)[0]


class _Settings(NamedTuple):
    offset: int
    repeats: Repeats | None
    repeats_are_positive: bool
    label_smoothing: float
    both_ways: bool  # of one process: the columns among the rows too, from the same product


def _tiled(
    rows: Tensor, columns: Tensor, scale: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    found: tuple[Tensor, Tensor | None] = _TiledInfoNCE.apply(*wide(rows, columns, scale), settings)
    return found


class _Part(NamedTuple):
    """The logits of a tile, from the side of those who ask."""

    queries: slice
    candidates: slice
    logits: Tensor  # (q, c), -inf where a repeat is ignored
    repeated: Tensor | None  # (q, c)

    def transposed(self, num_pairs: int) -> _Part:
        """Return the same from the side of the candidates; extra ones ask for nobody."""
        stop = max(self.candidates.start, min(self.candidates.stop, num_pairs))
        asking = slice(self.candidates.start, stop)
        width = stop - self.candidates.start
        repeated = None if self.repeated is None else self.repeated.T[:width]
        return _Part(asking, self.queries, self.logits.T[:width], repeated)


def _part(rows: Tensor, columns: Tensor, scale: Tensor, tile: Tile, settings: _Settings) -> _Part:
    logits = (scale * rows[tile.rows]) @ columns[tile.columns].T
    repeated = None if settings.repeats is None else settings.repeats.of(tile)
    if repeated is not None and not settings.repeats_are_positive:
        logits.masked_fill_(repeated, -torch.inf)
    return _Part(tile.rows, tile.columns, logits, repeated)


class _Direction:
    """What the softmax of one direction keeps of its tiles: numbers for each of n queries.

    Args:
        own: (n,) the logit of each query's own positive.
        num_candidates: how many columns a query is compared with.
    """

    def __init__(self, own: Tensor, num_candidates: int, settings: _Settings) -> None:
        self.smoothing = settings.label_smoothing
        self.positive = settings.repeats_are_positive
        self.lse = torch.full_like(own, -torch.inf)
        self.pulled = own.clone()  # the sum of the positives' logits
        self.num_positives = torch.ones_like(own)
        self.spread = torch.zeros_like(own)  # the sum of the candidates' logits
        self.num_candidates = torch.full_like(own, num_candidates)

    def take(self, part: _Part) -> None:
        """Count a tile in."""
        queries, _, logits, repeated = part
        self.lse[queries] = torch.logaddexp(self.lse[queries], logits.logsumexp(1))
        if repeated is not None and self.positive:
            self.pulled[queries] += (logits * repeated).sum(1)
            self.num_positives[queries] += repeated.sum(1)
        if self.smoothing > 0:
            if repeated is not None and not self.positive:
                logits = logits.masked_fill(repeated, 0.0)
                self.num_candidates[queries] -= repeated.sum(1)
            self.spread[queries] += logits.sum(1)

    def loss(self) -> Tensor:
        """Return the mean cross-entropy, once all tiles are counted in."""
        target = (1 - self.smoothing) * self.pulled / self.num_positives
        return (self.lse - target - self.smoothing * self.spread / self.num_candidates).mean()

    def gradient(self, part: _Part, weight: Tensor) -> Tensor:
        """Return the gradient (q, c) of the weighted sum, but for the `pull` to own positives."""
        queries, _, logits, repeated = part
        found = torch.sub(logits, self.lse[queries, None]).exp_()
        if repeated is not None and self.positive:
            found -= repeated * self.pull[queries, None]
        if self.smoothing > 0:
            share = self.smoothing / self.num_candidates[queries, None]
            ignored = repeated is not None and not self.positive
            found -= share * ~repeated if ignored and repeated is not None else share
        return found.mul_(weight)

    @property
    def pull(self) -> Tensor:
        """(n,) the share of the target that each positive has."""
        return (1 - self.smoothing) / self.num_positives


class _TiledInfoNCE(torch.autograd.Function):
    """The mean cross-entropy of the rows among the columns and, both ways, of the columns'."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, settings: _Settings
    ) -> tuple[Tensor, Tensor | None]:
        with torch.autocast(rows.device.type, enabled=False):
            own = scale * (rows * columns[settings.offset :][: len(rows)]).sum(1)
            ways = [_Direction(own, len(columns), settings)]
            if settings.both_ways:
                ways.append(_Direction(own, len(rows), settings))
            for tile in tiles(rows, columns):
                part = _part(rows, columns, scale, tile, settings)
                ways[0].take(part)
                if settings.both_ways:
                    ways[1].take(part.transposed(len(rows)))
        ctx.save_for_backward(rows, columns, scale)
        ctx.ways, ctx.settings = ways, settings
        return ways[0].loss(), ways[1].loss() if settings.both_ways else None

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, columns, scale = ctx.saved_tensors
        ways, settings = ctx.ways, ctx.settings
        # The losses are means over the rows.
        weights = [one / len(rows) for one in upstream if one is not None]
        with torch.autocast(rows.device.type, enabled=False):
            own = slice(settings.offset, settings.offset + len(rows))
            pull = sum(weight * way.pull for weight, way in zip(weights, ways, strict=False))
            to_rows = -pull[:, None] * columns[own]
            to_columns = torch.zeros_like(columns)
            to_columns[own] = -pull[:, None] * rows
            for tile in tiles(rows, columns):
                part = _part(rows, columns, scale, tile, settings)
                gradient = ways[0].gradient(part, weights[0])
                if settings.both_ways:
                    back = ways[1].gradient(part.transposed(len(rows)), weights[1])
                    gradient[:, : len(back)] += back.T
                to_rows[tile.rows].addmm_(gradient, columns[tile.columns])
                to_columns[tile.columns].addmm_(gradient.T, rows[tile.rows])
            # Of the logits' gradient G: scale G Y, scale G' X, and the sum of G times the cosines.
            to_scale = (to_rows * rows).sum()
            return to_rows * scale, to_columns * scale, to_scale, None
