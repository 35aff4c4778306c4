"""CLIP_benchmark's formats: its webdataset folders, its JSON of names and prompts, its results.

A folder is a directory here or a data set of the hub (`clip-benchmark/wds_flickr8k`):

    classnames.txt                          one a line; an empty line is an empty name
    zeroshot_classification_templates.txt   one a line, {c} for the name
    dataset_type.txt                        retrieval or multilabel; absent: classification
    test/nshards.txt, test/0.tar ...        pictures with .cls, .npy or .txt beside them

https://github.com/LAION-AI/CLIP_benchmark, whose `clip_benchmark build` reads what
`to_clip_benchmark` returns.
"""

from __future__ import annotations

import glob
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa

from clipkit.data.layouts.columns import keys_of_paths, lines_of
from clipkit.data.layouts.listing import split_name
from clipkit.data.layouts.request import FileError
from clipkit.data.layouts.shards import Samples, TarSource, list_samples
from clipkit.data.rows import FileSource, Rows, Source, StoredRows, named
from clipkit.errors import UserError
from clipkit.evaluation.prompts import Prompts, collect, expand, readable
from clipkit.suite.eval_data import EvalData

OWN = "own"
"""What `EvalData.templates` says to take those that lie in a CLIP_benchmark folder."""

Kind = Literal["classification", "multilabel", "retrieval"]

_FIELD: dict[Kind, str] = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
_IMAGE_FIELDS = ("webp", "png", "jpg", "jpeg")
_HUB_ID = re.compile(r"[\w.-]+/wds_[\w.-]+")
_REFERENCE = re.compile(r"([^{}]+\.(?:json|txt))(?:#(.+))?", re.IGNORECASE)


# --- Webdataset folders ------------------------------------------------------------------------


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

    def image_sizes(self) -> np.ndarray:
        return self._pictures.image_sizes()

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
    if not samples.names:
        raise UserError(f"split {split!r} is empty")
    field = _FIELD[kind]
    images = [name for name in _IMAGE_FIELDS if name in samples.members]
    if not images:
        raise UserError(f"no pictures (.{', .'.join(_IMAGE_FIELDS)}) in split {split!r}")
    pictures = TarSource(samples, images)
    _refuse_incomplete(samples, pictures.image_sizes(), "picture")
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
    shards = [os.path.join(root, folder, f"{place}.tar") for place in range(int(number))]
    if missing := [f"{folder}/{Path(shard).name}" for shard in shards if not os.path.isfile(shard)]:
        raise UserError(f"{len(missing)} of {number} shards are missing ({named(missing)})")
    return shards


def _lines(root: str, name: str) -> list[str] | None:
    """Return the lines of a file, stripped; an empty one counts, the last line's end does not."""
    path = os.path.join(root, name)
    return read_lines(path) if os.path.isfile(path) else None


def _refuse_incomplete(samples: Samples, sizes: np.ndarray, what: str) -> None:
    if len(lacking := np.flatnonzero(sizes < 0)):
        shown = named([samples.names[int(place)] for place in lacking[:4]])
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
            for position in np.flatnonzero(samples.shard == number):
                offset, size = (int(value) for value in places[position])
                stream.seek(offset)
                name = f"{samples.names[position]}.{field} in {os.path.basename(shard)}"
                yield _Field(name, stream.read(size))


def _captions(samples: Samples) -> Iterator[list[str]]:
    for field in _fields(samples, "txt"):
        if not field.text.strip():
            raise UserError(f"{field.name} is empty; a caption a line is needed")
        yield lines_of(field.text)


def _labels(samples: Samples, names: Sequence[str] | None) -> np.ndarray:
    labels = np.empty(len(samples.names), np.int64)
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


# --- SugarCrepe --------------------------------------------------------------------------------


