"""Webdataset folders: tar shards of pictures with labels, targets or captions beside them."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from clipkit.data.layouts.columns import lines_of
from clipkit.data.layouts.listing import split_name
from clipkit.data.layouts.request import FileError
from clipkit.data.layouts.shards import TarSource
from clipkit.data.layouts.tar_index import Samples, list_samples
from clipkit.data.rows import Rows, Source, StoredRows
from clipkit.errors import UserError, named
from clipkit.suite.clip_benchmark.names import read_lines
from clipkit.suite.eval_data import EvalData

OWN = "own"
"""What `EvalData.templates` says to take those that lie in a CLIP_benchmark folder."""

Kind = Literal["classification", "multilabel", "retrieval"]

_FIELD: dict[Kind, str] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
_IMAGE_FIELDS = ("webp", "png", "jpg", "jpeg")
_HUB_ID = re.compile(r"[\w.-]+/wds_[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Folder:
    """One split of a webdataset folder.

    Attributes:
        kind: what the pictures are labelled with.
        rows: their column `label` is a class's number (classification), their column `targets`
            lists 0 or 1 a class (multilabel); captions are the rows' own (retrieval).
        class_names: as they are written, empty ones too; None where there is no such file.
        templates: None where there is no such file.
        revision: the commit, where the folder is on the hub.
    """

    kind: Kind
    rows: StoredRows
    class_names: list[str] | None
    templates: list[str] | None
    revision: str | None

    def complete(self, data: EvalData) -> EvalData:
        """Return the data with the folder's own class names and templates, where it says so.

        Raises:
            UserError: the templates shall be the folder's own, but it has none.
        """
        if data.class_names is None and self.kind != "retrieval":
            data = replace(data, class_names=self.class_names)
        if data.templates != OWN or self.kind == "retrieval":
            return data
        if not self.templates:
            raise UserError(
                f"EvalData.templates: {data.path!r} has no zeroshot_classification_templates.txt; "
                "name templates, as 'a photo of a {}.'"
            )
        return replace(data, templates=self.templates)


def is_folder(path: str) -> bool:
    """Whether a path is a webdataset folder of CLIP_benchmark, here or on the hub."""
    if os.path.isdir(path):
        return bool(glob.glob(os.path.join(glob.escape(path), "*", "nshards.txt")))
    return _HUB_ID.fullmatch(path) is not None and not os.path.isdir(path.split("/")[0])


def open_folder(
    path: str, split: str, *, class_names: Sequence[str] | None = None, option: str = "data.path"
) -> Folder:
    """Open one split of a folder; no picture is decoded and nothing is unpickled.

    Args:
        path: a folder, or the id of one on the hub, of which only this split is downloaded.
        split: `test` or `train`, or whatever folders there are.
        class_names: instead of the folder's own.
        option: the YAML key of the path, for messages.

    Raises:
        UserError: no such split, a missing shard, a sample without its label, an unknown class.
    """
    try:
        root, revision = _fetch(os.path.expanduser(path), split)
        return _read_folder(root, split, revision, class_names)
    except UserError as error:
        raise UserError(f"{option} {path!r}: {error}") from error
    except OSError as error:
        raise UserError(f"{option} {path!r}: cannot be read ({error})") from error


def targets_of(rows: Rows) -> np.ndarray:
    """Return which classes the rows of a multilabel folder show; (N, C) bool."""
    return np.array(rows.column("targets"), bool)


class _LabelledSource(Source):
    """The pictures of tar shards with columns that were read from beside them."""

    def __init__(self, pictures: TarSource, table: pa.Table, names: list[str] | None) -> None:
        self._pictures = pictures
        self._table = table
        self._names = names
        self.columns = list(table.column_names)

    def __len__(self) -> int:
        return len(self._pictures)

    def image(self, position: int) -> bytes:
        return self._pictures.image(position)

    def image_sizes(self, positions: np.ndarray) -> np.ndarray:
        return self._pictures.image_sizes(positions)

    def column(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name)

    def class_names(self, name: str) -> list[str] | None:
        return self._names if name == "label" else None

    def row_name(self, position: int) -> str:
        return self._pictures.row_name(position)


def _fetch(path: str, split: str) -> tuple[str, str | None]:
    """Return where a folder lies and, if it came from the hub, its commit."""
    if os.path.isdir(path) or not _HUB_ID.fullmatch(path):
        return path, None
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # Without network the download tries for half a minute; a question fails at once.
        revision = huggingface_hub.HfApi().dataset_info(path, timeout=10).sha
        offline = False
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(f"the hub does not give this data set ({_first_line(error)})") from error
    except Exception:  # the HTTP client, and so its errors, differ between versions
        revision, offline = None, True  # what is in the cache is all there is
    wanted = ["*.txt", f"{split_name(split)}/*", f"{split}/*"]
    try:
        root = huggingface_hub.snapshot_download(
            path,
            repo_type="dataset",
            revision=revision,
            allow_patterns=wanted,
            local_files_only=offline,
        )
    except Exception as error:
        reason = "the hub cannot be reached, and the cache does not hold it" if offline else ""
        raise UserError(f"cannot be downloaded: {reason or _first_line(error)}") from error
    return root, os.path.basename(root)


def _read_folder(
    root: str, split: str, revision: str | None, class_names: Sequence[str] | None
) -> Folder:
    kind = _kind(root)
    samples = list_samples(_shards(root, split))
    if not len(samples):
        raise UserError(f"split {split!r} is empty")
    field = _FIELD[kind]
    images = [name for name in _IMAGE_FIELDS if name in samples.members]
    if not images:
        raise UserError(f"no pictures (.{', .'.join(_IMAGE_FIELDS)}) in split {split!r}")
    pictures = TarSource(samples, images)
    _refuse_incomplete(samples, pictures.image_sizes(np.arange(len(pictures))), "picture")
    if field not in samples.members:
        held = ", ".join(name for name in samples.members if name not in images) or "none"
        raise UserError(f"a {kind} set has .{field} beside its pictures, not {held}")
    _refuse_incomplete(samples, samples.members[field][:, 1], f".{field}")
    names = list(class_names) if class_names is not None else _lines(root, "classnames.txt")
    captions = pa.nulls(len(pictures), pa.string())
    columns: dict[str, Any] = {}
    if kind == "retrieval":
        captions = pa.array(list(_captions(samples)), pa.list_(pa.string()))
    elif kind == "multilabel":
        columns["targets"] = pa.array(list(_targets(samples, names)))
    else:
        columns["label"] = pa.array(_labels(samples, names))
    templates = _lines(root, "zeroshot_classification_templates.txt")
    source = _LabelledSource(pictures, pa.table(columns), names)
    return Folder(
        kind=kind,
        rows=StoredRows(source, captions=captions, keys=samples.keys()),
        class_names=names,
        templates=None if templates is None else [line for line in templates if line],
        revision=revision,
    )


def _kind(root: str) -> Kind:
    written = _lines(root, "dataset_type.txt")
    kind = " ".join(written or ["classification"]).lower()
    for known in _FIELD:
        if kind == known:
            return known
    raise UserError(f"dataset_type.txt says {kind!r}; known are {', '.join(_FIELD)}")


def _shards(root: str, split: str) -> list[str]:
    there = sorted(
        Path(path).parent.name for path in glob.glob(f"{glob.escape(root)}/*/nshards.txt")
    )
    folder = split if split in there else split_name(split)
    if folder not in there:
        raise UserError(f"has no split {split!r}; it has: {', '.join(there) or 'none'}")
    number = "".join(_lines(root, f"{folder}/nshards.txt") or [])
    if not re.fullmatch(r"[0-9]{1,6}", number) or int(number) == 0:
        raise UserError(f"{folder}/nshards.txt says {number!r}, not a number of shards")
    files = set(os.listdir(os.path.join(root, folder)))  # one look: the number may be any
    shards = [f"{place}.tar" for place in range(int(number))]
    if missing := [shard for shard in shards if shard not in files]:
        listed = named([f"{folder}/{shard}" for shard in missing])
        raise UserError(f"{len(missing)} of {number} shards are missing ({listed})")
    return [os.path.join(root, folder, shard) for shard in shards]


def _lines(root: str, name: str) -> list[str] | None:
    """Return the lines of a file, stripped; an empty one counts, the last line's end does not."""
    path = os.path.join(root, name)
    return read_lines(path) if os.path.isfile(path) else None


