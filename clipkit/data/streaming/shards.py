"""What a stream is read from: shards, whose rows are read in order, from any of them on.

A shard is what can be read by itself: a tar, some row groups of a parquet file, some rows of a
mapped arrow file, of a list, of a folder. Pictures are not decoded here.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.data.broken import WRONG_TYPE, BrokenRowError
from clipkit.data.layouts.columns import KEY_COLUMNS, find, readable
from clipkit.data.layouts.fields import arrow_of, locate
from clipkit.data.layouts.request import PictureFolder, Request
from clipkit.data.layouts.shards import TarSource
from clipkit.data.layouts.tables import class_names, open_arrow
from clipkit.data.layouts.tar_index import Samples
from clipkit.data.layouts.tar_members import members
from clipkit.data.layouts.texts import TextColumns, choose_texts, read_texts
from clipkit.data.picture_files import ImageDecodeError
from clipkit.data.rows import Picture, Source, StoredRows, file_size

AT_A_TIME = 64
"""Rows of a shard that are in memory beside those of a window."""

ATTEMPTS = 4
"""At reading what comes from afar."""

PIECE = 1024
"""Rows at least that make a shard, where files can be read in pieces."""


class Chunk(NamedTuple):
    """Some rows of a shard in a row, or one of which nothing can be made."""

    first: int  # the number of the first one within the shard
    rows: StoredRows | None
    fault: BrokenRowError | None = None

    def __len__(self) -> int:
        return 1 if self.rows is None else len(self.rows)


class Shard(ABC):
    """Rows that are read in order."""

    name: str
    file: str  # that a user can look its rows up in
    start = 0  # the row of the file that its first one is
    num_rows: int | None = None  # where it is known before they are read
    attempts = 1  # at reading on, after an error that another attempt may not have

    @abstractmethod
    def chunks(self, first: int) -> Iterator[Chunk]:
        """The rows from a row on.

        Raises:
            Exception: of whatever kind the library that reads has for what is wrong.
        """

    def row_of(self, chunk: Chunk, place: int) -> int:
        """The number in the file of a row of a chunk."""
        return self.start + chunk.first + place


class Reading:
    """What of a table's or a sample's fields makes a pair: one decision for all shards.

    Args:
        request: what the user asked.
        model: some rows, whose columns decide.

    Raises:
        UserError: they have no captions, or not those that were asked for.
    """

    def __init__(self, request: Request, model: Source) -> None:
        self._request = request
        self._texts = choose_texts(request, model)
        self.captions = self._texts.captions
        self.columns = list(model.columns)
        self.rows(model)  # so that a column that holds no text is refused here

    def rows(self, source: Source, names: pa.Array | None = None) -> StoredRows:
        """Pictures and columns as rows.

        Args:
            source: what was read.
            names: what the rows are called (N); found in the columns if None.

        Raises:
            UserError: the columns hold no captions.
        """
        keys = _keys(source) if names is None else names
        groups, negatives = self._texts
        present = TextColumns(
            [_present(source, group) for group in groups],
            None if negatives is None else _present(source, negatives),
        )
        texts = read_texts(self._request, source, present)
        return StoredRows(source, keys=keys, **texts._asdict())


def _present(source: Source, columns: Sequence[str]) -> list[str]:
    return [column for column in columns if locate(source, column) is not None]


class TableChunk(Source):
    """Some rows of a table that holds pictures, in memory.

    Args:
        table: the rows.
        image_column: byte strings, or structs with `bytes` and maybe `path`.
        features: what `datasets` wrote about the columns.
        folder: what paths kept with the pictures are relative to; they are addresses if None.
    """

    def __init__(
        self,
        table: pa.Table,
        image_column: str,
        features: dict[str, Any],
        folder: PictureFolder | None,
    ) -> None:
        self._images = table.column(image_column)
        self._table = _with_records(table.drop_columns([image_column]))
        self._features = features
        self._folder = folder
        self.columns = list(self._table.column_names)

    def __len__(self) -> int:
        return len(self._images)

    def image(self, position: int) -> Picture:
        value = self._images[position].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content:
            return bytes(content)
        path = self.path(position)
        if not path:
            raise ImageDecodeError("the row holds no picture", "no picture")
        return _download(path) if self._folder is None else self._folder.file(path)

    def path(self, position: int) -> str | None:
        """The path kept with a picture."""
        value = self._images[position].as_py() if pa.types.is_struct(self._images.type) else None
        path = (value or {}).get("path")
        return path if isinstance(path, str) else None

    def image_sizes(self, positions: np.ndarray) -> np.ndarray:
        pictures = (self.image(int(position)) for position in positions)
        sizes = (len(p) if isinstance(p, bytes) else file_size(str(p)) for p in pictures)
        return np.fromiter(sizes, np.int64, len(positions))

    def column(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name)

    def class_names(self, name: str) -> list[str] | None:
        return class_names(self._features, name)


class ParquetShard(Shard):
    """Some row groups of a parquet file; all of it where its footer cannot be read."""

    def __init__(
        self, file: str, groups: Sequence[int], start: int, num_rows: int | None, *,
        reading: Reading, image_column: str, columns: Sequence[str], features: dict[str, Any],
        folder: PictureFolder,
    ) -> None:  # fmt: skip
        self.name = file if not groups else f"{file}, row groups {groups[0]} to {groups[-1]}"
        self.file = file
        self.start = start
        self.num_rows = num_rows
        self._groups = list(groups)
        self._reading = reading
        self._image_column = image_column
        self._columns = list(columns)
        self._features = features
        self._folder = folder

    def chunks(self, first: int) -> Iterator[Chunk]:
        with pq.ParquetFile(self.file, pre_buffer=False) as opened:
            at, passed_over = 0, 0
            groups = self._groups or list(range(opened.num_row_groups))
            while passed_over < len(groups):
                num_rows = opened.metadata.row_group(groups[passed_over]).num_rows
                if at + num_rows > first:
                    break
                at, passed_over = at + num_rows, passed_over + 1
            batches = opened.iter_batches(
                AT_A_TIME,
                row_groups=groups[passed_over:],
                columns=self._columns,
                use_threads=False,
            )
            for batch in batches:
                table = pa.Table.from_batches([batch])
                skipped = max(first - at, 0)
                at += len(table)
                if skipped < len(table):
                    table = table.slice(skipped)
                    yield from _chunks(at - len(table), len(table), self._source(table))

    def _source(self, table: pa.Table) -> Callable[[int, int], StoredRows]:
        return lambda start, number: self._reading.rows(
            TableChunk(table.slice(start, number), self._image_column, self._features, self._folder)
        )


class ArrowShard(Shard):
    """Some rows of an arrow file, which is mapped."""

    def __init__(
        self, file: str, start: int, num_rows: int | None, *, reading: Reading,
        image_column: str, columns: Sequence[str], features: dict[str, Any], folder: PictureFolder,
    ) -> None:  # fmt: skip
        self.name = file if num_rows is None else f"{file}, rows {start} to {start + num_rows - 1}"
        self.file = file
        self.start = start
        self.num_rows = num_rows
        self._reading = reading
        self._image_column = image_column
        self._columns = list(columns)
        self._features = features
        self._folder = folder

    def chunks(self, first: int) -> Iterator[Chunk]:
        whole = open_arrow(self.file).select(self._columns)
        rows = whole.slice(self.start, self.num_rows)

        def source(start: int, number: int) -> StoredRows:
            table = rows.slice(start, number)
            table.validate(full=True)  # what is mapped may point anywhere, and text be no text
            return self._reading.rows(
                TableChunk(table, self._image_column, self._features, self._folder)
            )

        for start in range(first, len(rows), AT_A_TIME):
            number = min(AT_A_TIME, len(rows) - start)
            yield from _chunks(start, number, lambda at, n, start=start: source(start + at, n))  # type: ignore[misc]


class TarShard(Shard):
    """The samples of a tar: files in a row whose names agree up to the first dot.

    To read on from a sample, headers alone are read up to it.
    """

    def __init__(
        self, file: str, *, reading: Reading, image_fields: Sequence[str],
        classes: list[str] | None,
    ) -> None:  # fmt: skip
        self.name = self.file = file
        self._reading = reading
        self._image_fields = list(image_fields)
        self._classes = classes

    def chunks(self, first: int) -> Iterator[Chunk]:
        samples = islice(enumerate(samples_of(self.name)), first, None)
        while True:
            some, error = _taken(samples, AT_A_TIME)
            if some:
                start = some[0][0]
                found = [sample for _, sample in some]
                yield from _chunks(start, len(found), self._source(found))
            if error is not None:
                raise error
            if len(some) < AT_A_TIME:
                return

    def _source(self, samples: list[Sample]) -> Callable[[int, int], StoredRows]:
        def rows(start: int, number: int) -> StoredRows:
            index = index_of(self.name, samples[start : start + number])
            fields = [field for field in self._image_fields if field in index.members]
            if not fields:
                raise BrokenRowError(WRONG_TYPE, "the sample holds no picture")
            source = TarSource(index, fields, self._classes, self._reading.columns)
            return self._reading.rows(source, index.names)

        return rows


class RowsShard(Shard):
    """Some rows that can be read in any order."""

    def __init__(self, rows: StoredRows, start: int, num_rows: int) -> None:
        self.name = f"rows {start} to {start + num_rows - 1}"
        self.file = ""  # the data set itself
        self.num_rows = num_rows
        self._rows = rows.select(np.arange(start, start + num_rows))

    def chunks(self, first: int) -> Iterator[Chunk]:
        for start in range(first, len(self._rows), AT_A_TIME):
            places = np.arange(start, min(start + AT_A_TIME, len(self._rows)))
            yield Chunk(start, self._rows.select(places))

    def row_of(self, chunk: Chunk, place: int) -> int:
        assert chunk.rows is not None
        return chunk.rows.position(place)


class HubShard(Shard):
    """A shard of a data set that `datasets` streams.

    Args:
        dataset: an IterableDataset.
        number: of the shard.
        reading: what makes a pair.
        image_column: where pictures stand.
        features: of its columns, as `datasets` writes them down.
    """

    attempts = ATTEMPTS

    def __init__(
        self, dataset: Any, number: int, *, reading: Reading, image_column: str,
        features: dict[str, Any],
    ) -> None:  # fmt: skip
        self.name = self.file = f"shard {number} of {dataset.num_shards}"
        self._dataset = dataset
        self._number = number
        self._reading = reading
        self._image_column = image_column
        self._features = features

    def chunks(self, first: int) -> Iterator[Chunk]:
        rows = self._dataset.shard(num_shards=self._dataset.num_shards, index=self._number)
        rows = rows.skip(first) if first else rows
        for table in tables_of(rows):
            yield from _chunks(first, len(table), self._source(table))
            first += len(table)

    def _source(self, table: pa.Table) -> Callable[[int, int], StoredRows]:
        return lambda start, number: self._reading.rows(
            TableChunk(table.slice(start, number), self._image_column, self._features, None)
        )


def tables_of(dataset: Any) -> Iterator[pa.Table]:
    """The rows of an IterableDataset, some at a time; pictures as they are kept.

    Row by row: where it makes tables itself, some of its formats differ from row to row.
    """
    rows = iter(dataset if dataset.features is None else dataset.decode(False))
    while some := list(islice(rows, AT_A_TIME)):
        names = dict.fromkeys(name for row in some for name in row)
        yield pa.table({name: _cells([row.get(name) for row in some]) for name in names})


def _cells(values: list[Any]) -> pa.Array:
    picture = {"bytes", "path"}
    if any(isinstance(value, dict) and value.keys() == picture for value in values):
        return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return arrow_of(values)


class Sample(NamedTuple):
    """A sample of a tar: its name and, for each field, offset and size."""

    name: str
    fields: dict[str, tuple[int, int]]


def samples_of(file: str) -> Iterator[Sample]:
    """The samples of a tar, in order.

    Raises:
        UserError: it is no tar, is compressed, cut off or damaged; up to there, samples come.
    """
    sample = Sample("", {})
    for path, offset, size in members(file):
        folder, base = os.path.split(path)
        name, _, field = base.partition(".")
        if not name or not field or "__MACOSX" in folder:
            continue
        name = readable(os.path.join(folder, name))
        if name != sample.name:
            if sample.fields:
                yield sample
            sample = Sample(name, {})
        sample.fields[field.lower()] = (offset, size)
    if sample.fields:
        yield sample


def index_of(file: str, samples: Sequence[Sample]) -> Samples:
    """Some samples of a tar as the index of it."""
    fields = dict.fromkeys(field for sample in samples for field in sample.fields)
    nowhere = (-1, -1)
    return Samples(
        [file],
        pa.array([sample.name for sample in samples], pa.large_string()),
        np.zeros(len(samples), np.int32),
        {
            field: np.array([sample.fields.get(field, nowhere) for sample in samples], np.int64)
            for field in fields
        },
    )


def _taken(values: Iterator[Any], number: int) -> tuple[list[Any], Exception | None]:
    """So many values, and the error that came before there were so many."""
    taken = []
    try:
        for value in islice(values, number):
            taken.append(value)
    except Exception as error:
        return taken, error
    return taken, None


def _chunks(first: int, number: int, rows: Callable[[int, int], StoredRows]) -> Iterator[Chunk]:
    """Rows that were read, as a chunk; where they do not make one, each by itself."""
    try:
        chunk = Chunk(first, rows(0, number))
    except (ValueError, TypeError, KeyError, OSError, BrokenRowError, pa.ArrowException) as error:
        if number == 1:
            reason = error.reason if isinstance(error, BrokenRowError) else WRONG_TYPE
            yield Chunk(first, None, BrokenRowError(reason, str(error)))
            return
        for place in range(number):
            yield from _chunks(first + place, 1, lambda _, n, place=place: rows(place, n))  # type: ignore[misc]
        return
    yield chunk


def _keys(source: Source) -> pa.Array:
    """What rows of a table are called: by the picture's path, else by a column such as `id`.

    Empty where they have no name.
    """
    keys: list[str | None] = [None] * len(source)
    if isinstance(source, TableChunk):
        keys = [source.path(position) for position in range(len(source))]
    for name in KEY_COLUMNS:
        column = find(source.columns, [name])
        if column is None or None not in keys:
            continue
        values = source.column(column).to_pylist()
        keys = [
            readable(str(value)) if key is None and isinstance(value, str | int) else key
            for key, value in zip(keys, values, strict=True)
        ]
    return pa.array([key or "" for key in keys], pa.string())


def _with_records(table: pa.Table) -> pa.Table:
    """The fields of the JSON that stands beside the pictures of a tar are columns of their own."""
    if "json" not in table.column_names or not pa.types.is_struct(table.column("json").type):
        return table
    records = table.column("json").combine_chunks()
    table = table.drop_columns(["json"])
    for place, field in enumerate(records.type):
        if field.name not in table.column_names:
            table = table.append_column(field.name, records.flatten()[place])
    return table


def _download(address: str) -> bytes:
    """A picture whose address alone a data set of the hub holds."""
    from datasets.utils.file_utils import xopen

    # What a stranger wrote down may not lead to a file here, nor anywhere but to the hub.
    if not address.rpartition("::")[2].startswith("hf://"):
        raise OSError(f"{address!r} is no address on the hub")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with xopen(address, "rb") as stream:
                content: bytes = stream.read()
            return content
        except FileNotFoundError:
            raise
        except Exception as error:  # a lost connection has its own class in three libraries
            if attempt == ATTEMPTS:
                raise OSError(f"{address!r}: {type(error).__name__}: {error}") from error
            time.sleep(2.0**attempt)
    raise AssertionError