def open_sugar_crepe(path: str, *, option: str = "data.path") -> StoredRows:
    """Open a JSON file of SugarCrepe; the captions of a row are the right one, then the wrong one.

    The file maps a number to `filename`, `caption`, `negative_caption`; the pictures lie in
    `val2017` beside it, or directly beside it.

    Raises:
        UserError: no such file, or a picture is missing.
    """
    try:
        entries = _read_json(path)
        parts: list[dict[str, str]] = list(entries.values()) if isinstance(entries, dict) else []
        wanted = ("filename", "caption", "negative_caption")
        if not parts or not all(
            isinstance(part, dict) and all(isinstance(part.get(key), str) for key in wanted)
            for part in parts
        ):
            raise UserError(f"is no list of {', '.join(wanted)} by number")
        folder = os.path.dirname(os.path.abspath(path))
        beside = os.path.join(folder, "val2017")
        root = beside if os.path.isdir(beside) else folder
        files = [part["filename"] for part in parts]
        missing = [file for file in files if not os.path.isfile(os.path.join(root, file))]
        if missing:
            raise UserError(f"{len(missing):,} pictures are not in {root} ({named(missing)})")
    except UserError as error:
        raise UserError(f"{option} {path!r}: {error}") from error
    captions = [[part["caption"], part["negative_caption"]] for part in parts]
    table = pa.table({"captions": pa.array(captions, pa.list_(pa.string()))})
    source = FileSource(root, files, table)
    return StoredRows(
        source, captions=table["captions"].combine_chunks(), keys=keys_of_paths(files)
    )


# --- Class names, templates and prompts --------------------------------------------------------


def is_reference(text: str) -> bool:
    """Whether a text names a file of class names or templates: FILE.txt, FILE.json, with #KEY."""
    return _REFERENCE.fullmatch(text) is not None


def read_reference(reference: str, *, folder: str = "", key: str = "") -> Any:
    """Read class names, templates or prompts from a file.

    Args:
        reference: `FILE.txt` (one a line), `FILE.json#KEY`, or `FILE.json`, which is whole a list,
            or has the given key.
        folder: what a relative path is relative to.
        key: looked up where the reference names none: the name of the data set.

    Returns:
        A list of texts, or, of class-specific prompts (CuPL), a list for each class name.

    Raises:
        UserError: no such file or key, or it holds something else.
    """
    match = _REFERENCE.fullmatch(reference)
    assert match is not None
    path = os.path.join(folder, os.path.expanduser(match[1]))
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path!r}")
    if path.lower().endswith(".txt"):
        return read_lines(path)
    held = _read_json(path)
    if isinstance(held, dict) and (match[2] or not _is_prompts(held) or key in held):
        wanted = match[2] or key
        if wanted not in held:
            close = get_close_matches(wanted, list(held), n=1)
            hint = f"did you mean {match[1]}#{close[0]}? " if close else ""
            raise UserError(
                f"{path!r} has no key {wanted!r}; {hint}it has: {named(list(held), 20)}"
            )
        held = held[wanted]
    elif match[2]:
        raise UserError(f"{path!r} has no keys, so no {match[2]!r}")
    if not _is_texts(held) and not _is_prompts(held):
        where = f"{path!r} at {match[2] or key!r}"
        raise UserError(f"{where} holds neither a list of texts nor prompts for each class")
    return held


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file, stripped; an empty one counts, the last line's end does not.

    Raises:
        UserError: it is no UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path!r} is not UTF-8 text") from error
    return [line.strip() for line in lines_of(text.removesuffix("\n"))] if text else []


def prompts_for(data: EvalData, class_names: Sequence[str]) -> Prompts:
    """Return the prompts of the classes: those written out for each, or filled templates.

    Raises:
        UserError: a class has no prompts, or a template no place for the name.
    """
    if data.prompts is None:
        return expand(class_names, data.templates)
    prompts = {readable(name): texts for name, texts in data.prompts.items()} | data.prompts
    spelled = [name if name in prompts else readable(name) for name in class_names]
    lacking = [name for name in spelled if not prompts.get(name)]
    if lacking:
        raise UserError(
            f"EvalData.prompts: {len(lacking)} of {len(class_names)} classes have no prompts "
            f"({named([repr(name) for name in lacking])})"
        )
    return collect(prompts[name] for name in spelled)


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            return json.load(stream)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path!r} is not JSON ({error})") from error
    except OSError as error:
        raise UserError(f"{path!r} cannot be read ({error.strerror})") from error


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_prompts(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_texts, value.values()))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# --- Results -----------------------------------------------------------------------------------

