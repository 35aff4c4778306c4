"""From what a user typed to the shards of every split, without going through the rows.

Parquet and arrow files and tar shards are read where they lie; of other layouts, whose lists are in
memory anyway, blocks of rows are the shards. A data set of the hub is not downloaded first.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.data.layouts import open_layout
from clipkit.data.layouts.hub import declared_files
from clipkit.data.layouts.listing import (
    by_split,
    expand_braces,
    in_order,
    is_image,
    split_name,
    suffix,
    walk,
)
from clipkit.data.layouts.manifests import is_metadata
from clipkit.data.layouts.request import FileError, Request
from clipkit.data.layouts.shards import TarSource, choose_images, read_classes
from clipkit.data.layouts.tables import (
    TABLE_SUFFIXES,
    choose_image,
    features_of,
    holds_pictures,
    open_arrow,
    read_schema,
    saved_files,
)
from clipkit.data.progress import progress
from clipkit.data.rows import StoredRows, file_size
from clipkit.data.streaming.shards import (
    AT_A_TIME,
    PIECE,
    ArrowShard,
    HubShard,
    ParquetShard,
    Reading,
    RowsShard,
    Sample,
    Shard,
    TableChunk,
    TarShard,
    index_of,
    samples_of,
    tables_of,
)
from clipkit.errors import UserError, named

BLOCK_OF_ROWS = 256
"""Rows of a shard, where rows can be read in any order."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class StreamedData:
    """A data set as it is streamed.

    Attributes:
        path: what the user typed.
        name: the kind of it, in words.
        splits: the shards of each split; train, validation and test under these names, first.
        image_column: where pictures come from.
        caption_columns: where captions come from.
        fingerprint: hex digest of the names and sizes of its files.
    """

    path: str
    name: str
    splits: dict[str, list[Shard]]
    image_column: str
    caption_columns: list[str]
    fingerprint: str

    def split(self, name: str) -> list[Shard]:
        """The shards of a split.

        Raises:
            UserError: there is no such split.
        """
        name = name if name in self.splits else split_name(name)
        if name not in self.splits:
            raise UserError(
                f"data.dataset {self.path!r} has no split {name!r}; it has:"
                f" {', '.join(self.splits)}"
            )
        return self.splits[name]

    def describe(self) -> str:
        """One line: what it is, its columns, the shards of each split."""
        splits = ", ".join(
            f"{split} {len(shards):,} shard{'s' * (len(shards) != 1)}"
            for split, shards in self.splits.items()
        )
        captions = ", ".join(self.caption_columns)
        return f"{self.path}: {self.name}, streamed, caption column {captions}, {splits}"


def open_stream(
    path: str,
    *,
    image_column: str | None = None,
    caption_column: str | dict[str, float] | None = None,
    negative_column: str | None = None,
    caption_template: str = "a photo of a {}.",
    image_folder: str | None = None,
    cache_folder: str | None = None,
) -> StreamedData:
    """Recognises how a data set is kept, and what its shards are.

    Args:
        path: as `clipkit.data.layouts.open_layout` takes it.
        image_column: found by its name or type if None.
        caption_column: one, or several with weights; found by its name if None.
        negative_column: texts that are no captions of the picture.
        caption_template: makes a caption of a class's name.
        image_folder: what paths of pictures in tables are relative to.
        cache_folder: where the index of many tar shards is kept; the user's cache folder if None.

    Raises:
        UserError: the path does not exist, fits no layout, or has no pictures with captions.
    """
    request = Request(
        path=os.path.expanduser(path),
        image_column=image_column,
        caption_column=caption_column,
        negative_column=negative_column,
        caption_template=caption_template,
        image_folder=None if image_folder is None else os.path.expanduser(image_folder),
        cache_folder=cache_folder,
    )
    with request.telling():
        if _is_hub_id(request.path):
            return stream_of_hub(request, _load(request))
        found = _files(request)
        if found is not None:
            root, files = found
            streamed = _of_files(
                request, {s: [os.path.join(root, f) for f in fs] for s, fs in files.items()}
            )
            if streamed is not None:
                return streamed
    layout = open_layout(
        path,
        image_column=image_column,
        caption_column=caption_column,
        negative_column=negative_column,
        caption_template=caption_template,
        image_folder=image_folder,
        cache_folder=cache_folder,
    )
    return StreamedData(
        path=path,
        name=layout.name,
        splits={split: blocks_of(rows) for split, rows in layout.splits.items()},
        image_column=layout.image_column,
        caption_columns=layout.caption_columns,
        fingerprint=layout.fingerprint,
    )


def blocks_of(rows: StoredRows, size: int = BLOCK_OF_ROWS) -> list[Shard]:
    """Rows that can be read in any order as shards."""
    return [
        RowsShard(rows, start, min(size, len(rows) - start)) for start in range(0, len(rows), size)
    ]


# --- Files ---------------------------------------------------------------------------------------


