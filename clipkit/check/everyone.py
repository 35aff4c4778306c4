"""All ranks together, by torch's own means and not by the gather that is checked; and one alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def alone() -> Iterator[None]:
    """Hide the other ranks: whatever asks for them finds one process, and cannot wait for any."""
    if not dist.is_available():
        yield
        return
    everyone, dist.GroupMember.WORLD = dist.GroupMember.WORLD, None
    try:
        yield
    finally:
        dist.GroupMember.WORLD = everyone
