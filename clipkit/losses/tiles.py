"""Logits by tiles: the memory of a batch of B pairs grows with B and not with its square.

The logits of a batch are computed a tile at a time and thrown away; the backward pass computes them
again. Inf-CL (https://arxiv.org/abs/2410.17243) does the same with kernels of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.losses.base import Duplicates, Ids

# A side of a tile. On a CPU it shall stay in the cache, on a GPU it shall fill the device.
_CPU_TILE = 1024
_GPU_TILE = 8192


class Tile(NamedTuple):
    """A block of the logits: some rows against some columns."""

    rows: slice
    columns: slice

    def diagonal(self, offset: int) -> int:
        """Return where, in the tile, the positives of rows lie: as `Tensor.diagonal` takes it."""
        return int(self.rows.start + offset - self.columns.start)

    def holds_positives(self, offset: int) -> bool:
        """Whether any row's own positive lies in the tile."""
        first, last = self.rows.start + offset, self.rows.stop + offset
        return bool(first < self.columns.stop and self.columns.start < last)


def tiles(rows: Tensor, columns: Tensor) -> Iterator[Tile]:
    """Cut the logits of rows (b, D) and columns (N, D) into tiles."""
    side = _CPU_TILE if rows.device.type == "cpu" else _GPU_TILE
    for top in range(0, len(rows), side):
        for left in range(0, len(columns), side):
            yield Tile(
                slice(top, min(top + side, len(rows))), slice(left, min(left + side, len(columns)))
            )


class Repeats(NamedTuple):
    """Which columns stand for a row's own caption or picture.

    Attributes:
        rows: ids of the rows, (b,) each.
        columns: ids of the columns: caption (N + E,), picture (N,).
        offset: the column of the first row's positive.
    """

    rows: Ids
    columns: Ids
    offset: int

    def of(self, tile: Tile) -> Tensor:
        """Mark a tile's columns (r, c) that repeat a row's caption or picture, its own left out."""
        columns = tile.columns
        same = self.rows.caption[tile.rows, None] == self.columns.caption[None, columns]
        images = self.columns.image[columns]  # fewer, where the columns hold extra captions
        same[:, : len(images)] |= self.rows.image[tile.rows, None] == images[None]
        if tile.holds_positives(self.offset):
            same.diagonal(tile.diagonal(self.offset)).fill_(False)
        return same


def repeats_of(
    ids: Ids | None, all_ids: Ids | None, offset: int, duplicates: Duplicates
) -> Repeats | None:
    """Return what tells the duplicates of a batch, None where there are none to be told."""
    if ids is None or all_ids is None or duplicates == "negative":
        return None
    # On a device this would have to be waited for.
    on_host = ids.caption.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and all(len(torch.unique(one)) == len(one) for one in all_ids):
        return None
    return Repeats(ids, all_ids, offset)
