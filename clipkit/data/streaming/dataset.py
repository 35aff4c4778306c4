"""Rows of a stream to samples, in the workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
from torch.utils.data import Dataset

from clipkit.data.broken import Broken, BrokenRowError, nothing_usable
from clipkit.data.rows import Picture, Rows
from clipkit.data.samples import PairDataset, Sample
from clipkit.data.streaming.reading import StreamedRow


class RowsInHand(Rows):
    """The rows that a worker was given, by their number in the stream."""

    def __init__(self) -> None:
        self.rows: dict[int, StreamedRow] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Picture:
        row = self.rows[index]
        if row.fault is not None:
            raise BrokenRowError(*row.fault)
        assert row.picture is not None
        return row.picture

    def captions(self, index: int) -> list[str]:
        row = self.rows[index]
        if row.fault is not None:  # which tells more than that there is no caption
            raise BrokenRowError(*row.fault)
        return row.captions

    def caption_counts(self, index: int) -> np.ndarray | None:
        return self.rows[index].counts

    def negatives(self) -> Rows:
        return NegativesInHand(self)

    def key(self, index: int) -> str:
        return self.rows[index].key

    @property
    def columns(self) -> list[str]:
        return []

    def column(self, name: str) -> NoReturn:
        raise NotImplementedError

    def class_names(self, name: str) -> NoReturn:
        raise NotImplementedError

    def select(self, index: Sequence[int] | np.ndarray[Any, Any]) -> NoReturn:
        raise NotImplementedError


class NegativesInHand(RowsInHand):
    """The same rows with what is no caption of theirs in the captions' place."""

    def __init__(self, rows: RowsInHand) -> None:
        self._of = rows

    def captions(self, index: int) -> list[str]:
        return list(self._of.rows[index].negatives)


class StreamedPairs(Dataset[Sample]):
    """What the loader asks for a batch: it gives the rows themselves.

    Args:
        pairs: makes samples of the rows in hand, as of any rows.
        rows: those that it reads.
    """

    def __init__(self, pairs: PairDataset, rows: RowsInHand) -> None:
        self._pairs = pairs
        self._rows = rows

    def __getitems__(self, rows: list[StreamedRow]) -> list[Sample]:
        """Return a sample for each row; for a broken one, that of the next good one.

        Raises:
            UserError: there is no good one.
        """
        self._rows.rows = {row.number: row for row in rows}
        made = [self._made(row) for row in rows]
        self._rows.rows = {}
        good = [place for place, sample in enumerate(made) if isinstance(sample, Sample)]
        if not good:
            # Rows from elsewhere would not be a function of the place in the stream.
            raise nothing_usable(
                [sample for sample in made if isinstance(sample, Broken)],
                hint=f"; of a stream, only the {len(made)} pairs of a rank's share of the batch "
                "stand in for one another, so that a larger data.batch_size helps",
            )
        return [_or_next_good(made, place, good) for place in range(len(made))]

    def _made(self, row: StreamedRow) -> Sample | Broken:
        try:
            return self._pairs.sample(row.number, row.epoch)
        except BrokenRowError as error:
            return Broken(row.row, row.key, error.reason, str(error), shard=row.shard)


def _or_next_good(made: list[Sample | Broken], place: int, good: list[int]) -> Sample:
    found = made[place]
    if isinstance(found, Sample):
        return found
    following = next((other for other in good if other > place), good[0])
    instead = made[following]
    assert isinstance(instead, Sample)
    return instead._replace(broken=[found])