def _files(request: Request) -> tuple[str, dict[str, list[str]]] | None:
    """A folder, and the files of each split in it; None where they are of other kinds."""
    path = request.path
    if os.path.isdir(path):
        files = saved_files(path) or declared_files(request, path) or _in_folder(path)
        root = path
    elif os.path.isfile(path):
        root, files = os.path.dirname(path), by_split([os.path.basename(path)])
    else:
        matches = [glob.glob(pattern) for pattern in expand_braces(path)]
        paths = sorted({os.path.abspath(file) for some in matches for file in some})
        # One folder that a pattern matches, and files that are missing, are for the layouts.
        if not all(matches) or not paths or any(map(os.path.isdir, paths)):
            return None
        root = os.path.commonpath([os.path.dirname(file) for file in paths])
        files = by_split([os.path.relpath(file, root) for file in paths])
    files = {split: names for split, names in files.items() if names}
    kinds = {suffix(name) for names in files.values() for name in names}
    is_tables = bool(kinds) and kinds <= TABLE_SUFFIXES
    return (root, files) if is_tables or kinds == {".tar"} else None


def _in_folder(root: str) -> dict[str, list[str]]:
    files = walk(root)
    if any(map(is_metadata, files)) and any(map(is_image, files)):
        return {}
    shards = [file for file in files if suffix(file) == ".tar"]
    # img2dataset writes a table of the same name beside every shard.
    described = {os.path.splitext(file)[0] for file in shards}
    tables = [file for file in files if suffix(file) in TABLE_SUFFIXES]
    tables = [file for file in tables if os.path.splitext(file)[0] not in described]
    if shards and any(map(is_image, files)):
        return {}  # the layouts say what to do about it
    return by_split(shards or tables) if shards or tables else {}


def _of_files(request: Request, files: dict[str, list[str]]) -> StreamedData | None:
    """Shards of tables or of tar files; None for tables of paths."""
    is_tar = suffix(next(iter(files.values()))[0]) == ".tar"
    files = in_order(files)
    model = files.get("train") or next(iter(files.values()))
    opened = _of_tars(request, model) if is_tar else _of_tables(request, model)
    if opened is None:
        return None
    shards_of, image_column, captions = opened
    number = sum(map(len, files.values()))
    kind = "tar shard" if is_tar else f"{suffix(model[0])[1:]} file"
    splits = {split: shards_of(paths) for split, paths in files.items()}
    return StreamedData(
        path=request.path,
        name=f"{number:,} {kind}{'s' * (number != 1)}",
        splits=splits,
        image_column=image_column,
        caption_columns=captions,
        fingerprint=_fingerprint(files),
    )


_Opened = tuple[Callable[[list[str]], list[Shard]], str, list[str]]


def _of_tables(request: Request, files: Sequence[str]) -> _Opened | None:
    file = _first_readable(files, read_schema)
    schema = read_schema(file)
    image_column = choose_image(request, schema)
    if not holds_pictures(schema.field(image_column).type):
        return None
    columns = [
        field.name
        for field in schema
        if field.name == image_column or not holds_pictures(field.type)
    ]
    features, folder = features_of(schema), request.pictures_beside(file)
    beginning = _head(file, columns)
    source = TableChunk(beginning, image_column, features, folder)
    reading = Reading(request, source)
    about = {
        "reading": reading, "image_column": image_column, "columns": columns,
        "features": features, "folder": folder,
    }  # fmt: skip

    def shards(paths: list[str]) -> list[Shard]:
        numbered = progress(paths, "listing files", len(paths), "file")
        return [shard for path in numbered for shard in _pieces(path, about)]

    return shards, image_column, reading.captions


def _pieces(file: str, about: dict[str, Any]) -> Iterator[Shard]:
    """The shards of a table's file; one that fails when it is read, where it cannot be read."""
    if suffix(file) != ".parquet":
        try:
            length = len(open_arrow(file))
        except (OSError, ValueError, pa.ArrowException):
            yield ArrowShard(file, 0, None, **about)
            return
        for start in range(0, length, PIECE):
            yield ArrowShard(file, start, min(PIECE, length - start), **about)
        return
    try:
        footer = pq.read_metadata(file)
        rows = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    except (OSError, ValueError, pa.ArrowException):
        yield ParquetShard(file, [], 0, None, **about)
        return
    groups: list[int] = []
    start = 0
    for group in range(len(rows)):
        groups.append(group)
        number = sum(rows[g] for g in groups)
        if number >= PIECE or (group == len(rows) - 1 and number):
            yield ParquetShard(file, groups, start, number, **about)
            groups, start = [], start + number


def _head(file: str, columns: list[str]) -> pa.Table:
    if suffix(file) != ".parquet":
        return open_arrow(file).select(columns).slice(0, AT_A_TIME)
    with pq.ParquetFile(file, pre_buffer=False) as opened:
        batches = list(islice(opened.iter_batches(AT_A_TIME, columns=columns), 1))
        schema = opened.schema_arrow
        schema = pa.schema([schema.field(name) for name in columns])
    return pa.Table.from_batches(batches, batches[0].schema if batches else schema)


