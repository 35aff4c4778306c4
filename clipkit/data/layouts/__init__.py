"""How people keep pictures with captions: a path in, rows of every split out.

A layout is recognised by what lies in a folder or by a file's name, in the order of `_recognise`.
Nothing is dropped unsaid: incomplete rows are an error, up to 1 % of them a note in the one line
that says what was recognised.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b

import pyarrow as pa

from clipkit.data.layouts.assembly import Found
from clipkit.data.layouts.folders import has_text_pairs, read_class_folders, read_text_pairs
from clipkit.data.layouts.hub import declared_files, read_hub
from clipkit.data.layouts.listing import by_split, expand_braces, is_image, split_name, suffix, walk
from clipkit.data.layouts.manifests import (
    MANIFEST_SUFFIXES,
    is_list,
    is_metadata,
    read_manifests,
    read_metadata,
)
from clipkit.data.layouts.request import ACCEPTED, Request
from clipkit.data.layouts.shards import read_shards
from clipkit.data.layouts.tables import TABLE_SUFFIXES, read_tables, saved_files
from clipkit.data.rows import StoredRows
from clipkit.errors import UserError, named

__all__ = ["Layout", "open_layout"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A data set as it was recognised.

    Attributes:
        name: the layout in words.
        splits: rows of each split; train, validation and test under these names, first.
        columns: names of the columns beside the picture, in the first split.
        image_column: the column, or the kind of file, that pictures come from.
        caption_columns: the columns that captions come from; none where none was needed.
        caption_template: what made captions of the names of classes, where they are these.
        notes: what was left out.
        revision: the commit, of a data set of the hub.
    """

    path: str
    name: str
    splits: dict[str, StoredRows]
    columns: list[str]
    image_column: str
    caption_columns: list[str]
    caption_template: str | None
    notes: list[str]
    revision: str | None = None
    option: str = "data.dataset"

    @property
    def caption_column(self) -> str | None:
        """The caption column's name; several are joined by commas."""
        return ", ".join(self.caption_columns) or None

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all rows (keys, captions, some pictures), whatever the layout."""
        digest = blake2b(digest_size=16)
        for name, rows in self.splits.items():
            digest.update(f"{name}:{rows.digest()};".encode())
            negatives = rows.negatives()
            if negatives is not None:
                digest.update(f"negatives:{negatives.digest()};".encode())
        return digest.hexdigest()

    def split(self, name: str) -> StoredRows:
        """The rows of a split, `val` and the like being understood.

        Raises:
            UserError: there is no such split.
        """
        name = name if name in self.splits else split_name(name)
        if name not in self.splits:
            raise UserError(
                f"{self.option} {self.path!r} has no split {name!r}; it has:"
                f" {', '.join(self.splits)}"
            )
        return self.splits[name]

    def describe(self) -> str:
        """One line: the layout, the pairs, the caption column, the splits, what was left out."""
        total = sum(map(len, self.splits.values()))
        splits = ", ".join(f"{name} {len(rows):,}" for name, rows in self.splits.items())
        captions = f"caption column {self.caption_column}" if self.caption_column else "no captions"
        if self.caption_template is not None:
            captions += f" as {self.caption_template!r}"
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{self.path}: {self.name}, {total:,} pairs, {captions}, splits {splits}{notes}"


def open_layout(
    path: str,
    *,
    image_column: str | None = None,
    caption_column: str | dict[str, float] | None = None,
    negative_column: str | None = None,
    caption_template: str = "a photo of a {}.",
    captions_required: bool = True,
    image_folder: str | None = None,
    cache_folder: str | None = None,
    option: str = "data.dataset",
) -> Layout:
    """Recognises how a data set is kept and opens it; no picture is decoded.

    Args:
        path: a folder, a file, a pattern (`shards-{000..003}.tar`, `data/*.parquet`), or the id
            of a data set on the hub.
        image_column: the column of pictures or of their paths; found by its name or type if None.
        caption_column: the column of captions, a pattern of several (`caption_*`), a field of JSON
            objects (`meta.caption`), or several such with weights; found by its name if None: see
            `clipkit.data.layouts.columns.CAPTION_COLUMNS`.
        negative_column: a column of texts that are no captions of the picture.
        caption_template: makes a caption of a class's name.
        captions_required: whether a data set without captions is refused.
        image_folder: what paths of pictures in lists and tables are relative to, and may not leave;
            the folder of the list if None.
        cache_folder: where the index of many tar shards is kept; the user's cache folder if None.
        option: the YAML key of the path, for messages.

    Raises:
        UserError: the path does not exist, fits no layout, or holds no complete pairs.
    """
    request = Request(
        path=os.path.expanduser(path),
        image_column=image_column,
        caption_column=caption_column,
        negative_column=negative_column,
        caption_template=caption_template,
        captions_required=captions_required,
        image_folder=None if image_folder is None else os.path.expanduser(image_folder),
        cache_folder=cache_folder,
        option=option,
    )
    with request.telling():
        found = _recognise(request)
    # Finding keys took several times what they take; workers would inherit it.
    pa.default_memory_pool().release_unused()
    return Layout(
        path=path,
        name=found.name,
        splits=found.splits,
        columns=next(iter(found.splits.values())).columns,
        image_column=found.image_column,
        caption_columns=found.caption_columns,
        caption_template=found.caption_template,
        notes=found.notes,
        revision=found.revision,
        option=option,
    )


def _recognise(request: Request) -> Found:
    path = request.path
    if os.path.isdir(path):
        return _read_folder(request)
    if os.path.isfile(path):
        root, name = os.path.split(path)
        return _read_splits(request, root, by_split([name]))
    if re.search(r"[*?\[{]", path):
        return _read_pattern(request)
    first = path.split("/")[0]
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) and not os.path.isdir(first):
        return read_hub(request)
    folder, name = os.path.split(path.rstrip("/"))
    beside = sorted(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else []
    close = [os.path.join(folder, other) for other in difflib.get_close_matches(name, beside)]
    raise request.error("does not exist" + (f"; close to it: {', '.join(close)}" if close else ""))


def _read_folder(request: Request) -> Found:
    root = request.path
    if (saved := saved_files(root)) is not None:
        return read_tables(request, root, saved, "folder saved by datasets")
    if (declared := declared_files(request, root)) is not None:
        here = {split: files for split, files in declared.items() if files}
        absent = [f"no files of split {split!r} are here" for split in declared.keys() - here]
        found = _read_splits(request, root, here)
        return replace(found, notes=found.notes + sorted(absent))
    files = walk(root)
    images = [file for file in files if is_image(file)]
    if images and any(map(is_metadata, files)):
        return read_metadata(request, root, files)
    shards = [file for file in files if suffix(file) == ".tar"]
    # img2dataset writes a table of the same name beside every shard.
    described = {os.path.splitext(file)[0] for file in shards}
    tables = [file for file in files if suffix(file) in TABLE_SUFFIXES]
    tables = [file for file in tables if os.path.splitext(file)[0] not in described]
    if shards and images:
        raise request.error(
            f"holds tar files ({named(shards)}) and pictures ({named(images)}); pass"
            f" {os.path.join(request.path, '*.tar')} to read the tar files, or move them away to"
            " read the pictures"
        )
    if shards or tables:
        found = _read_splits(request, root, by_split(shards or tables))
        loose = [f"pictures beside the tables are not read: {len(images):,}"] * bool(images)
        return replace(found, notes=found.notes + loose)
    if has_text_pairs(files):
        return read_text_pairs(request, root, files)
    if lists := [file for file in files if is_list(request, root, file)]:
        return _read_splits(request, root, by_split(lists))
    if images:
        return read_class_folders(request, root, images)
    kinds = Counter(suffix(file) or "without extension" for file in files)
    holds = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common(5)) or "no files"
    raise request.error(f"the folder fits no layout: it holds {holds}; {ACCEPTED}")


def _read_pattern(request: Request) -> Found:
    written = expand_braces(request.path)
    paths = [path for pattern in written for path in sorted(glob.glob(pattern)) or [pattern]]
    absent = [path for path in paths if not os.path.exists(path)]
    if len(absent) == len(paths):
        raise request.error(f"the pattern matches no file ({named(absent)})")
    if absent:
        raise request.error(
            f"{len(absent):,} of {len(paths):,} files are missing ({named(absent)})"
        )
    if len(paths) == 1 and os.path.isdir(paths[0]):
        return _read_folder(replace(request, path=paths[0]))
    common = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    files = [os.path.relpath(path, common) for path in paths]
    return _read_splits(request, common, by_split(files))


def _read_splits(request: Request, root: str, files: dict[str, list[str]]) -> Found:
    """Files of one kind, given for each split relative to a folder."""
    kinds = {suffix(file) for names in files.values() for file in names}
    if ".parquet" in kinds and kinds & {".arrow", ".feather"}:
        raise request.error(
            "holds both parquet and arrow files, maybe of the same pairs; pass those that are"
            f" meant, such as {os.path.join(request.path, '*.parquet')}"
        )
    if kinds <= TABLE_SUFFIXES:
        return read_tables(request, root, files, f"{'/'.join(sorted(k[1:] for k in kinds))} files")
    if kinds == {".tar"}:
        number = sum(map(len, files.values()))
        return read_shards(request, root, files, f"{number:,} tar shard{'s' * (number > 1)}")
    if kinds <= MANIFEST_SUFFIXES:
        names = named([name for part in files.values() for name in part])
        return read_manifests(request, root, files, f"pictures listed in {names}")
    raise request.error(f"files ending in {', '.join(sorted(kinds))} fit no layout; {ACCEPTED}")
