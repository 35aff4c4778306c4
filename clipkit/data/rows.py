"""Rows of image-text pairs: random access, cheap in memory, picklable into workers.

A `Source` knows pictures and columns by position (a parquet table, files, tar shards); `Rows` adds
what a layout decided about them (captions, keys) and a selection. Nothing is decoded here.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from hashlib import blake2b
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from clipkit.data.progress import progress
from clipkit.errors import UserError, named

Picture = bytes | str | Image.Image

BLOCK = 1 << 16  # rows that are looked at together where all are
_SAMPLED = 32  # pictures that a digest reads


class Row(NamedTuple):
    """One pair: encoded bytes, a file's path or a drawn picture, its captions, and its key."""

    image: Picture
    captions: list[str]
    key: str


class Labels(NamedTuple):
    """A class per row, and the name of each class."""

    ids: np.ndarray  # (N,) int64
    names: list[str]
    are_words: bool = False  # the column holds names, not numbers


class Source(ABC):
    """Pictures and columns by position; a subclass pickles to what a worker needs to reopen it."""

    columns: list[str]
    objects: Sequence[str] = ()  # columns of JSON objects whose fields are columns themselves

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image(self, position: int) -> Picture:
        """The picture as it is kept: encoded bytes, or the path of its file."""

    @abstractmethod
    def image_sizes(self, positions: np.ndarray) -> np.ndarray:
        """Bytes of the encoded pictures of rows (K,) int64, -1 where there is none.

        Nothing is decoded, but where sizes do not stand beside the pictures, these are read.
        """

    def without_image(self) -> np.ndarray:
        """Positions (K,) of the rows that have no picture; as few pictures are read as may be."""
        return np.flatnonzero(self.image_sizes(np.arange(len(self))) <= 0)

    def images(self) -> Iterator[Picture]:
        """All pictures, in order."""
        return (self.image(position) for position in range(len(self)))

    @abstractmethod
    def column(self, name: str) -> pa.ChunkedArray:
        """One of `columns`, whole."""

    @contextmanager
    def together(self, names: Sequence[str]) -> Iterator[None]:
        """While it lasts, these columns are at hand; what holds several of them is read once."""
        yield

    def stamp(self) -> bytes | None:
        """Changes where a file that holds pictures is written again; None where there is none."""
        return None

    def class_names(self, name: str) -> list[str] | None:
        """Names of the classes that the integers of a column stand for."""
        return None

    def row_name(self, position: int) -> str:
        """What a message calls a row."""
        return f"row {position + 1}"


class FileSource(Source):
    """Pictures in files, with a table of the other columns.

    Args:
        root: the folder that the paths are relative to.
        paths: the file of each row (N).
        table: further columns (N rows).
        class_names: names of the classes that a column's integers stand for.
        numbers: the rows' numbers (N) in the list that named the files, for messages.
    """

    def __init__(
        self,
        root: str,
        paths: Sequence[str],
        table: pa.Table,
        *,
        class_names: dict[str, list[str]] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._root = os.path.abspath(root)  # a worker may run in another folder
        # Bytes, because a file's name need not be valid UTF-8.
        self._paths = pa.array([os.fsencode(path) for path in paths], pa.large_binary())
        self._table = table
        self._class_names = class_names or {}
        self._numbers = None if numbers is None else np.asarray(numbers, np.int64)
        self._sizes: np.ndarray | None = None
        self.columns = list(table.column_names)

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, position: int) -> str:
        return os.path.join(self._root, self._path(position))

    def image_sizes(self, positions: np.ndarray) -> np.ndarray:
        if self._sizes is None:
            rows = progress(range(len(self)), "looking for pictures", len(self), "picture")
            sizes = (file_size(self.image(position)) for position in rows)
            self._sizes = np.fromiter(sizes, np.int64, len(self))
        chosen: np.ndarray = self._sizes[positions]
        return chosen

    def stamp(self) -> bytes:
        digest = blake2b(digest_size=16)
        for position in range(len(self)):
            digest.update(file_stamp(self.image(position)))
        return digest.digest()

    def column(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name)

    def class_names(self, name: str) -> list[str] | None:
        return self._class_names.get(name)

    def row_name(self, position: int) -> str:
        path = self._path(position)
        return path if self._numbers is None else f"row {self._numbers[position]}: {path}"

    def _path(self, position: int) -> str:
        return os.fsdecode(self._paths[position].as_py())