def _of_tars(request: Request, files: Sequence[str]) -> _Opened:
    file = _first_readable(files, lambda path: next(samples_of(path)))
    beginning = _beginning(samples_of(file))
    if all(len(sample.fields) == 1 for sample in beginning):
        raise FileError(
            f"none of the first {len(beginning)} samples of {file!r} has a second file behind its "
            "first; in a stream the files of a sample must stand together, as tar --sort=name "
            "packs them (without data.streaming they may stand anywhere)"
        )
    images = choose_images(request, list(index_of(file, beginning).members))
    classes = read_classes(files[0])

    def read(samples: Sequence[Sample]) -> Reading:
        index = index_of(file, samples)
        there = [field for field in images if field in index.members]
        source = TarSource(index, there, classes)
        return Reading(request, source)

    reading = _from_the_first_sound([beginning, *([sample] for sample in beginning)], read)

    def shards(paths: list[str]) -> list[Shard]:
        return [
            TarShard(path, reading=reading, image_fields=images, classes=classes) for path in paths
        ]

    return shards, "/".join(images), reading.captions


def _beginning(values: Iterator[Any]) -> list[Any]:
    """The first values, as far as they can be read."""
    taken: list[Any] = []
    try:
        taken.extend(islice(values, AT_A_TIME))
    except FileError:
        if not taken:
            raise
    return taken


def _from_the_first_sound(
    some: Sequence[Sequence[Sample]], read: Callable[[Sequence[Sample]], Reading]
) -> Reading:
    """What is read of the first samples that can be; single ones may be broken."""
    first: Exception | None = None
    for samples in some:
        try:
            return read(samples)
        except (ValueError, IndexError) as error:
            first = first or error
    assert first is not None
    raise first


def _first_readable(files: Sequence[str], read: Callable[[str], object]) -> str:
    first: Exception | None = None
    for file in files:
        try:
            read(file)
        except (FileError, OSError, StopIteration) as error:
            first = first or error
        else:
            return file
    if isinstance(first, FileError):
        raise first
    raise FileError(f"none of {named(files)} holds anything that can be read") from first


def _fingerprint(files: dict[str, list[str]]) -> str:
    digest = blake2b(digest_size=16)
    for split, paths in files.items():
        for path in paths:
            digest.update(f"{split}:{os.path.basename(path)}/{file_size(path)};".encode())
    return digest.hexdigest()


# --- The hub -------------------------------------------------------------------------------------


def stream_of_hub(request: Request, loaded: dict[str, Any]) -> StreamedData:
    """Shards of what `datasets` streams.

    Args:
        request: what the user asked.
        loaded: an IterableDataset for each split.

    Raises:
        UserError: no pictures or captions in it.
    """
    loaded = in_order({split_name(name): dataset for name, dataset in loaded.items()})
    model = loaded.get("train") or next(iter(loaded.values()))
    try:
        beginning = next(tables_of(model))
    except Exception as error:  # its own class in three libraries
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise request.error(f"cannot be streamed ({reason})") from error
    image_column = choose_image(request, beginning.schema)
    if not holds_pictures(beginning.schema.field(image_column).type):
        raise request.error(
            f"column {image_column!r} holds paths, and the pictures themselves do not come with "
            "the stream; download the data set first, or leave out data.streaming"
        )
    features = model.features.to_dict() if model.features is not None else {}
    source = TableChunk(beginning, image_column, features, None)
    reading = Reading(request, source)
    splits: dict[str, list[Shard]] = {
        split: [
            HubShard(dataset, number, reading=reading, image_column=image_column, features=features)
            for number in range(dataset.num_shards)
        ]
        for split, dataset in loaded.items()
    }
    counts = {split: len(shards) for split, shards in splits.items()}
    return StreamedData(
        path=request.path,
        name="data set of the hub",
        splits=splits,
        image_column=image_column,
        caption_columns=reading.captions,
        fingerprint=blake2b(
            json.dumps([request.path, counts]).encode(), digest_size=16
        ).hexdigest(),
    )


def _is_hub_id(path: str) -> bool:
    # As the layouts tell them apart: a folder of the owner's name is meant, where there is one.
    first = path.split("/")[0]
    is_here = os.path.exists(path) or os.path.isdir(first)
    return bool(_HUB_ID.fullmatch(path)) and not is_here


def _load(request: Request) -> dict[str, Any]:
    import datasets

    try:
        loaded: dict[str, Any] = datasets.load_dataset(request.path, streaming=True)
    except Exception as error:  # offline, unknown, gated, broken: its own class in three libraries
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise request.error(
            f"is no path here, and the hub cannot give a data set of this id ({reason})"
        ) from error
    return loaded
