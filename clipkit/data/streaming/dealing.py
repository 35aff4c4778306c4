"""Which rank reads what of a pass through a stream, and what of the pass has been read already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

ALL = 1 << 62
"""More rows than a shard has."""


class Share(NamedTuple):
    """What a rank reads of a shard: row i where i modulo `of` is `part`."""

    shard: int
    part: int = 0
    of: int = 1


class Read(NamedTuple):
    """What was read of a shard: of a share of it, the rows before `until`."""

    shard: int
    part: int
    of: int
    until: int


class Already:
    """The rows that were read of a pass: with one number of ranks, maybe with others before."""

    def __init__(self, records: Iterable[Read] = ()) -> None:
        self.records = sorted(set(records))
        self._of_shard: dict[int, list[Read]] = {}
        for record in self.records:
            self._of_shard.setdefault(record.shard, []).append(record)

    def has(self, shard: int, row: int) -> bool:
        """Whether a row was read."""
        return any(
            row < until and row % of == part for _, part, of, until in self._of_shard.get(shard, ())
        )

    def has_all(self, shard: int) -> bool:
        """Whether all rows of a shard were read, by one rank."""
        return any(of == 1 and until >= ALL for _, _, of, until in self._of_shard.get(shard, ()))


def deal(
    sizes: Sequence[int | None], *, seed: int, number: int, rank: int, world_size: int,
    already: Already,
) -> list[Share]:  # fmt: skip
    """What a rank reads in a pass, in order.

    Shards, in an order drawn from (seed, pass), are dealt in rounds, one to each rank; where their
    sizes are known, the largest of a round goes to the rank with the fewest rows so far. What does
    not make a round is read by all ranks, each its share of the rows.

    Args:
        sizes: rows of each shard, where they are known.
        seed: of the order.
        number: of the pass.
        rank: whose shares are wanted.
        world_size: how many ranks there are.
        already: what is not read again.
    """
    order = np.random.default_rng((seed, number)).permutation(len(sizes)).tolist()
    order = [shard for shard in order if not already.has_all(shard)]
    whole = len(order) // world_size * world_size
    shares: list[list[Share]] = [[] for _ in range(world_size)]
    rows = [0] * world_size
    for start in range(0, whole, world_size):
        largest_first = sorted(order[start : start + world_size], key=lambda s: -(sizes[s] or 0))
        fewest_first = sorted(range(world_size), key=lambda r: rows[r])
        for shard, to in zip(largest_first, fewest_first, strict=True):
            shares[to].append(Share(shard))
            rows[to] += sizes[shard] or 0
    return shares[rank] + [Share(shard, rank, world_size) for shard in order[whole:]]
