"""Gathering rows across processes: differentiable, and the identity where there is one process."""

from __future__ import annotations

from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(rows: Tensor) -> Tensor:
    """Concatenate every process's rows in rank order: (b, ...) -> (W * b, ...).

    Every process must hold the same number of rows. The gradient of each row is the sum over all
    processes' losses, so that after the usual averaging of parameter gradients the result is the
    gradient of the mean of the losses.
    """
    if world_size() == 1:
        return rows
    return _Gather.apply(rows)  # type: ignore[no-any-return]


def gather_ragged(rows: Tensor) -> Tensor:
    """Concatenate all processes' rows in rank order; their numbers may differ.

    The gradient is that of :func:`gather`. Waits for the device.
    """
    if world_size() == 1:
        return rows
    counts = _all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    # Where nobody has any, the gradient of nothing still has to be asked for by all.
    most = max(*counts, 1)
    padded = torch.cat([rows, rows.new_zeros((most - len(rows), *rows.shape[1:]))])
    blocks = torch.split(gather(padded), most)
    return torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])


# --- What processes tell one another beside the training -----------------------------------------
# All of them, at the same moment. They wait for one another, and for no GPU.


def any_rank(asked: bool) -> bool:
    """Whether any process asks."""
    if world_size() == 1:
        return asked
    flag = torch.tensor([asked], dtype=torch.int32)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=_beside())
    return bool(flag)


def sums_of_ranks(numbers: list[int]) -> list[int]:
    """Return the sum over all processes of each number; all give as many."""
    if world_size() == 1:
        return numbers
    totals = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(totals, group=_beside())
    return [int(total) for total in totals.tolist()]


def told_by_ranks(told: list[T]) -> list[T]:
    """Return what all processes tell, in the order of their ranks."""
    if not any_rank(bool(told)):
        return []
    if world_size() == 1:
        return told
    lists: list[Any] = [None] * world_size()
    dist.all_gather_object(lists, told, group=_beside())
    return [item for some in lists for item in some]


def _beside() -> Any:
    """Return the group that they use: of all processes, on CPUs; made when they first need it."""
    if dist.get_backend() == "gloo":
        return None  # that of the training
    group = _GROUPS.get(dist.group.WORLD)
    if group is None:
        group = _GROUPS[dist.group.WORLD] = dist.new_group(backend="gloo")
    return group


_GROUPS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""By the group of the training, which ends with it."""


def least(value: Tensor) -> Tensor:
    """Return the least of all processes' values, on each of them."""
    return value if world_size() == 1 else _all_gather(value[None]).amin(0)


def _all_gather(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    blocks = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(blocks, rows)
    return torch.cat(blocks)


class _Gather(torch.autograd.Function):
    # Own function: torch 2.15 deprecates the differentiable collectives of torch.distributed.nn.

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        return _all_gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # gloo has no reduce_scatter, so: sum everywhere, keep the own block.
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed)
        start = rank() * ctx.num_rows
        return summed[start : start + ctx.num_rows]
