"""The splits of a streamed data set: one is trained on, of the others the first rows are opened."""

from __future__ import annotations

from collections.abc import Callable

from clipkit.data.filters import RowFilters
from clipkit.data.pairs import TRAIN, VALIDATION
from clipkit.data.rows import Rows
from clipkit.data.streaming.heads import head_of, hold_out_of
from clipkit.data.streaming.opening import StreamedData
from clipkit.data.streaming.options import Streaming
from clipkit.data.streaming.shards import AT_A_TIME
from clipkit.data.streaming.stream import Stream

Columns = tuple[str | None, str | None]
"""The columns of pictures and captions; None where they are to be found."""


class StreamedSplits:
    """What a data module asks of a data set that is not opened as a whole.

    Args:
        options: how it is streamed.
        columns: that are trained on.
        train_split: the split to train on.
        opened: opens it with other columns.
    """

    def __init__(
        self,
        options: Streaming,
        *,
        columns: Columns,
        train_split: str,
        opened: Callable[[Columns], StreamedData],
    ) -> None:
        self.options = options
        self._columns = columns
        self._train_split = train_split
        self._open = opened
        self._opened: dict[Columns, StreamedData] = {}
        self._held_out: dict[Columns, tuple[Rows, frozenset[int]]] = {}

    def rows(self, split: str, columns: Columns) -> Rows:
        """The first rows of a split; without a validation split, some of training are held out."""
        data = self._data(columns)
        split = self._train_split if split == TRAIN else split
        if VALIDATION in data.splits or split not in (self._train_split, VALIDATION):
            return head_of(data.split(split), self.options.max_validation_pairs)
        held_out, ids = self._hold_out(columns)
        if split == VALIDATION:
            return held_out
        shards = data.split(self._train_split)
        return head_of(shards, self.options.max_validation_pairs, but=ids)

    def stream(
        self, *, seed: int, every_caption: bool, negatives: bool, filters: RowFilters | None
    ) -> Stream:
        """What is trained on.

        Raises:
            UserError: the filters ask for what the first rows do not have.
        """
        data = self._data(self._columns)
        shards = data.split(self._train_split)
        held_out = frozenset[int]()
        if VALIDATION not in data.splits:
            _, held_out = self._hold_out(self._columns)
        if filters is not None:
            filters.check(head_of(shards, AT_A_TIME))
        return Stream(shards, self.options, seed, held_out, every_caption, negatives, filters)

    def describe(self) -> str:
        """One line: what is streamed, and what is held out."""
        data = self._data(self._columns)
        if VALIDATION in data.splits or self._train_split not in data.splits:
            return data.describe()
        held_out, _ = self._hold_out(self._columns)
        return f"{data.describe()}; of the first pairs {len(held_out):,} held out as validation"

    @property
    def fingerprint(self) -> str:
        """Hex digest that changes with the data's files."""
        return self._data(self._columns).fingerprint

    def _data(self, columns: Columns) -> StreamedData:
        if columns not in self._opened:
            self._opened[columns] = self._open(columns)
        return self._opened[columns]

    def _hold_out(self, columns: Columns) -> tuple[Rows, frozenset[int]]:
        if columns not in self._held_out:
            shards = self._data(columns).split(self._train_split)
            self._held_out[columns] = hold_out_of(shards, self.options.max_validation_pairs)
        return self._held_out[columns]