# Our metric to theirs. Their retrieval is named after what is retrieved; the rest of ours (ranks,
# recall, calibration, kNN) has no name there.
_CLASSIFICATION = {"top1": "acc1", "top5": "acc5", "mean_class_top1": "mean_per_class_recall"}
_PROBE = {ours: f"lp_{theirs}" for ours, theirs in _CLASSIFICATION.items()}
_NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "zeroshot": ("zeroshot_classification", _CLASSIFICATION),
    "multilabel": ("zeroshot_classification", {"map": "mean_average_precision"}),
    "retrieval": (
        "zeroshot_retrieval",
        {f"text_to_image_r{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)}
        | {f"image_to_text_r{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)},
    ),
    "probe": ("linear_probe", _PROBE),
    "fewshot": ("linear_probe", _PROBE),
    "winoground": (
        "image_caption_selection",
        {"image": "image_acc", "text": "text_acc", "group": "acc"},
    ),
    "sugarcrepe": ("image_caption_selection", {"accuracy": "text_acc"}),
}


def to_clip_benchmark(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what CLIP_benchmark would have written for each task of a result that it knows.

    One entry is one of its files: `clip_benchmark build` takes files of one entry each. Tasks it
    has no name for (kNN) are left out, and so are values that are no finite number.
    """
    model, pretrained = _model_name(result["model"])
    entries = []
    for task in result["tasks"]:
        kind, names = _NAMES.get(task["task"], ("", {}))
        metrics = {
            theirs: task["metrics"][ours]["value"]
            for ours, theirs in names.items()
            if _is_finite(task["metrics"].get(ours, {}).get("value"))
        }
        if task["task"] == "sugarcrepe" and metrics:
            metrics["acc"] = metrics["text_acc"]
        if task["task"] == "fewshot" and metrics and "shots" in task.get("arguments", {}):
            metrics["fewshot_k"] = task["arguments"]["shots"]
        if metrics:
            entries.append(
                {
                    "dataset": _dataset_name(task),
                    "model": model,
                    "pretrained": pretrained,
                    "task": kind,
                    "metrics": metrics,
                    "language": "en",
                }
            )
    return entries


def save_clip_benchmark(result: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write each entry of `to_clip_benchmark` to a file of its own and return the files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for entry in to_clip_benchmark(result):
        words = (entry[key] for key in ("dataset", "pretrained", "model", "language", "task"))
        stem = re.sub(r"[^\w.+-]+", "-", "_".join(words))
        same = sum(
            re.fullmatch(rf"{re.escape(stem)}(-\d+)?", path.stem) is not None for path in paths
        )
        path = Path(folder) / f"{stem}{f'-{same + 1}' if same else ''}.json"
        path.write_text(json.dumps(entry, allow_nan=False), encoding="utf-8")
        paths.append(path)
    return paths


def _model_name(model: Mapping[str, Any]) -> tuple[str, str]:
    spec, digest = str(model["spec"]), str(model.get("weights") or "")[:12]
    library, _, rest = spec.partition(":")
    name, _, tag = rest.partition("/")
    if library == "open_clip" and tag and not os.path.exists(rest):
        return name, tag
    return str(model.get("name") or spec), digest or spec


def _dataset_name(task: Mapping[str, Any]) -> str:
    name = str(task["set"])
    if match := re.fullmatch(r"[\w.-]+/wds_(.+)", str(task["data"].get("id"))):
        return "wds/" + re.sub(r"^vtab-", "vtab/", match[1])
    return f"sugar_crepe/{name}" if task["task"] == "sugarcrepe" else name


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
