"""A stream as a sampler: what workers are asked for is the rows themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.utils.data import DistributedSampler

from clipkit.data.streaming.ahead import ReadAhead
from clipkit.data.streaming.reading import Cursor, StreamedRow, Window


class Place(NamedTuple):
    """Where a rank stands: so many rows of a window were handed out."""

    start: Cursor
    end: Cursor
    size: int  # rows of the window
    done: int


START = Place(Cursor(), Cursor(), 0, 0)


class _Mark(NamedTuple):
    first: int  # the number of its first row, counted over all rows that were handed out
    start: Cursor
    end: Cursor
    size: int


# So that Lightning, which replaces other samplers under DDP, leaves it alone and announces epochs.
class StreamSampler(DistributedSampler[StreamedRow]):
    """The rows of this rank's windows, in order; remembers where they came from."""

    def __init__(self, *, rank: int, world_size: int) -> None:
        super().__init__([], num_replicas=world_size, rank=rank)  # type: ignore[arg-type]
        self.announced = 0  # the epoch, by Lightning
        self._windows: Callable[[Cursor], Iterator[Window]] | None = None
        self._place = START
        self._epoch_of: Callable[[int], int] = lambda row: 0
        self._number = 0
        self._marks: list[_Mark] = []
        self._reader: ReadAhead[Window] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.announced = epoch

    def begin(
        self, windows: Callable[[Cursor], Iterator[Window]], place: Place, *, number: int,
        epoch_of: Callable[[int], int],
    ) -> None:  # fmt: skip
        """Say what is handed out from now on.

        Args:
            windows: of a pass, from a cursor on.
            place: where in it to go on.
            number: how many rows were handed out before.
            epoch_of: the epoch of a row by its number.
        """
        self.close()
        self._windows, self._place, self._number, self._epoch_of = windows, place, number, epoch_of
        # What was read ahead of a pass that has ended was not handed out.
        self._marks = [mark for mark in self._marks if mark.first < number]
        self._marks.append(_Mark(number - place.done, place.start, place.end, place.size))

    def place(self, number: int) -> Place:
        """Where this rank stands when so many rows were handed out."""
        mark = next(m for m in reversed(self._marks) if m.first <= number)
        done = number - mark.first
        if done >= mark.size:  # between two windows
            return Place(mark.end, mark.end, 0, 0)
        return Place(mark.start, mark.end, mark.size, done)

    def forget(self, number: int) -> None:
        """Windows that end before so many rows are not asked for any more."""
        while len(self._marks) > 1 and self._marks[1].first <= number:
            del self._marks[0]

    def close(self) -> None:
        """End the thread that reads."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def __len__(self) -> int:
        raise TypeError("nobody knows how long a stream is")

    def __iter__(self) -> Iterator[StreamedRow]:
        assert self._windows is not None
        self.close()
        place, number = self._place, self._number
        reader = self._reader = ReadAhead(self._windows(place.start))
        try:
            passed_over = place.done
            for window in reader:
                self._marks.append(
                    _Mark(number - passed_over, window.start, window.end, len(window.rows))
                )
                for row in window.rows[passed_over:]:
                    yield row._replace(epoch=self._epoch_of(number))
                    number += 1
                passed_over = 0
        finally:
            reader.close()
