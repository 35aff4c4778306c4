"""The first rows of a split, in memory: what evaluation sees of a stream."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from clipkit.data.layouts.fields import arrow_of
from clipkit.data.progress import progress
from clipkit.data.rows import Picture, Rows, Source, StoredRows
from clipkit.data.streaming.reading import StreamedRow, made_of, picture_id
from clipkit.data.streaming.shards import Chunk, Shard

HELD_OUT = 10
"""One of so many pictures is held out, of the first ones."""

_MOST_BYTES = 512 << 20


class MemorySource(Source):
    """Pictures and columns in memory."""

    def __init__(
        self, pictures: Sequence[Picture], table: pa.Table, class_names: dict[str, list[str]]
    ) -> None:
        self._pictures = list(pictures)
        self._table = table
        self._class_names = class_names
        self.columns = list(table.column_names)

    def __len__(self) -> int:
        return len(self._pictures)

    def image(self, position: int) -> Picture:
        return self._pictures[position]

    def image_sizes(self, positions: np.ndarray) -> np.ndarray:
        pictures = (self._pictures[int(position)] for position in positions)
        sizes = (len(p) if isinstance(p, bytes) else 1 for p in pictures)
        return np.fromiter(sizes, np.int64, len(positions))

    def column(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name)

    def class_names(self, name: str) -> list[str] | None:
        return self._class_names.get(name) or None


class _Kept(NamedTuple):
    """A row with all its columns."""

    made: StreamedRow
    columns: dict[str, Any]
    class_names: dict[str, list[str]]

    @property
    def size(self) -> int:
        return len(self.made.picture) if isinstance(self.made.picture, bytes) else 0


def head_of(
    shards: Sequence[Shard], maximum: int, *, but: frozenset[int] = frozenset()
) -> StoredRows:
    """The first rows of a split, in the order of its shards.

    Args:
        shards: of the split.
        maximum: how many rows.
        but: ids of pictures that are left out.
    """
    kept: list[_Kept] = []
    taken = 0
    for row in _rows(shards):
        if but and picture_id(row.made) in but:
            continue
        kept.append(row)
        taken += row.size
        if len(kept) >= maximum or taken >= _MOST_BYTES:
            break
    return _in_memory(kept)


def hold_out_of(shards: Sequence[Shard], maximum: int) -> tuple[StoredRows, frozenset[int]]:
    """Pairs of a split that are not trained, and the ids of their pictures.

    Of the first pictures, `HELD_OUT` times as many as are wanted, those of the smallest ids, which
    are hashes of what the pictures hold: fewer where these take much memory. Nothing else is kept
    from training.
    """
    smallest: list[tuple[int, int, _Kept]] = []  # a heap, the largest id first
    known: set[int] = set()
    taken = held = 0
    for number, row in enumerate(_rows(shards), start=1):
        taken += row.size
        found = picture_id(row.made)
        if found not in known:
            known.add(found)
            heapq.heappush(smallest, (-found, -number, row))
            held += row.size
            while len(smallest) > maximum or (held > _MOST_BYTES and len(smallest) > 1):
                held -= heapq.heappop(smallest)[-1].size
        if number >= HELD_OUT * maximum or taken >= HELD_OUT * _MOST_BYTES:
            break
    wanted = max(1, min(maximum, len(known) // HELD_OUT))
    chosen = heapq.nlargest(wanted, smallest)
    in_order = sorted(chosen, key=lambda entry: -entry[1])
    return _in_memory([row for _, _, row in in_order]), frozenset(-found for found, _, _ in chosen)


def _rows(shards: Sequence[Shard]) -> Iterator[_Kept]:
    return progress(_all_rows(shards), "reading the first pairs", None, "pair")


def _all_rows(shards: Sequence[Shard]) -> Iterator[_Kept]:
    for shard in shards:
        try:
            for chunk in shard.chunks(0):
                if chunk.rows is not None:
                    yield from _with_columns(chunk, chunk.rows, shard)
        # Of whatever kind; training counts it, and names the shard.
        except Exception:
            continue


def _with_columns(chunk: Chunk, rows: Rows, shard: Shard) -> Iterator[_Kept]:
    columns = {name: rows.column(name) for name in rows.columns}
    names = {name: rows.class_names(name) or [] for name in rows.columns}
    for place in range(len(rows)):
        made = made_of(chunk, place, shard, 0)
        if made.fault is None:
            yield _Kept(made, {name: cells[place] for name, cells in columns.items()}, names)


def _in_memory(kept: Sequence[_Kept]) -> StoredRows:
    names = list(dict.fromkeys(name for row in kept for name in row.columns))
    table = pa.table({name: arrow_of([row.columns.get(name) for row in kept]) for name in names})
    class_names = kept[0].class_names if kept else {}
    counts = [row.made.counts for row in kept if row.made.counts is not None]
    source = MemorySource([row.made.picture or b"" for row in kept], table, class_names)
    return StoredRows(
        source,
        captions=pa.array([row.made.captions for row in kept], pa.list_(pa.string())),
        keys=pa.array([row.made.key for row in kept], pa.string()),
        counts=np.stack(counts) if counts else None,
    )
