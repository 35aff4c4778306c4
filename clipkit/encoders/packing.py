"""Captions without their padding: the real tokens of a batch, one caption after the other.

A layer that treats tokens one by one (projections, MLPs, norms) does not care where a caption ends;
only attention does. So a tower works on (T, W), the T real tokens, and lays them out on the grid
(B, L) for attention alone. Its cost then follows the tokens, whatever the longest caption is.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """The real tokens of B captions that are padded to L."""

    vectors: Tensor  # (T, W), of the token table
    places: Tensor  # (T,) int64, where each stands in the grid (B, L), flattened


def places_of(lengths: Tensor, *, total: int, width: int) -> Tensor:
    """Return where the real tokens stand in a grid, row by row, (total,) int64.

    Args:
        lengths: how many tokens each caption has, (B,), on any device.
        total: their sum, known without asking the device.
        width: L, how long a row of the grid is.
    """
    rows = torch.repeat_interleave(lengths, output_size=total)
    starts = lengths.cumsum(0) - lengths
    columns = torch.arange(total, device=lengths.device) - starts[rows]
    return rows * width + columns


def to_grid(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Lay values (T, W) out on a grid of shape (B, L): (B, L, W), zero where there is padding."""
    grid = values.new_zeros(shape.numel(), values.shape[-1]).index_copy(0, places, values)
    return grid.view(*shape, values.shape[-1])


def from_grid(grid: Tensor, places: Tensor) -> Tensor:
    """Return what stands in the places of a grid: (B, L, W) to (T, W)."""
    values: Tensor = _FromGrid.apply(grid, places)
    return values


class _FromGrid(torch.autograd.Function):
    # Each place is taken once, so its gradient is copied: PyTorch's own would add, more slowly.

    @staticmethod
    def forward(ctx: Any, grid: Tensor, places: Tensor) -> Tensor:
        ctx.shape = grid.shape[:2]
        ctx.save_for_backward(places)
        return grid.flatten(0, 1).index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return to_grid(gradients[0], places, ctx.shape), None
