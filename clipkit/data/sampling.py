"""Which sample each rank takes at each step: a pure function of (seed, epoch, step, rank)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset, DistributedSampler

from clipkit.errors import UserError
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

    def deciding(self) -> dict[str, int]:
        """What decides the order beside pairs and seed, by its name: equal for equal orders."""
        return {}


class Permutation(Order):
    """Every pair once, in an order drawn from (seed, epoch)."""

    def __init__(self, length: int, *, seed: int) -> None:
        self._length = length
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def numbers(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self._seed, epoch)).permutation(self._length)


class MixtureOrder(Order):
    """The pairs of several sources, of each so many an epoch.

    A source is gone through in one permutation after another, each epoch from where the one before
    it stopped: every pair of it is seen before any is seen again.

    Args:
        sources: pairs of each source by its name; they are numbered through in this order.
        shares: pairs of each source in an epoch.
        seed: of the order.
    """

    def __init__(self, sources: Mapping[str, int], shares: Mapping[str, int], *, seed: int) -> None:
        self._sources = sources
        self._shares = shares
        self._seed = seed

    def __len__(self) -> int:
        return sum(self._shares.values())

    def numbers(self, epoch: int) -> np.ndarray:
        names = list(self._sources)
        source = np.repeat(np.arange(len(names)), [self._shares[name] for name in names])
        # First whose turn it is, then which pair: those of a source keep the order of their own.
        source = np.random.default_rng((self._seed, epoch)).permutation(source)
        numbers = np.empty(len(source), np.int64)
        start = 0
        for place, name in enumerate(names):
            numbers[source == place] = start + self._of_source(name, epoch)
            start += self._sources[name]
        return numbers

    def deciding(self) -> dict[str, int]:
        pairs = {f"pairs of {name}": number for name, number in self._sources.items()}
        return pairs | {f"pairs of {name} an epoch": n for name, n in self._shares.items()}

    def _of_source(self, name: str, epoch: int) -> np.ndarray:
        """The numbers (n,) of a source's pairs within it that an epoch takes."""
        length, share = self._sources[name], self._shares[name]
        first, skipped = divmod(epoch * share, length)
        last = -(-(skipped + share) // length) + first
        # By its name, so that its order does not hang on the other sources.
        seeds = [(self._seed, *name.encode(), number) for number in range(first, last)]
        rounds = [np.random.default_rng(seed).permutation(length) for seed in seeds]
        return np.concatenate([np.empty(0, np.int64), *rounds])[skipped : skipped + share]


def shares_of(weights: Mapping[str, float], total: int) -> dict[str, int]:
    """Divide a number as the weights say: each as near as whole numbers allow, their sum exact."""
    whole = sum(weights.values())
    exact = {name: weight / whole * total for name, weight in weights.items()}
    shares = {name: int(share) for name, share in exact.items()}
    # The largest remainders are rounded up; of equal ones the first.
    by_remainder = sorted(weights, key=lambda name: shares[name] - exact[name])
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def check_weights(option: str, weights: Mapping[str, float]) -> None:
    """Refuse weights that are no shares of a whole.

    Raises:
        UserError: there is none, or one is not a positive number.
    """
    if not weights:
        raise UserError(f"{option}: {{}} names nothing to draw from")
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UserError(f"{option}: the weight of {name!r}, {weight:g}, is not above 0")


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
