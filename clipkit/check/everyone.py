"""What every rank has, for all to see; torch's own collective, not the gather that is checked."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def of_every_rank(value: T) -> list[T]:
    """Return the value that each rank passes, in rank order; tensors lie on the CPU."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    found: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return [one for one in found if one is not None]
