"""A pass through a stream as one rank reads it: windows of rows, each shuffled.

A window is a function of the data and (seed, pass, rank, number): read again, it is the same, so
that nothing of it has to be kept to go on within it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from clipkit.data.broken import CANNOT_BE_READ, WRONG_TYPE, BrokenRowError, finding_broken
from clipkit.data.filters import CaptionsLeft, RowFilters
from clipkit.data.identity import image_id
from clipkit.data.rows import Picture
from clipkit.data.streaming.dealing import ALL, Already, Read, Share
from clipkit.data.streaming.shards import Chunk, Shard

SHARD_CANNOT_BE_READ = "shard cannot be read"
PAIRS_OF_A_ROW = 1 << 8
ROWS_OF_A_SHARD = 1 << 32


class StreamedRow(NamedTuple):
    """A pair on its way to a worker."""

    epoch: int
    number: int  # in the stream, whatever the order
    picture: Picture | None
    captions: list[str]
    key: str
    shard: str  # that a user can look the row up in
    row: int  # in it
    counts: np.ndarray | None = None  # how many captions each of several columns gave
    negatives: Sequence[str] = ()  # what is no caption of it
    fault: tuple[str, str] | None = None  # reason and detail


class Cursor(NamedTuple):
    """Where a rank stands in a pass, between two windows."""

    window: int = 0  # the number of the next one
    begun: int = 0  # shares that were begun
    open: tuple[tuple[int, int], ...] = ()  # of those not done: place, next row; in turn


class Window(NamedTuple):
    """Rows in their shuffled order, and where the stream stands before and after them."""

    start: Cursor
    end: Cursor
    rows: list[StreamedRow]


def rows_read(shares: Sequence[Share], cursor: Cursor) -> list[Read]:
    """What was read of some shares up to a cursor."""
    unfinished = dict(cursor.open)
    reads = [
        Read(*share, unfinished.get(place, ALL))
        for place, share in enumerate(shares[: cursor.begun])
    ]
    return [read for read in reads if read.until > 0]


class RankStream:
    """What one rank reads in one pass.

    Args:
        shards: of the whole stream.
        shares: what this rank reads of them, in order.
        already: rows of it that were read before.
        seed: of the order within windows: drawn from (*seed, number of the window).
        held_out: ids of pictures that are not trained.
        every_caption: whether each caption of a row makes a pair.
        filters: what a row has to be, as if there were no others.
        window_rows: rows of a window.
        window_bytes: what its pictures may take.
        open_shards: how many are read in turn.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shares: Sequence[Share],
        *,
        already: Already,
        seed: tuple[int, ...],
        held_out: frozenset[int],
        every_caption: bool,
        filters: RowFilters | None,
        window_rows: int,
        window_bytes: int,
        open_shards: int,
    ) -> None:
        self._shards = shards
        self._shares = shares
        self._already = already
        self._seed = seed
        self._held_out = held_out
        self._every_caption = every_caption
        self._filters = filters
        self._window_rows = window_rows
        self._window_bytes = window_bytes
        self._open_shards = open_shards

    def windows(self, cursor: Cursor) -> Iterator[Window]:
        """The windows from a cursor on."""
        turn = deque(self._opened(place, row) for place, row in cursor.open)
        begun = cursor.begun
        while True:
            rows: list[StreamedRow] = []
            taken = 0
            while len(rows) < self._window_rows and taken < self._window_bytes:
                while len(turn) < self._open_shards and begun < len(self._shares):
                    turn.append(self._opened(begun, 0))
                    begun += 1
                if not turn:
                    break
                share = turn.popleft()
                found = next(share.pairs, None)
                if found is None:
                    continue
                share.next_row, pairs = found
                rows += pairs
                taken += sum(len(p.picture) for p in pairs if isinstance(p.picture, bytes))
                turn.append(share)
            if not rows:
                return
            places = tuple((share.place, share.next_row) for share in turn)
            end = Cursor(cursor.window + 1, begun, places)
            draw = np.random.default_rng((*self._seed, cursor.window))
            yield Window(cursor, end, [rows[place] for place in draw.permutation(len(rows))])
            cursor = end

    def _opened(self, place: int, row: int) -> _OpenShare:
        return _OpenShare(place, row, self._pairs(self._shares[place], row))

    def _pairs(self, share: Share, first: int) -> Iterator[tuple[int, list[StreamedRow]]]:
        """The pairs of each row of a share, and the number of the row after it."""
        for row, made in self._rows(share, first):
            if self._held_out and made.fault is None and picture_id(made) in self._held_out:
                continue
            pairs = [made]
            if self._every_caption and len(made.captions) > 1:
                captions = made.captions[:PAIRS_OF_A_ROW]
                pairs = [
                    made._replace(number=made.number + which, captions=[caption])
                    for which, caption in enumerate(captions)
                ]
            yield row + 1, pairs

    def _rows(self, share: Share, first: int) -> Iterator[tuple[int, StreamedRow]]:
        """The rows of a share; where its shard cannot be read on, one that says so."""
        shard = self._shards[share.shard]
        failed = 0
        while True:
            try:
                for chunk in shard.chunks(first):
                    left = self._left(chunk)
                    for place in range(len(chunk)):
                        row = chunk.first + place
                        made = self._made(share, chunk, place, left)
                        first = row + 1  # what was handed out does not come again
                        if made is not None:
                            yield row, made
                    failed = 0
                return
            # Of whatever kind the libraries that read have.
            except Exception as error:
                failed += 1
                if failed < shard.attempts:
                    time.sleep(2.0**failed)
                    continue
                if share.part == 0 and not self._already.has(share.shard, first):
                    detail = f"{type(error).__name__}: {error}"
                    number = _number(share.shard, first)
                    fault = (SHARD_CANNOT_BE_READ, detail)
                    row = shard.start + first
                    told = StreamedRow(0, number, None, [], shard.name, shard.file, row)
                    yield first, told._replace(fault=fault)
                return

    def _left(self, chunk: Chunk) -> Sequence[CaptionsLeft | None] | None:
        """What filters leave of a chunk's rows; None where there is nothing to filter."""
        if self._filters is None or chunk.rows is None:
            return None
        return self._filters.left(chunk.rows)

    def _made(
        self, share: Share, chunk: Chunk, place: int, left: Sequence[CaptionsLeft | None] | None
    ) -> StreamedRow | None:
        """A row of a chunk; None where it is another rank's, was read before or is left out."""
        row = chunk.first + place
        kept = None if left is None else left[place]
        if not self._is_wanted(share, row) or (left is not None and kept is None):
            return None
        made = made_of(chunk, place, self._shards[share.shard], _number(share.shard, row))
        if kept is None or made.fault is not None:
            return made
        return made._replace(captions=kept.texts, counts=kept.counts)

    def _is_wanted(self, share: Share, row: int) -> bool:
        return row % share.of == share.part and not self._already.has(share.shard, row)


