"""Folders of pictures: `name.jpg` beside `name.txt`, or one sub-folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from clipkit.data.layouts.assembly import MAX_INCOMPLETE_RATIO, Found, Part, assemble
from clipkit.data.layouts.columns import class_words, keys_of_paths, lines_of, readable
from clipkit.data.layouts.listing import in_order, is_image, is_split_name, split_name, suffix
from clipkit.data.layouts.request import ACCEPTED, Request
from clipkit.data.progress import progress
from clipkit.data.rows import FileSource
from clipkit.errors import named

TEXT_SUFFIXES = frozenset({".txt", ".caption"})
_ABOUT = ("readme", "license", "licence", "notice", "classes", "classnames", "labels", "credits")


def has_text_pairs(files: Sequence[str]) -> bool:
    """Whether any picture has a text file of its name beside it."""
    texts = _texts(files)
    return any(is_image(path) and _bare(path) in texts for path in files)


def read_text_pairs(request: Request, root: str, files: Sequence[str]) -> Found:
    """Pictures with a text file of the same name; every line is a caption.

    Raises:
        UserError: a picture without text, a text that is no UTF-8, many texts without a picture.
    """
    texts = _texts(files)
    images = [path for path in files if is_image(path)]
    lone = [path for path in images if _bare(path) not in texts]
    if lone:
        raise request.error(
            f"pictures without a text file of their name beside them: {len(lone):,} of"
            f" {len(images):,} ({named(lone)}); write the captions or take these pictures out"
        )
    bare, folders = {_bare(path) for path in images}, {os.path.dirname(path) for path in images}
    # Texts in folders without any picture are about something else.
    unused = [
        path
        for name, path in texts.items()
        if name not in bare and os.path.dirname(path) in folders
    ]
    note = f"text files without a picture of their name: {len(unused):,} ({named(unused)})"
    if len(unused) > MAX_INCOMPLETE_RATIO * len(images):
        raise request.error(f"{note}; add the pictures or take these texts out")
    parts = {}
    for split, paths in _divide(images)[0].items():
        listed = progress(paths, "reading captions", len(paths), "file")
        captions = [_lines(request, root, texts[_bare(path)]) for path in listed]
        table = pa.table({"txt": pa.array(captions, pa.list_(pa.string()))})
        parts[split] = Part(FileSource(root, paths, table), keys_of_paths(paths))
    found = assemble(request, parts, name="pictures beside text files", image_column="file")
    return replace(found, notes=found.notes + [note] * bool(unused))


def read_class_folders(request: Request, root: str, images: Sequence[str]) -> Found:
    """Pictures whose folder's name is their class; captions come from the template.

    Raises:
        UserError: pictures outside the folders of classes, or a single class.
    """
    splits, depth = _divide(images)
    outside = [path for path in images if len(path.split("/")) < depth + 2]
    if outside and len(outside) < len(images):
        raise request.error(
            f"pictures outside the folders of classes: {len(outside):,} of {len(images):,}"
            f" ({named(outside)}); nothing says what they show"
        )
    classes = sorted({_class_of(path) for path in images})
    if outside or len(classes) < 2:
        raise request.error(
            f"{len(images):,} pictures, but neither captions nor folders of classes beside them;"
            f" {ACCEPTED}"
        )
    number = {name: place for place, name in enumerate(classes)}
    parts = {}
    for split, paths in splits.items():
        table = pa.table({"label": pa.array([number[_class_of(path)] for path in paths])})
        source = FileSource(root, paths, table, class_names={"label": classes})
        parts[split] = Part(source, keys_of_paths(paths))
    return assemble(request, parts, name="one folder a class", image_column="file")


def _divide(images: Sequence[str]) -> tuple[dict[str, list[str]], int]:
    """The pictures of each split, and how many leading folders do not name a class.

    Splits are the first folders that differ, or the only one, if all have the names of splits.
    """
    parts = [path.split("/") for path in images]
    depth = 0
    while all(len(names) > depth + 1 for names in parts):
        folders = {names[depth] for names in parts}
        if all(map(is_split_name, folders)):
            splits: dict[str, list[str]] = {}
            for path, names in zip(images, parts, strict=True):
                splits.setdefault(split_name(names[depth]), []).append(path)
            return in_order(splits), depth + 1
        if len(folders) > 1:
            break
        depth += 1
    return {"train": list(images)}, depth


def _class_of(path: str) -> str:
    return class_words(readable(os.path.basename(os.path.dirname(path))))


def _bare(path: str) -> str:
    return readable(os.path.splitext(path)[0])


def _texts(files: Sequence[str]) -> dict[str, str]:
    """Text files that may be captions, by their path without extension."""
    texts = [path for path in files if suffix(path) in TEXT_SUFFIXES]
    return {_bare(path): path for path in texts if not _is_about(path)}


def _is_about(path: str) -> bool:
    stem = os.path.splitext(os.path.basename(path))[0].lower()
    return stem.split("-")[0].split("_")[0] in _ABOUT


def _lines(request: Request, root: str, path: str) -> list[str]:
    with open(os.path.join(root, path), "rb") as stream:
        content = stream.read()
    try:
        return lines_of(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise request.error(f"{path} is not UTF-8 text") from error
