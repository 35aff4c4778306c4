"""Byte strings of parquet files by their row: the page that holds a row is read, nothing else.

pyarrow reads whole row groups, of which one may be all of the file. Here the headers of a row
group's pages are read when a row of it is first asked for, and where the values of a page begin
when one of its rows is. From then on a row costs one small read where the page is not packed or
packed by snappy, otherwise the unpacking of its page.

A process keeps at most 192 MB of places (4 bytes a row and 1 byte in 16 kB of pictures), 64 MB of
unpacked pages, and 256 MB of row groups that only pyarrow can read, or one if it alone is larger.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.data.layouts.open_files import OpenFiles
from clipkit.data.layouts.parquet_footer import list_chunks
from clipkit.data.layouts.parquet_pages import DamagedPageError, Page, list_pages
from clipkit.data.layouts.parquet_values import read_hybrid, value_starts
from clipkit.data.layouts.recent import Recent
from clipkit.data.layouts.snappy_blocks import BLOCK, find_blocks, unpack_blocks, unpacked_size
from clipkit.data.progress import progress

log = logging.getLogger(__name__)

_PLACES, _UNPACKED, _ROW_GROUPS = 192 << 20, 64 << 20, 256 << 20  # bytes
_FEW = 1 << 15  # bytes of a page that is unpacked sooner than its blocks are found
_HARDLY_PACKED = 0.9  # share of its size that a page of pictures has left
_LARGE_PAGE = 8 << 20  # bytes of a page whose unpacking takes longer than decoding a picture
_MOST_VALUES = 1 << 24  # of a page; such a one is left to pyarrow

_PLAIN, _PLAIN_DICTIONARY, _RLE, _BIT_PACKED, _RLE_DICTIONARY = 0, 2, 3, 4, 8
_KNOWN_ENCODINGS = {_PLAIN, _PLAIN_DICTIONARY, _RLE, _BIT_PACKED, _RLE_DICTIONARY}
_CODECS = {0: None, 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


class BinaryColumn:
    """One column of byte strings of some parquet files; it pickles to where its pages are.

    Args:
        files: parquet files.
        column: the column's path within the schema, as `image.bytes`.

    Raises:
        OSError, pyarrow.ArrowException: a file cannot be read.
        DamagedPageError: a file has no such column of byte strings.
    """

    def __init__(self, files: Sequence[str], column: str) -> None:
        self._files = OpenFiles(files)
        self._column = column
        self._groups: list[_RowGroup] = []
        for number in range(len(self._files.paths)):
            try:
                self._groups += _row_groups(self._files, number, column)
            except DamagedPageError as error:
                raise DamagedPageError(f"{self._files.paths[number]!r}: {error}") from error
        self._first_rows = np.cumsum([0, *(group.num_rows for group in self._groups)])
        self._said_slow = False
        self._forget()
        self._say_what_is_slow()

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __getstate__(self) -> dict[str, Any]:
        memory = ("_pages", "_places", "_unpacked", "_fresh", "_whole_groups")
        return {name: value for name, value in self.__dict__.items() if name not in memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __getitem__(self, row: int) -> bytes | None:
        """The value of a row.

        Raises:
            OSError: the file is damaged there or cannot be read.
        """
        number, within = self._locate(row)
        if self._groups[number].unknown is None:
            try:
                places, at = self._places_of(number, within)
                return places.value(at)
            except _UnknownError as error:
                self._give_up(number, str(error))
            except (DamagedPageError, pa.ArrowException) as error:
                raise self._damaged(number, within, error) from error
        value: bytes | None = self._whole_group(number, within)[within].as_py()
        return value

    def null_rows(self) -> np.ndarray:
        """Which rows (K,) are null; only row groups that hold some are read.

        Raises:
            OSError: a file is damaged or cannot be read.
        """
        found = [np.zeros(0, np.int64)]
        for number, group in self._passing(range(len(self._groups)), "looking for pictures"):
            if group.num_nulls == group.num_rows:
                found.append(np.arange(group.num_rows) + self._first_rows[number])
            elif group.num_nulls != 0:
                nulls = np.flatnonzero(self._sizes_of_group(number) < 0)
                found.append(nulls + self._first_rows[number])
        return np.concatenate(found)

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of the values of some rows (K,) int64, -1 for null; their row groups are read.

        Raises:
            OSError: a file is damaged or cannot be read.
        """
        sizes = np.empty(len(rows), np.int64)
        groups = np.searchsorted(self._first_rows, rows, side="right") - 1
        for number, _ in self._passing(np.unique(groups).tolist(), "measuring pictures"):
            here = groups == number
            sizes[here] = self._sizes_of_group(number)[rows[here] - self._first_rows[number]]
        return sizes

    def __iter__(self) -> Iterator[bytes | None]:
        """All values, in order."""
        for number, _ in self._passing(range(len(self._groups)), "reading pictures"):
            with _naming_the_file(self._groups[number].file):
                for array in self._batches(number):
                    yield from (value.as_py() for value in array)

    # --- Rows to pages -----------------------------------------------------------------------

    def _locate(self, row: int) -> tuple[int, int]:
        """The number of a row's group, and the row's within it."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return number, row - int(self._first_rows[number])

    def _places_of(self, number: int, row: int) -> tuple[_Places, int]:
        """Where the values of the page of a row are, and the row's number in the page."""
        pages = self._pages.get(number, lambda: self._list_pages(number))
        which = int(np.searchsorted(pages.first_rows, row, side="right")) - 1
        places = self._places.get((number, which), lambda: self._read_places(number, which))
        return places, row - int(pages.first_rows[which])

    def _list_pages(self, number: int) -> _Pages:
        group = self._groups[number]

        def read(start: int, length: int) -> bytes:
            return self._files.read(group.file_number, start, length)

        pages = list_pages(read, group.start, group.end, group.num_rows)
        dictionary = pages.pop(0) if pages and pages[0].is_dictionary else None
        first_rows = np.cumsum([0, *(page.num_values for page in pages)])[:-1]
        return _Pages(pages, first_rows, dictionary)

    def _read_places(self, number: int, which: int) -> _Places:
        group = self._groups[number]
        pages = self._pages.get(number, lambda: self._list_pages(number))
        page = pages.pages[which]
        if page.num_values > _MOST_VALUES:
            raise _UnknownError(f"a page of {page.num_values:,} values")
        content, body = self._open(group, page)
        levels, values = _levels_and_values(group, page, content)
        place = None
        num_values = page.num_values
        if levels is not None and not levels.all():
            num_values = int(levels.sum())
            place = np.where(levels, np.cumsum(levels) - 1, -1).astype(np.int32)
        if page.encoding == _PLAIN:
            starts = value_starts(values, num_values)
            return _Places(_Strings(body, starts, len(content) - len(values)), place)
        if page.encoding not in (_RLE_DICTIONARY, _PLAIN_DICTIONARY):
            raise _UnknownError(f"encoding {page.encoding}")
        strings = self._dictionary(number, pages.dictionary)
        indices = read_hybrid(values[1:], values[0], num_values) if num_values else np.zeros(0, int)
        if num_values and not 0 <= indices.min() <= indices.max() < len(strings):
            raise DamagedPageError("it names values that its dictionary does not have")
        if place is not None:
            indices = np.where(place < 0, -1, np.append(indices, -1)[place])
        return _Places(strings, indices.astype(np.int32))

    def _dictionary(self, number: int, page: Page | None) -> _Strings:
        if page is None:
            raise DamagedPageError("it has no dictionary")
        if page.encoding not in (_PLAIN, _PLAIN_DICTIONARY):
            raise _UnknownError(f"a dictionary of encoding {page.encoding}")

        def read() -> _Places:
            content, body = self._open(self._groups[number], page)
            return _Places(_Strings(body, value_starts(content, page.num_values), 0), None)

        return self._places.get((number, "dictionary"), read).strings

    # --- Pages to bytes ----------------------------------------------------------------------

    def _open(self, group: _RowGroup, page: Page) -> tuple[memoryview, _Body]:
        """A page's content, unpacked, and what reads parts of it from now on."""
        packed = self._files.read(group.file_number, page.start, page.size)
        if page.checksum is not None and zlib.crc32(packed) != page.checksum:
            raise DamagedPageError("its checksum is another")
        levels_size = page.levels_size or 0
        start = page.start + levels_size
        if group.codec is None or not page.is_packed:
            if page.size != page.full_size:
                raise DamagedPageError("it has another size than it says")
            return memoryview(packed), _Stored(self._files, group.file_number, page.start)
        size = page.full_size - levels_size
        part = memoryview(packed)[levels_size:]
        content = _unpack(group.codec, part, size)
        body: _Body
        if group.codec == "snappy" and size > _FEW:
            body = _Snappy(self._files, group.file_number, start, size, levels_size, self._fresh)
            body.whole = _Packed(self._unpacked, self._files, group, page)
            self._fresh[:] = [(body, content)]
            if page.size > _HARDLY_PACKED * page.full_size:
                body.find(part)
        else:
            body = _Packed(self._unpacked, self._files, group, page)
            self._unpacked.get((group.file_number, page.start), lambda: content)
        if levels_size:
            return memoryview(packed[:levels_size] + content), body
        return memoryview(content).cast("B"), body  # pyarrow's are signed

    # --- What only pyarrow can read ----------------------------------------------------------

    def _whole_group(self, number: int, row: int) -> pa.ChunkedArray:
        try:
            return self._whole_groups.get(number, lambda: self._read_group(number))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(number, row, error) from error

    def _read_group(self, number: int) -> pa.ChunkedArray:
        arrays = list(self._batches(number))
        found = pa.chunked_array(arrays, None if arrays else pa.binary())
        if len(found) != self._groups[number].num_rows:
            raise pa.ArrowInvalid("it has another number of rows than was promised")
        return found

    def _batches(self, number: int) -> Iterator[pa.Array]:
        """The values of a row group by pyarrow, some at a time."""
        group = self._groups[number]
        with pq.ParquetFile(group.file) as file:
            # A whole row group may exceed what one array can address.
            for batch in file.iter_batches(
                256, row_groups=[group.ordinal], columns=[self._column], use_threads=False
            ):
                yield _leaf(batch.column(0))

    def _give_up(self, number: int, reason: str) -> None:
        group = self._groups[number]
        group.unknown = reason
        self._say_slow(group.file, reason)

    def _say_what_is_slow(self) -> None:
        for group in self._groups:
            if group.unknown:
                self._say_slow(group.file, group.unknown)
        large = [number for number, group in enumerate(self._groups) if group.num_rows]
        if not large or self._groups[large[0]].codec in (None, "snappy"):
            return
        group = self._groups[large[0]]
        try:
            pages = self._pages.get(large[0], lambda: self._list_pages(large[0]))
        except DamagedPageError:
            return  # to be said by who asks for its rows
        size = max(page.full_size for page in [*pages.pages, pages.dictionary] if page is not None)
        if size > _LARGE_PAGE:
            log.info(
                "data: %s packs up to %d MB a page with %s, which are unpacked for every row that"
                " is read at random; with snappy or without compression, rows are read one by one",
                group.file, size >> 20, group.codec,
            )  # fmt: skip

    def _say_slow(self, file: str, reason: str) -> None:
        if not self._said_slow:
            self._said_slow = True
            log.info(
                "data: %s is read by whole row groups, which is slower (%s); pictures written"
                " plainly, without compression or with snappy, are read one by one", file, reason,
            )  # fmt: skip

    # --- In passing --------------------------------------------------------------------------

    def _sizes_of_group(self, number: int) -> np.ndarray:
        group = self._groups[number]
        if group.unknown is None:
            row = 0
            try:
                pages = self._pages.get(number, lambda: self._list_pages(number))
                # Not kept: this goes through all pages, of which rows are not yet wanted.
                sizes = []
                for which, page in enumerate(pages.pages):
                    sizes.append(self._read_places(number, which).sizes(page.num_values))
                    row += page.num_values
                self._fresh.clear()
                return np.concatenate([np.zeros(0, np.int64), *sizes])
            except _UnknownError as error:
                self._give_up(number, str(error))
            except (DamagedPageError, pa.ArrowException) as error:
                raise self._damaged(number, row, error) from error
        lengths = pc.fill_null(pc.binary_length(self._whole_group(number, 0)), -1)
        measured: np.ndarray = lengths.to_numpy().astype(np.int64)
        return measured

    def _passing(self, groups: Sequence[int], what: str) -> Iterator[tuple[int, _RowGroup]]:
        for number in progress(groups, what, len(groups), "row group"):
            yield number, self._groups[number]

    def _damaged(self, number: int, row: int, error: Exception) -> OSError:
        group = self._groups[number]
        earlier = [other for other in self._groups[:number] if other.file == group.file]
        before = sum(other.num_rows for other in earlier)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return OSError(f"{group.file!r} is damaged at row {before + row + 1:,}: {reason}")

    def _forget(self) -> None:
        self._pages: Recent[_Pages] = Recent(_PLACES // 4, _Pages.num_bytes)
        self._places: Recent[_Places] = Recent(_PLACES // 4 * 3, _Places.num_bytes)
        self._unpacked: Recent[pa.Buffer] = Recent(_UNPACKED, len)
        self._fresh: list[tuple[_Snappy, pa.Buffer]] = []
        self._whole_groups: Recent[pa.ChunkedArray] = Recent(
            _ROW_GROUPS, lambda group: int(group.nbytes)
        )


class _UnknownError(Exception):
    """Nothing is wrong, but it takes pyarrow to read it; the message says what is unknown."""


@dataclass
class _RowGroup:
    """Where the column is in a row group."""

    file: str
    file_number: int
    ordinal: int  # within the file
    num_rows: int
    num_nulls: int | None  # None: not said
    start: int
    end: int
    deepest: int  # the level of definition of what is not null
    codec: str | None
    unknown: str | None  # why only pyarrow can read it


class _Pages(NamedTuple):
    """The pages of a row group, and the first row of each."""

    pages: list[Page]
    first_rows: np.ndarray
    dictionary: Page | None

    def num_bytes(self) -> int:
        return 400 * (len(self.pages) + 2)  # Python's objects, roughly


class _Body:
    """The unpacked content of a page, of which parts can be read."""

    num_bytes = 200

    def read(self, start: int, end: int) -> bytes:
        raise NotImplementedError


class _Stored(_Body):
    """Content that lies in the file as it is."""

    def __init__(self, files: OpenFiles, file: int, start: int) -> None:
        self._files, self._file, self._start = files, file, start

    def read(self, start: int, end: int) -> bytes:
        return self._files.read(self._file, self._start + start, end - start)


class _Snappy(_Body):
    """Content packed by snappy, mostly in blocks that can be unpacked alone.

    To look for the blocks in what compresses well takes longer than to unpack it, and where a
    training begins many pages are read for one row each; so it waits for a second one.
    """

    whole: _Packed

    def __init__(
        self, files: OpenFiles, file: int, start: int, size: int, levels: int, fresh: list[Any]
    ) -> None:
        self._files, self._file, self._start = files, file, start
        self._size, self._levels = size, levels
        self._fresh = fresh  # the content unpacked last, and whose it is
        self._blocks: np.ndarray | None = None
        self._searched = False
        self.num_bytes = 300 + size // BLOCK * 4

    def find(self, packed: memoryview) -> None:
        """Look where the blocks begin."""
        self._searched = True
        self._blocks = find_blocks(packed, self._size)

    def read(self, start: int, end: int) -> bytes:
        if self._fresh and self._fresh[0][0] is self:
            _, content = self._fresh.pop()
            return bytes(content[start - self._levels : end - self._levels])
        if not self._searched:
            length = self.whole.packed_size
            self.find(memoryview(self._files.read(self._file, self._start, length)))
        if self._blocks is None:
            return self.whole.read(start, end)
        start, end = start - self._levels, end - self._levels
        first, last = start // BLOCK, -(-end // BLOCK)
        place, stop = int(self._blocks[first]), int(self._blocks[last])
        size = min(last * BLOCK, self._size) - first * BLOCK
        packed = self._files.read(self._file, self._start + place, stop - place)
        part = unpack_blocks(packed, size)[start - first * BLOCK : end - first * BLOCK]
        return bytes(part)


class _Packed(_Body):
    """Content that has to be unpacked whole."""

    def __init__(
        self, unpacked: Recent[pa.Buffer], files: OpenFiles, group: _RowGroup, page: Page
    ) -> None:
        self._unpacked, self._files, self._group, self._page = unpacked, files, group, page
        self.packed_size = page.size - (page.levels_size or 0)

    def read(self, start: int, end: int) -> bytes:
        file, page = self._group.file_number, self._page
        levels = page.levels_size or 0

        def unpack() -> pa.Buffer:
            packed = self._files.read(file, page.start + levels, page.size - levels)
            assert self._group.codec is not None
            return _unpack(self._group.codec, memoryview(packed), page.full_size - levels)

        content = self._unpacked.get((file, page.start), unpack)
        return bytes(content[start - levels : end - levels])


class _Strings:
    """Byte strings within a page's content.

    Args:
        body: the content.
        starts: as `value_starts` gives them.
        before: bytes of the content before the first.
    """

    def __init__(self, body: _Body, starts: np.ndarray, before: int) -> None:
        self._body, self._starts, self._before = body, starts, before

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> bytes:
        start, end = int(self._starts[number]) + 4, int(self._starts[number + 1])
        return self._body.read(start + self._before, end + self._before) if end > start else b""

    def sizes(self) -> np.ndarray:
        return np.diff(self._starts.astype(np.int64)) - 4

    @property
    def num_bytes(self) -> int:
        return int(self._starts.nbytes) + self._body.num_bytes


class _Places(NamedTuple):
    """The values of a page's rows: which string each is, -1 for none; in their order if None."""

    strings: _Strings
    place: np.ndarray | None

    def value(self, row: int) -> bytes | None:
        number = row if self.place is None else int(self.place[row])
        return None if number < 0 else self.strings[number]

    def sizes(self, num_rows: int) -> np.ndarray:
        sizes = self.strings.sizes()
        if self.place is None:
            return sizes
        assert len(self.place) == num_rows
        of_rows: np.ndarray = np.append(sizes, -1)[self.place]
        return of_rows

    def num_bytes(self) -> int:
        return self.strings.num_bytes + (0 if self.place is None else int(self.place.nbytes))


def _row_groups(files: OpenFiles, number: int, column: str) -> Iterator[_RowGroup]:
    file = files.paths[number]
    with pq.ParquetFile(file) as opened:
        metadata = opened.metadata
        paths = [metadata.schema.column(at).path for at in range(metadata.num_columns)]
    if paths.count(column) != 1:
        raise DamagedPageError(f"it has no column {column!r}")
    place = paths.index(column)
    described = metadata.schema.column(place)
    if described.physical_type != "BYTE_ARRAY":
        raise DamagedPageError(f"column {column!r} holds no byte strings")
    if described.max_repetition_level:
        raise DamagedPageError(f"column {column!r} holds lists")
    deepest = described.max_definition_level
    size = files.size(number)
    chunks = list_chunks(lambda start, length: files.read(number, start, length), size, column)
    for ordinal, chunk in enumerate(chunks):
        unknown = [f"encoding {kind}" for kind in sorted(set(chunk.encodings) - _KNOWN_ENCODINGS)]
        if chunk.codec not in _CODECS:
            unknown.append(f"compression {chunk.codec}")
        if chunk.is_elsewhere:
            unknown.append("columns in other files or encrypted")
        yield _RowGroup(
            file=file,
            file_number=number,
            ordinal=ordinal,
            num_rows=chunk.num_rows,
            num_nulls=0 if deepest == 0 else chunk.num_nulls,
            start=chunk.start,
            end=size,
            deepest=deepest,
            codec=_CODECS.get(chunk.codec),
            unknown=", ".join(unknown) or None,
        )
        if chunk.num_values != chunk.num_rows:
            raise DamagedPageError("it has another number of values than of rows")


@contextmanager
def _naming_the_file(file: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise OSError(f"{file!r} is damaged: {str(error).splitlines()[0]}") from error


def _levels_and_values(
    group: _RowGroup, page: Page, content: memoryview
) -> tuple[np.ndarray | None, memoryview]:
    """Which rows are there (None: all), and the part of the content that holds their values."""
    size = page.levels_size
    if size is None and group.deepest == 0:
        return None, content
    if size is None:
        if len(content) < 4:
            raise DamagedPageError("it is shorter than its levels")
        size = int.from_bytes(content[:4], "little")
        encoded, values = content[4 : 4 + size], content[4 + size :]
        if len(encoded) < size:
            raise DamagedPageError("it is shorter than its levels")
    else:
        encoded, values = content[:size], content[size:]
    if group.deepest == 0:
        return None, values
    levels = read_hybrid(encoded, group.deepest.bit_length(), page.num_values)
    if len(levels) and levels.max() > group.deepest:
        raise DamagedPageError("a level is deeper than its schema")
    return levels == group.deepest, values


def _unpack(codec: str, packed: memoryview, size: int) -> pa.Buffer:
    if codec == "snappy" and unpacked_size(packed) != size:
        raise DamagedPageError("it has another size than it says")
    try:
        return pa.Codec(codec).decompress(packed, size) if size else pa.py_buffer(b"")
    except OSError as error:
        raise DamagedPageError(str(error)) from error


def _leaf(array: pa.Array) -> pa.Array:
    while pa.types.is_struct(array.type):
        array = array.flatten()[0]
    return array
