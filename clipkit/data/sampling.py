"""Which sample each rank takes at each step: a pure function of (seed, epoch, step, rank)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from clipkit.resume import BEGINNING, Position


class SampleKey(NamedTuple):
    """What a data set is asked for: drawing augmentations needs the epoch beside the number."""

    epoch: int
    number: int


class Order(ABC):
    """Which pairs an epoch trains, in which order: a pure function of the epoch."""

    @abstractmethod
    def __len__(self) -> int:
        """Pairs of an epoch; every epoch has as many."""

    @abstractmethod
    def numbers(self, epoch: int) -> np.ndarray:
        """The numbers (N,) int64 of an epoch's pairs."""


class Permutation(Order):
    """Every pair once, in an order drawn from (seed, epoch)."""

    def __init__(self, length: int, *, seed: int) -> None:
        self._length = length
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def numbers(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._length)


# Both derive from DistributedSampler so that Lightning, which replaces other samplers under DDP,
# leaves them alone and still announces each epoch through set_epoch.


class TrainSampler(DistributedSampler[SampleKey]):
    """The pairs of an epoch in their order, cut into global batches, each into one share a rank.

    Global batch k of an epoch holds the same pairs for any number of ranks; pairs that do not fill
    a last batch are left out of that epoch.

    Args:
        data: what is sampled.
        order: of the pairs of each epoch.
        batch_size: pairs of a global batch.
        rank: whose share is yielded.
        world_size: how many ranks share a batch.
        start: the position to go on from; its batches of its epoch are passed over.
    """

    def __init__(
        self, data: Dataset[object], *, order: Order, batch_size: int, rank: int, world_size: int,
        start: Position = BEGINNING,
    ) -> None:  # fmt: skip
        super().__init__(data, num_replicas=world_size, rank=rank)
        self.order = order
        self.batch_size = batch_size
        self.start = start
        self.epoch = start.epoch

    def set_epoch(self, epoch: int) -> None:
        # Loader processes fetch ahead before Lightning has read where it goes on: it then says 0.
        self.epoch = max(epoch, self.start.epoch)

    def __len__(self) -> int:
        return len(self.order) // self.batch_size * (self.batch_size // self.num_replicas)

    def __iter__(self) -> Iterator[SampleKey]:
        numbers = self.order.numbers(self.epoch)
        share = self.batch_size // self.num_replicas
        passed_over = self.start.batches if self.epoch == self.start.epoch else 0
        beginning = passed_over * self.batch_size
        for start in range(beginning, len(numbers) - self.batch_size + 1, self.batch_size):
            first = start + self.rank * share
            for number in numbers[first : first + share].tolist():
                yield SampleKey(self.epoch, number)


class EvaluationSampler(DistributedSampler[SampleKey]):
    """Every row once, in order, dealt to the ranks in turn.

    Where the rows do not divide, the last one is repeated so that all ranks make the same number
    of steps; who evaluates drops repeated rows by their number.
    """

    def __init__(self, data: Dataset[object], *, length: int, rank: int, world_size: int) -> None:
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=False)
        self.length = length

    def __len__(self) -> int:
        return -(-self.length // self.num_replicas)

    def __iter__(self) -> Iterator[SampleKey]:
        for step in range(len(self)):
            index = step * self.num_replicas + self.rank
            yield SampleKey(0, min(index, self.length - 1))