def _refuse_incomplete(samples: Samples, sizes: np.ndarray, what: str) -> None:
    if len(lacking := np.flatnonzero(sizes < 0)):
        shown = named([samples.name(int(place)) for place in lacking[:4]])
        raise UserError(f"{len(lacking):,} of {len(sizes):,} samples have no {what} ({shown})")


class _Field(NamedTuple):
    """What stands in one file of a sample, and what a message calls it."""

    name: str
    content: bytes

    @property
    def text(self) -> str:
        try:
            return self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise FileError(f"{self.name} is no text") from error


def _fields(samples: Samples, field: str) -> Iterator[_Field]:
    """Read one field of every sample, each shard opened once."""
    places = samples.members[field]
    for number, shard in enumerate(samples.shards):
        with open(shard, "rb") as stream:
            for position in np.flatnonzero(samples.shard == number).tolist():
                offset, size = (int(value) for value in places[position])
                stream.seek(offset)
                name = f"{samples.name(position)}.{field} in {os.path.basename(shard)}"
                yield _Field(name, stream.read(size))


def _captions(samples: Samples) -> Iterator[list[str]]:
    for field in _fields(samples, "txt"):
        if not field.text.strip():
            raise UserError(f"{field.name} is empty; a caption a line is needed")
        yield lines_of(field.text)


def _labels(samples: Samples, names: Sequence[str] | None) -> np.ndarray:
    labels = np.empty(len(samples), np.int64)
    for position, field in enumerate(_fields(samples, "cls")):
        text = field.text.strip()
        if not re.fullmatch(r"[0-9]{1,9}", text):
            raise UserError(f"{field.name} holds {text[:20]!r}, not the number of a class")
        labels[position] = int(text)
        if names is not None and labels[position] >= len(names):
            raise UserError(
                f"{field.name} holds class {text}, but there are {len(names)} class names; write "
                "class_names in the order of the labels"
            )
    return labels


def _targets(samples: Samples, names: Sequence[str] | None) -> Iterator[np.ndarray]:
    width = None if names is None else len(names)
    for field in _fields(samples, "npy"):
        try:
            # An array of objects would be unpickled, which could run anything.
            target = np.load(io.BytesIO(field.content), allow_pickle=False)
        except (ValueError, EOFError, MemoryError) as error:
            raise UserError(f"{field.name} is no array of numbers ({error})") from error
        width = len(target) if width is None and target.ndim == 1 else width
        if target.shape != (width,) or target.dtype.kind not in "biuf":
            raise UserError(
                f"{field.name} holds {target.dtype} of shape {target.shape}; a number for each of "
                f"the {width} classes is needed"
            )
        yield (target > 0).astype(np.int8)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
