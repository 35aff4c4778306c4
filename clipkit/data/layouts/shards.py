"""Webdataset tar shards: members are listed once, then read by seeking.

A sample is the files of one folder whose names agree up to the first dot. Every line of its text is
a caption, as beside a picture in a folder.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from clipkit.data.layouts.assembly import Found, Part, assemble
from clipkit.data.layouts.columns import (
    IMAGE_COLUMNS,
    arrow_of,
    class_words,
    lines_of,
    readable,
    stem,
)
from clipkit.data.layouts.listing import IMAGE_SUFFIXES, in_order, suffix
from clipkit.data.layouts.request import FileError, Request
from clipkit.data.rows import Source, file_stamp
from clipkit.errors import named

# Names of the classes that `cls` counts, beside the shards or one folder above.
_CLASS_FILES = ("classnames.txt", "classes.txt")
# gzip, bzip2, xz, zstandard
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"(\xb5/\xfd")


class TarSource(Source):
    """Samples of tar files, read by seeking.

    Args:
        samples: where the fields of every sample are.
        image_fields: the fields that are pictures; the first one that a sample has counts.
        classes: names of the classes that the field `cls` counts.
    """

    def __init__(
        self, samples: Samples, image_fields: Sequence[str], classes: list[str] | None = None
    ) -> None:
        self._shards = [os.path.abspath(path) for path in samples.shards]
        self._shard = samples.shard
        self._names = pa.array(samples.names, pa.string())
        self._classes = classes
        # (N, 2): a picture may be .jpg here and .png there.
        self._images = np.full((len(samples.names), 2), -1, np.int64)
        for field in reversed(image_fields):
            there = samples.members[field][:, 1] >= 0
            self._images[there] = samples.members[field][there]
        self._members = {
            field: places
            for field, places in samples.members.items()
            if f".{field}" not in IMAGE_SUFFIXES and field not in image_fields
        }
        record = next(filter(None, self._records()), {}) if "json" in self._members else {}
        self.columns = [field for field in self._members if field != "json"]
        self.columns += [name for name in record if name not in self._members]

    def __len__(self) -> int:
        return len(self._shard)

    def image(self, position: int) -> bytes:
        return self._read(position, self._images[position])

    def image_sizes(self) -> np.ndarray:
        return self._images[:, 1].copy()

    def stamp(self) -> bytes:
        digest = blake2b(self._images.astype("<i8").tobytes(), digest_size=16)
        for shard in self._shards:
            digest.update(file_stamp(shard))
        return digest.digest()

    def column(self, name: str) -> pa.ChunkedArray:
        if name not in self._members:
            return pa.chunked_array([arrow_of([record.get(name) for record in self._records()])])
        texts = [None if text is None else text.strip() for text in self._field(name)]
        if name == "cls" and all(text is None or text.isdecimal() for text in texts):
            return pa.chunked_array([pa.array([None if t is None else int(t) for t in texts])])
        if any(text is not None and "\n" in text for text in texts):
            lines = [None if text is None else lines_of(text) for text in texts]
            return pa.chunked_array([pa.array(lines, pa.list_(pa.string()))])
        return pa.chunked_array([pa.array(texts, pa.string())])

    def class_names(self, name: str) -> list[str] | None:
        return self._classes if name == "cls" else None

    def row_name(self, position: int) -> str:
        return str(self._names[position])

    def _field(self, name: str) -> Iterator[str | None]:
        """The text of one field of every sample."""
        for position, (_, size) in enumerate(self._members[name]):
            if size < 0:
                yield None
                continue
            content = self._read(position, self._members[name][position])
            try:
                yield content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                sample = f"{self.row_name(position)}.{name}"
                raise FileError(f"{sample} in {self._shard_of(position)!r} is no text") from error

    def _records(self) -> Iterator[dict[str, Any]]:
        """The JSON of every sample, empty where there is none."""
        for position, text in enumerate(self._field("json")):
            try:
                record = {} if text is None else json.loads(text)
            except json.JSONDecodeError:
                record = None
            if not isinstance(record, dict):
                sample = f"{self.row_name(position)}.json"
                raise FileError(f"{sample} in {self._shard_of(position)!r} is no JSON object")
            yield record

    def _read(self, position: int, place: np.ndarray) -> bytes:
        # Opened each time: a worker must not share a file's position with its parent, and
        # thousands of shards are more than a process may hold open.
        with open(self._shard_of(position), "rb") as stream:
            stream.seek(int(place[0]))
            return stream.read(int(place[1]))

    def _shard_of(self, position: int) -> str:
        return self._shards[int(self._shard[position])]


def read_shards(request: Request, root: str, files: dict[str, list[str]], name: str) -> Found:
    """Samples of tar files, given for each split relative to a folder.

    Raises:
        UserError: a file that is no tar, is compressed or cut off, or holds no pictures.
    """
    parts: dict[str, Part] = {}
    images: dict[str, None] = {}
    for split, names in in_order(files).items():
        shards = [os.path.join(root, path) for path in names]
        samples = list_samples(shards)
        image_fields = _choose_images(request, list(samples.members))
        images |= dict.fromkeys(image_fields)
        source = TarSource(samples, image_fields, _read_classes(shards[0]))
        parts[split] = Part(source, samples.keys())
    return assemble(request, parts, name=name, image_column="/".join(images))


@dataclass(frozen=True)
class Samples:
    """Where the fields of every sample are: the index of some tar files."""

    shards: list[str]
    names: list[str]  # (N), with folders
    shard: np.ndarray  # (N,) int64
    members: dict[str, np.ndarray]  # a field to offset and size (N, 2) int64; size -1: not there

    def keys(self) -> pa.Array:
        """A key for every sample: its name, with as much before it as makes it the only one."""
        short = [os.path.basename(name) for name in self.names]
        if len(set(short)) == len(short):
            return pa.array(short, pa.string())
        if len(set(self.names)) == len(self.names):
            return pa.array(self.names, pa.string())
        stems = [stem(shard) for shard in self.shards]
        pairs = zip(self.shard.tolist(), self.names, strict=True)
        return pa.array([f"{stems[shard]}/{name}" for shard, name in pairs], pa.string())


def list_samples(shards: Sequence[str]) -> Samples:
    """The samples of some tar files, in the order of their first members.

    Raises:
        UserError: a file that is no tar, is compressed or cut off, or repeats a member.
    """
    names: list[str] = []
    shard_of: list[int] = []
    places: dict[str, dict[int, tuple[int, int]]] = {}
    for number, shard in enumerate(shards):
        seen: dict[str, int] = {}
        for path, offset, size in _members(shard):
            folder, file = os.path.split(path)
            name, _, field = file.partition(".")
            if not name or not field or "__MACOSX" in folder:
                continue
            sample = readable(os.path.join(folder, name))
            if sample not in seen:
                seen[sample] = len(names)
                names.append(sample)
                shard_of.append(number)
            of_field = places.setdefault(field.lower(), {})
            if of_field.setdefault(seen[sample], (offset, size)) != (offset, size):
                raise FileError(f"{shard!r} holds {path!r} twice")
    members = {}
    for field, where in places.items():
        members[field] = np.full((len(names), 2), -1, np.int64)
        members[field][list(where)] = list(where.values())
    return Samples(list(shards), names, np.array(shard_of, np.int64), members)


def _members(file: str) -> Iterator[tuple[str, int, int]]:
    """Path, offset and size of every file within a tar."""
    try:
        with tarfile.open(file, "r:") as archive:
            while (member := archive.next()) is not None:
                if member.isfile():
                    yield member.name, member.offset_data, member.size
            end = archive.offset
        with open(file, "rb") as stream:
            stream.seek(end)
            # tarfile takes a damaged header for the end of the archive.
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"damaged after {end} bytes")
    except tarfile.TarError as error:
        with open(file, "rb") as stream:
            start = stream.read(4)
        reason = str(error)
        if start.startswith(_COMPRESSED):
            reason = "it is compressed, so that nothing can be read by its position; unpack it"
        raise FileError(f"{file!r} cannot be read as tar: {reason}") from error


def _choose_images(request: Request, fields: list[str]) -> list[str]:
    if request.image_column is not None:
        if request.image_column not in fields:
            raise request.no_column("image_column", fields)
        return [request.image_column]
    usual = [field for field in IMAGE_COLUMNS if field in fields]
    plain = [field for field in fields if f".{field}" in IMAGE_SUFFIXES]
    chosen = list(dict.fromkeys([*(field for field in usual if field in plain), *plain]))
    endings = [field for field in fields if suffix("_." + field) in IMAGE_SUFFIXES]
    if not chosen and len(endings) != 1:
        raise request.error(
            "no pictures were found in the tar files (a sample is NAME.jpg, .png or .webp and"
            f" NAME.txt); name the field with {request.key('image_column')}, one of:"
            f" {named(fields, 20) or 'none'}"
        )
    return chosen or endings


def _read_classes(shard: str) -> list[str] | None:
    folder = os.path.dirname(os.path.abspath(shard))
    for place in (folder, os.path.dirname(folder)):
        for name in _CLASS_FILES:
            path = os.path.join(place, name)
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as stream:
                    return [class_words(line) for line in stream.read().splitlines() if line]
    return None
