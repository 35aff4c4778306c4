"""Batches of a stream: as many for every rank, and a place to go on from behind each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from clipkit.data.samples import PairBatch
from clipkit.data.streaming.dataset import StreamedPairs
from clipkit.data.streaming.sampler import START, Place, StreamSampler
from clipkit.data.streaming.state import Pass, StreamState
from clipkit.data.streaming.stream import Stream
from clipkit.distributed import any_rank, told_by_ranks
from clipkit.errors import UserError
from clipkit.resume import Position

log = logging.getLogger(__name__)

_KEPT = 1024
"""Batches that a position may lie behind the one that was handed out last."""


class StreamLoader(DataLoader[PairBatch]):
    """The batches of a stream, for one rank.

    A pass ends for all ranks when the first of them has no full batch left. They agree on it where
    training asks for a batch: what is prepared ahead differs between ranks, the asking does not.

    Args:
        data: makes samples of rows.
        stream: what is read.
        rank: whose batches these are.
        world_size: how many ranks there are.
        batch_size: pairs of a rank's batch.
        steps: batches of an epoch; a pass if None.
        start: the position that training begins at.
        state: of the stream there, where it is not at the beginning of a pass.
        options: of the DataLoader.
    """

    def __init__(
        self, data: StreamedPairs, *, stream: Stream, rank: int, world_size: int, batch_size: int,
        steps: int | None, start: Position, state: StreamState | None, **options: Any,
    ) -> None:  # fmt: skip
        self._sampler = StreamSampler(rank=rank, world_size=world_size)
        super().__init__(
            data,  # type: ignore[arg-type]
            batch_size=batch_size, sampler=self._sampler, drop_last=True, **options,
        )  # fmt: skip
        self._stream = stream
        self._rank, self._world_size = rank, world_size
        self._share = batch_size
        self._steps = steps
        self._start = start
        self._handed_out = 0
        self._epochs: dict[int, int] = {}  # how many batches were handed out before each began
        self._passes: list[tuple[int, Pass]] = []  # and before each pass
        self._batches: Iterator[PairBatch] | None = None
        self._begins_anew = False  # no batch of the present pass was handed out before
        self._said = False
        first = start.epoch if steps is None else 0
        self._go_on = stream.go_on(state, rank, world_size) or (Pass(first, stream.nothing), START)

    def __len__(self) -> int:
        if self._steps is None:
            raise TypeError("nobody knows how long a pass through a stream is")
        return self._steps

    def __iter__(self) -> Iterator[PairBatch]:  # type: ignore[override]
        # Lightning fetches a batch before it has read where it goes on: it then says 0.
        epoch = max(self._sampler.announced, self._start.epoch)
        done = self._start.batches if epoch == self._start.epoch else 0
        self._epochs[epoch] = self._handed_out - done
        return self._pass(epoch) if self._steps is None else self._so_many(self._steps - done)

    def state(self, at: Position) -> StreamState | None:
        """Where all ranks stand at a position; all of them ask.

        None at the beginning of a pass that is an epoch.
        """
        batches = self._batches_before(at)
        if batches is None:
            return None
        present = next(p for before, p in reversed(self._passes) if before <= batches)
        place = self._sampler.place(batches * self._share)
        return StreamState(present, told_by_ranks([place]))

    def close(self) -> None:
        """End what reads."""
        self._batches = None
        self._sampler.close()

    def _batches_before(self, at: Position) -> int | None:
        """How many batches were handed out before a position; None where no pass has begun."""
        if at.epoch in self._epochs:
            return self._epochs[at.epoch] + at.batches
        if self._steps is None or at.epoch - 1 not in self._epochs:
            return None
        return self._epochs[at.epoch - 1] + self._steps

    def _pass(self, epoch: int) -> Iterator[PairBatch]:
        """One pass, which is an epoch."""
        present, place = self._go_on
        if present.number != epoch:
            present, place = Pass(epoch, self._stream.nothing), START
        self._begin(present, place)
        while (batch := self._next()) is not None:
            yield batch

    def _so_many(self, steps: int) -> Iterator[PairBatch]:
        """An epoch of so many batches, from where the last one ended."""
        if self._batches is None:
            self._begin(*self._go_on)
        for _ in range(steps):
            while (batch := self._next()) is None:
                _, ended = self._passes[-1]
                self._say_once(ended)
                self._begin(Pass(ended.number + 1, self._stream.nothing), START)
            yield batch

    def _begin(self, present: Pass, place: Place) -> None:
        self._batches = None
        self._passes = [*self._passes[-_KEPT:], (self._handed_out, present)]
        windows = self._stream.of_rank(self._rank, self._world_size, present).windows
        number = self._handed_out * self._share
        self._sampler.begin(windows, place, number=number, epoch_of=self._epochs_of_rows())
        self._begins_anew = place == START and not present.already.records
        self._batches = super().__iter__()

    def _epochs_of_rows(self) -> Callable[[int], int]:
        """The epoch of a row by its number; knows nothing of the loader, which knows the sampler.

        Torch ends the workers of a loader that is in a circle only after a wait.
        """
        steps, share = self._steps, self._share
        if steps is None:
            _, present = self._passes[-1]
            return lambda row: present.number
        before = self._start.epoch * steps + self._start.batches
        return lambda row: (before + row // share) // steps

    def _next(self) -> PairBatch | None:
        """The next batch of the pass; None where a rank has none left."""
        assert self._batches is not None
        batch = next(self._batches, None)
        if any_rank(batch is None):
            if self._begins_anew:
                fewer = "" if self._stream.filters is None else ", filters that leave out less"
                raise UserError(
                    f"data.batch_size: in a pass through the stream, one of {self._world_size} "
                    f"ranks has fewer than the {self._share} pairs of its share of a batch; a "
                    f"smaller batch, shards of like size{fewer} would fill it"
                )
            return None
        self._begins_anew = False
        self._handed_out += 1
        self._sampler.forget((self._handed_out - _KEPT) * self._share)
        return batch

    def _say_once(self, ended: Pass) -> None:
        if not self._said and self._rank == 0:
            before, _ = self._passes[-1]
            log.info(
                "data: the pass %d through the stream ended after %d steps, and the next one began "
                "within an epoch: its pairs come again, in another order",
                ended.number, self._handed_out - before,
            )  # fmt: skip
        self._said = True