class _OpenShare:
    """A share that is being read."""

    def __init__(
        self, place: int, next_row: int, pairs: Iterator[tuple[int, list[StreamedRow]]]
    ) -> None:
        self.place = place
        self.next_row = next_row
        self.pairs = pairs


def made_of(chunk: Chunk, place: int, shard: Shard, number: int) -> StreamedRow:
    """A row of a chunk with its picture, or with what is wrong with it."""
    row = shard.row_of(chunk, place)
    made = StreamedRow(0, number, None, [], f"{shard.file}: row {row}", shard.file, row)
    try:
        if chunk.rows is None:
            assert chunk.fault is not None
            raise chunk.fault
        made = made._replace(key=chunk.rows.key(place) or made.key)
        with finding_broken():
            picture, captions = chunk.rows.image(place), chunk.rows.captions(place)
        negatives = chunk.rows.negatives()
        return made._replace(
            picture=picture,
            captions=captions,
            counts=chunk.rows.caption_counts(place),
            negatives=() if negatives is None else negatives.captions(place),
        )
    except BrokenRowError as error:
        return made._replace(fault=(error.reason, str(error)))
    except (ValueError, TypeError) as error:
        return made._replace(fault=(WRONG_TYPE, str(error)))
    # Of whatever kind the libraries that read have: it is this row's, and others are whole.
    except Exception as error:
        return made._replace(fault=(CANNOT_BE_READ, f"{type(error).__name__}: {error}"))


def picture_id(row: StreamedRow) -> int:
    """What tells pictures apart: what they hold, or the key of what is in a file of its own."""
    picture = row.picture
    name = row.key.encode("utf-8", "surrogateescape")
    return image_id(picture if isinstance(picture, bytes) else name)


def _number(shard: int, row: int) -> int:
    return (shard * ROWS_OF_A_SHARD + row) * PAIRS_OF_A_ROW