class Rows(Sequence[Row], ABC):
    """A map-style sequence of pairs: a split, or a selection of one."""

    _index: np.ndarray | None  # where each row stands in the split; None for all of it

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return Row(self.image(index), self.captions(index), self.key(index))

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    @abstractmethod
    def image(self, index: int) -> Picture:
        """The picture of a row alone."""

    @abstractmethod
    def captions(self, index: int) -> list[str]:
        """The captions of a row alone: the picture is not read."""

    def caption_counts(self, index: int) -> np.ndarray | None:
        """How many of a row's captions (C,) each of several columns gave, in turn.

        None where it is all one which column a caption comes from.
        """
        return None

    def negatives(self) -> Rows | None:
        """The same rows with what is no caption of theirs in the captions' place."""
        return None

    @abstractmethod
    def key(self, index: int) -> str:
        """What identifies the picture of a row."""

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the columns beside the picture."""

    @abstractmethod
    def column(self, name: str) -> list[Any]:
        """The values of a column, row by row.

        Raises:
            UserError: there is no such column.
        """

    @abstractmethod
    def class_names(self, name: str) -> list[str] | None:
        """Names of the classes that the integers of a column stand for, where they are known.

        Raises:
            UserError: there is no such column.
        """

    @abstractmethod
    def select(self, index: Sequence[int] | np.ndarray) -> Rows:
        """The rows at these places, in this order; nothing is copied."""

    def keys(self) -> list[str]:
        """The key of every row."""
        return [self.key(index) for index in range(len(self))]

    def key_blocks(self) -> Iterator[pa.Array]:
        """The keys of every row, so many at a time that memory stays small."""
        for start in range(0, len(self), BLOCK):
            rows = range(start, min(start + BLOCK, len(self)))
            yield pa.array([self.key(row) for row in rows], pa.string())

    def caption_blocks(self) -> Iterator[pa.Array]:
        """The captions of every row, strings or lists of strings, as many at a time as the keys."""
        for start in range(0, len(self), BLOCK):
            rows = range(start, min(start + BLOCK, len(self)))
            yield pa.array([self.captions(row) for row in rows], pa.list_(pa.string()))

    def key_hashes(self) -> np.ndarray:
        """A hash of the key of every row (N,) uint64, which has no memory of layout or order."""
        hashes = np.empty(len(self), np.uint64)
        start = 0
        for block in self.key_blocks():
            digests = b"".join(map(_hash, block.to_pylist()))
            hashes[start : start + len(block)] = np.frombuffer(digests, ">u8")
            start += len(block)
        return hashes

    def all_captions(self) -> Iterator[list[str]]:
        """The captions of every row, without a picture being read."""
        return (self.captions(index) for index in range(len(self)))

    def labels(self, name: str) -> Labels:
        """The classes of a column.

        Whole numbers are classes as they stand, named by the data set or else by themselves; other
        values are numbered in their sorted order.

        Raises:
            UserError: there is no such column, a row of it is empty, or it holds no classes.
        """
        values, names = self.column(name), self.class_names(name)
        # By the whole column: a selection of its rows is numbered as all of them are.
        given = [value for value in self.unselected().column(name) if value is not None]
        if any(not isinstance(value, str | int) for value in given):
            raise UserError(f"column {name!r} holds neither names nor numbers of classes")
        # The cells of a csv file are text.
        are_words = any(isinstance(value, str) and not value.isdecimal() for value in given)
        if are_words:
            names = sorted({str(value) for value in given})
            place = {value: number for number, value in enumerate(names)}
            numbers = [-1 if value is None else place[str(value)] for value in values]
        else:
            numbers = [-1 if value is None else int(value) for value in values]
            names = names or [str(number) for number in range(max(map(int, given), default=-1) + 1)]
        empty = [row for row, number in enumerate(numbers) if not 0 <= number < len(names)]
        if empty:
            raise UserError(
                f"column {name!r} names no class in {len(empty):,} of {len(values):,} rows"
                f" ({named([f'row {row + 1}' for row in empty])})"
            )
        return Labels(np.array(numbers, np.int64), names, are_words)

    def digest(self) -> str:
        """Hex digest of all keys and captions, and of some pictures: equal for equal rows.

        Pictures are taken evenly from the rows, the same whatever the layout: to look at all would
        be to read the data set before the first step.
        """
        digest = blake2b(digest_size=16)
        for keys, captions in zip(self.key_blocks(), self.caption_blocks(), strict=True):
            _digest_strings(digest, keys)
            counts, texts = trimmed(captions)
            digest.update(counts.astype("<i4").tobytes())
            _digest_strings(digest, texts)
        for row in np.linspace(0, len(self) - 1, min(len(self), _SAMPLED)).astype(int).tolist():
            digest.update(self._picture_digest(row))
        return digest.hexdigest()

    def _picture_digest(self, index: int) -> bytes:
        """A digest of a stored picture's content; of a drawn one its key says all."""
        return b""

    def pictures_digest(self) -> str | None:
        """Hex digest that changes with the pictures; None where they are made, not read."""
        return None

    def unselected(self) -> Rows:
        """All the rows of which these were selected."""
        return self

    def position(self, index: int) -> int:
        """Where a row stands among all of which these were selected."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        return index if self._index is None else int(self._index[index])


class StoredRows(Rows):
    """Rows of a data set that somebody stored.

    Args:
        source: where pictures and further columns come from.
        captions: arrow array (N) of strings, or of lists of strings.
        keys: arrow array (N) of strings; the same picture has the same key.
        index: positions within the source that this selection consists of; None for all.
        counts: (N, C) how many captions of a row each of C columns gave, in turn.
        negatives: arrow array (N), as the captions, of what is no caption of a row's picture.
    """

    def __init__(
        self,
        source: Source,
        *,
        captions: pa.Array,
        keys: pa.Array,
        index: np.ndarray | None = None,
        counts: np.ndarray | None = None,
        negatives: pa.Array | None = None,
    ) -> None:
        self._source = source
        self._captions = captions
        self._keys = keys
        self._index = index
        self._counts = counts
        self._negatives = negatives
        self._hashes: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hashes": None}

    def __len__(self) -> int:
        return len(self._source) if self._index is None else len(self._index)

    def image(self, index: int) -> Picture:
        return self._source.image(self.position(index))

    def captions(self, index: int) -> list[str]:
        return caption_list(self._captions[self.position(index)].as_py())

    def caption_counts(self, index: int) -> np.ndarray | None:
        return None if self._counts is None else self._counts[self.position(index)]

    def negatives(self) -> StoredRows | None:
        if self._negatives is None:
            return None
        return self._with(_captions=self._negatives, _counts=None, _negatives=None)

    def key(self, index: int) -> str:
        return str(self._keys[self.position(index)].as_py())

    def keys(self) -> list[str]:
        keys: list[str] = self._taken(self._keys).to_pylist()
        return keys

    def key_blocks(self) -> Iterator[pa.Array]:
        return self._blocks(self._keys)

    def key_hashes(self) -> np.ndarray:
        if self._hashes is None:
            self._hashes = super().key_hashes()
        return self._hashes

    def caption_blocks(self) -> Iterator[pa.Array]:
        return self._blocks(self._captions)

    def all_captions(self) -> Iterator[list[str]]:
        for block in self.caption_blocks():
            yield from map(caption_list, block.to_pylist())

    @property
    def columns(self) -> list[str]:
        return list(self._source.columns)

    def column(self, name: str) -> list[Any]:
        values: list[Any] = self.cells(name).to_pylist()
        return values

    def class_names(self, name: str) -> list[str] | None:
        self._check(name)
        return self._source.class_names(name)

    def unselected(self) -> StoredRows:
        return self._with(_index=None)

    def select(self, index: Sequence[int] | np.ndarray) -> StoredRows:
        places = np.asarray(index, np.int64)
        if self._index is not None:
            places = self._index[places]
        return self._with(_index=places)

    def with_captions(self, captions: Sequence[list[str]]) -> StoredRows:
        """The same rows with other captions, one list a row."""
        everywhere: list[list[str] | None] = [None] * len(self._source)
        for index, texts in enumerate(captions):
            everywhere[self.position(index)] = texts
        array = pa.array(everywhere, pa.list_(pa.string()))
        return self._with(_captions=array, _counts=None)

    def fitting(self, fits: Callable[[pa.Array], np.ndarray]) -> StoredRows:
        """The same rows without the captions that do not fit; some may be left without any.

        Args:
            fits: texts (K) to which of them do (K,) bool.
        """
        blocks, counts = [], []
        for start in range(0, max(len(self._captions), 1), BLOCK):
            number, texts = trimmed(self._captions.slice(start, BLOCK))
            fit = fits(texts)
            blocks.append(_lists_of(texts.filter(pa.array(fit)), _regrouped(fit, number)))
            if self._counts is not None:
                by_column = self._counts[start : start + BLOCK]
                counts.append(_regrouped(fit, by_column.ravel()).reshape(by_column.shape))
        return self._with(
            _captions=pa.concat_arrays(blocks),
            _counts=np.concatenate(counts) if counts else None,
        )

    def have_captions(self) -> np.ndarray:
        """Which rows (N,) have any caption."""
        counts = [trimmed(block)[0] for block in self.caption_blocks()]
        return np.concatenate(counts) > 0 if counts else np.zeros(0, bool)

    def cells(self, name: str) -> pa.ChunkedArray:
        """The values of a column as they are kept (N).

        Raises:
            UserError: there is no such column.
        """
        self._check(name)
        return self._taken(self._source.column(name))

    def together(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """While it lasts, these columns are at hand; what holds several of them is read once."""
        return self._source.together(names)

    def _with(self, **changed: Any) -> StoredRows:
        rows = copy(self)
        rows.__dict__.update(changed, _hashes=None)
        return rows

    def image_files(self) -> list[str]:
        """The files of the pictures, where each is a file."""
        images = (self.image(index) for index in range(len(self)))
        return [image for image in images if isinstance(image, str)]

    def _picture_digest(self, index: int) -> bytes:
        try:
            picture = self.image(index)
            if isinstance(picture, str):
                with open(picture, "rb") as stream:
                    picture = stream.read()
        except OSError:
            return b"-"
        content = picture.tobytes() if isinstance(picture, Image.Image) else picture
        return blake2b(content, digest_size=16).digest()

    def pictures_digest(self) -> str | None:
        stamp = self._source.stamp()
        if stamp is None:
            return None
        digest = blake2b(stamp, digest_size=16)
        digest.update(b"all" if self._index is None else self._index.astype("<i8").tobytes())
        return digest.hexdigest()

    def _taken(self, values: pa.ChunkedArray) -> pa.ChunkedArray:
        return values if self._index is None else values.take(pa.array(self._index))

    def _blocks(self, values: pa.Array | pa.ChunkedArray) -> Iterator[pa.Array]:
        for start in range(0, len(self), BLOCK):
            if self._index is None:
                block = values.slice(start, BLOCK)
            else:
                block = values.take(pa.array(self._index[start : start + BLOCK]))
            yield block.combine_chunks() if isinstance(block, pa.ChunkedArray) else block

    def _check(self, name: str) -> None:
        if name not in self._source.columns:
            columns = ", ".join(self._source.columns) or "none"
            raise UserError(f"there is no column {name!r}; the columns are: {columns}")


def hold_out(rows: Rows, *, ratio: float = 0.05, maximum: int = 1000) -> tuple[Rows, Rows]:
    """Divides rows into (train, validation) by a hash of their keys.

    A picture is on one side only, however many rows show it, and the sides do not depend on the
    layout or the order of the rows: validation is the pictures of the smallest hashes.

    Raises:
        UserError: fewer than two pictures.
    """
    hashes = rows.key_hashes()
    pictures = np.unique(hashes)
    if len(pictures) < 2:
        raise UserError(
            f"{len(rows)} pairs of {len(pictures)} picture cannot be divided into train and"
            " validation; at least two pictures are needed"
        )
    number = min(maximum, max(1, round(ratio * len(pictures))), len(pictures) - 1)
    held = hashes <= pictures[number - 1]
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def group_by_picture(rows: Rows) -> Rows:
    """One row a picture with the captions of all its rows, as retrieval counts them.

    Columns keep the value of a picture's first row, and so does the order.
    """
    if len(set(rows.keys())) == len(rows):
        return rows
    assert isinstance(rows, StoredRows)  # drawn pictures are never drawn twice
    first: dict[str, int] = {}
    captions: dict[str, list[str]] = defaultdict(list)
    for place, (key, texts) in enumerate(zip(rows.keys(), rows.all_captions(), strict=True)):
        first.setdefault(key, place)
        captions[key] += texts
    return rows.select(list(first.values())).with_captions(list(captions.values()))


def caption_list(value: str | list[str | None] | None) -> list[str]:
    """A caption cell as a list: surrounding blanks and empty strings do not count."""
    texts = [value] if isinstance(value, str) else value or []
    return [text.strip() for text in texts if text is not None and text.strip()]


def trimmed(captions: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Captions as `caption_list` counts them: how many each row has (N,), and all in turn.

    Args:
        captions: strings, or lists of strings (N).
    """
    if is_list(captions.type):
        rows = pc.list_parent_indices(captions).to_numpy(zero_copy_only=False)
        texts = pc.list_flatten(captions)
    else:
        rows, texts = np.arange(len(captions)), captions
    texts = pc.utf8_trim_whitespace(texts)
    there = pc.fill_null(pc.greater(pc.binary_length(texts), 0), False)
    rows = rows[there.to_numpy(zero_copy_only=False)]
    return np.bincount(rows, minlength=len(captions)), texts.filter(there)


