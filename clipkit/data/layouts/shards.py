"""Webdataset tar shards: members are listed once, then read by their place.

Every line of a sample's text is a caption, as beside a picture in a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipkit.data.layouts.assembly import Found, Part, assemble
from clipkit.data.layouts.columns import IMAGE_COLUMNS, class_words
from clipkit.data.layouts.fields import arrow_of, storable
from clipkit.data.layouts.listing import IMAGE_SUFFIXES, in_order, suffix
from clipkit.data.layouts.open_files import OpenFiles
from clipkit.data.layouts.request import FileError, Request
from clipkit.data.layouts.tar_index import Samples, list_samples
from clipkit.data.progress import progress
from clipkit.data.rows import BLOCK, Source, file_stamp
from clipkit.errors import named

# Names of the classes that `cls` counts, beside the shards or one folder above.
_CLASS_FILES = ("classnames.txt", "classes.txt")


class TarSource(Source):
    """Samples of tar files, read by seeking.

    Args:
        samples: where the fields of every sample are.
        image_fields: the fields that are pictures; the first one that a sample has counts.
        classes: names of the classes that the field `cls` counts.
        columns: the fields of the JSON objects; those of the first one if None.
    """

    def __init__(
        self,
        samples: Samples,
        image_fields: Sequence[str],
        classes: list[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> None:
        self._shards = OpenFiles(samples.shards)
        self._shard = samples.shard
        self._names = samples.names
        self._classes = classes
        self._at_hand: dict[str, pa.ChunkedArray] = {}
        # (N, 2): a picture may be .jpg here and .png there.
        self._images = samples.members[image_fields[0]]
        for field in image_fields[1:]:
            here = samples.members[field]
            self._images = np.where(self._images[:, 1:] < 0, here, self._images)
        self._members = {
            field: places
            for field, places in samples.members.items()
            if f".{field}" not in IMAGE_SUFFIXES and field not in image_fields
        }
        if "json" not in self._members:
            columns = ()
        elif columns is None:
            columns = [storable(name) for name in next(filter(None, self._records()), {})]
        self.columns = [field for field in self._members if field != "json"]
        self.columns += [name for name in columns if name not in self._members]
        self.objects = ["json"] if "json" in self._members else []

    def __len__(self) -> int:
        return len(self._shard)

    def image(self, position: int) -> bytes:
        return self._read(position, self._images[position])

    def image_sizes(self, positions: np.ndarray) -> np.ndarray:
        sizes: np.ndarray = self._images[positions, 1]
        return sizes

    def stamp(self) -> bytes:
        digest = blake2b(self._images.astype("<i8").tobytes(), digest_size=16)
        for shard in self._shards.paths:
            digest.update(file_stamp(shard))
        return digest.digest()

    @contextmanager
    def together(self, names: Sequence[str]) -> Iterator[None]:
        self._at_hand = self._of_records([name for name in names if self._is_of_records(name)])
        try:
            yield
        finally:
            self._at_hand = {}

    def column(self, name: str) -> pa.ChunkedArray:
        if self._is_of_records(name):
            at_hand = self._at_hand.get(name)
            return self._of_records([name])[name] if at_hand is None else at_hand
        texts = self._texts(name)
        if name == "cls" and pc.all(pc.match_substring_regex(texts, r"^\d{1,18}$")).as_py():
            return texts.cast(pa.int64())
        if pc.any(pc.match_substring_regex(texts, r"[\r\n]")).as_py():
            texts = pc.replace_substring(texts, "\r\n", "\n")
            return pc.split_pattern_regex(texts, r"[\r\n]")
        return texts

    def class_names(self, name: str) -> list[str] | None:
        return self._classes if name == "cls" else None

    def row_name(self, position: int) -> str:
        return str(self._names[position])

    def _is_of_records(self, name: str) -> bool:
        return name in self.columns and name not in self._members

    def _of_records(self, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
        """Fields of the JSON of every sample, which is parsed once for all of them."""
        cells: dict[str, list[Any]] = {name: [] for name in names}
        for record in self._records() if names else ():
            for name, values in cells.items():
                values.append(record.get(name))
        return {name: pa.chunked_array([arrow_of(values)]) for name, values in cells.items()}

    def _texts(self, name: str) -> pa.ChunkedArray:
        """The text of one field of every sample, without blanks around it."""
        field, blocks = self._field(name), []
        while block := list(islice(field, BLOCK)):
            blocks.append(
                pa.array([None if text is None else text.strip() for text in block], pa.string())
            )
        return pa.chunked_array(blocks, pa.string())

    def _field(self, name: str) -> Iterator[str | None]:
        """The text of one field of every sample."""
        places = self._members[name]
        rows = progress(range(len(self)), f"reading .{name}", len(self), "sample")
        for position in rows:
            if places[position, 1] < 0:
                yield None
                continue
            content = self._read(position, places[position])
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
            except (ValueError, RecursionError):  # also a number of thousands of digits
                record = None
            if not isinstance(record, dict):
                sample = f"{self.row_name(position)}.json"
                raise FileError(f"{sample} in {self._shard_of(position)!r} is no JSON object")
            yield record

    def _read(self, position: int, place: np.ndarray) -> bytes:
        return self._shards.read(int(self._shard[position]), int(place[0]), int(place[1]))

    def _shard_of(self, position: int) -> str:
        return self._shards.paths[int(self._shard[position])]


def read_shards(request: Request, root: str, files: dict[str, list[str]], name: str) -> Found:
    """Samples of tar files, given for each split relative to a folder.

    Raises:
        UserError: a file that is no tar, is compressed or cut off, or holds no pictures.
    """
    parts: dict[str, Part] = {}
    images: dict[str, None] = {}
    for split, names in in_order(files).items():
        shards = [os.path.join(root, path) for path in names]
        samples = list_samples(shards, request.cache_folder)
        image_fields = choose_images(request, list(samples.members))
        images |= dict.fromkeys(image_fields)
        source = TarSource(samples, image_fields, read_classes(shards[0]))
        parts[split] = Part(source, samples.keys())
    return assemble(request, parts, name=name, image_column="/".join(images))


def choose_images(request: Request, fields: list[str]) -> list[str]:
    """The fields that are pictures, the usual ones first.

    Raises:
        UserError: there is none, or not the one that was asked for.
    """
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


def read_classes(shard: str) -> list[str] | None:
    """The names of the classes that `cls` counts, where they stand beside a shard."""
    folder = os.path.dirname(os.path.abspath(shard))
    for place in (folder, os.path.dirname(folder)):
        for name in _CLASS_FILES:
            path = os.path.join(place, name)
            if os.path.isfile(path):
                try:
                    with open(path, encoding="utf-8") as stream:
                        return [class_words(line) for line in stream.read().splitlines() if line]
                except UnicodeDecodeError as error:
                    raise FileError(f"{path!r} is not UTF-8 text") from error
    return None