def _regrouped(kept: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many of each group (G,) are kept, of items (K,) that stand group by group."""
    group = np.repeat(np.arange(len(counts)), counts)
    return np.bincount(group[kept], minlength=len(counts)).astype(counts.dtype)


def _lists_of(texts: pa.Array, counts: np.ndarray) -> pa.Array:
    """Texts (K) as lists of so many each (N)."""
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), texts.cast(pa.string()))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column's cells are lists."""
    checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in checks)


def file_stamp(path: str) -> bytes:
    """Name, bytes and time of a file; its folder may be another."""
    name = os.fsencode(os.path.basename(path))
    try:
        found = os.stat(path)
    except OSError:
        return name + b"/-"
    return name + f"/{found.st_size}/{found.st_mtime_ns};".encode()


def file_size(path: str | bytes) -> int:
    """Bytes of a file, -1 where there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _hash(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _digest_strings(digest: Any, strings: pa.Array) -> None:
    """Adds the lengths and the bytes of some strings, which are none of them null."""
    strings = strings.cast(pa.large_binary())
    _, offsets, content = strings.buffers()
    first = strings.offset
    bounds = np.frombuffer(offsets, np.int64)[first : first + len(strings) + 1]
    digest.update(np.diff(bounds).astype("<i8").tobytes())
    if content is not None and len(strings):
        digest.update(content[int(bounds[0]) : int(bounds[-1])])
