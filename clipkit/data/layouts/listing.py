"""Files under a path: pictures, their order, the split that a name stands for, brace patterns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import product
from typing import TypeVar

from clipkit.data.progress import progress

T = TypeVar("T")

IMAGE_SUFFIXES = frozenset(
    f".{kind}"
    for kinds in ("jpg jpeg jpe jfif png webp gif", "bmp tif tiff ppm pgm pbm pnm avif")
    for kind in kinds.split()
)
_CLUTTER = frozenset({"__macosx", "thumbs.db", "desktop.ini"})

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def suffix(path: str) -> str:
    """The extension in lower case, with its dot."""
    return os.path.splitext(path)[1].lower()


def is_image(path: str) -> bool:
    """Whether a file's name says that it is a picture."""
    return suffix(path) in IMAGE_SUFFIXES


def walk(root: str) -> list[str]:
    """Relative paths of the files under a folder, sorted; clutter and hidden names are skipped.

    A linked folder is entered where it leads out of the tree, once: links within the tree would
    count pictures twice and could turn in a circle.
    """
    top = os.path.realpath(root)
    entered = {top}

    def visit(folder: str, prefix: str) -> Iterator[str]:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in _CLUTTER:
                    continue
                name = prefix + entry.name
                if not os.path.isdir(entry.path):
                    if os.path.isfile(entry.path):  # False, not an error, for a link to itself
                        yield name
                    continue
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    outside = os.path.commonpath([target, top]) not in (target, top)
                    if not outside or target in entered:
                        continue
                    entered.add(target)
                yield from visit(entry.path, name + "/")

    found = progress(visit(root, ""), "listing files", None, "file")
    return sorted(found, key=lambda path: path.split("/"))


def split_name(name: str) -> str:
    """train, validation or test for the usual spellings; any other name as it is."""
    return _SPLITS.get(name.lower(), name)


def is_split_name(name: str) -> bool:
    """Whether a folder or file of this name is a split: the usual names, also with a suffix."""
    return re.split(r"[-_.]", name.lower())[0] in _SPLITS


def split_of_file(path: str) -> str:
    """The split of a file in a data set of several, by its own name, else by its folders'.

    `train-00000-of-00001.parquet`, `test_unseen.csv`, `coco_val2017.tar`, `test/0000.parquet`.
    """
    *folders, name = path.split("/")
    stem = os.path.splitext(name)[0]
    # The hub's names, of which the older end in a hash, and those of saved folders, which call
    # every file "data".
    numbered = re.fullmatch(r"(.+?)-\d+-of-\d+(?:-[0-9a-f]{16})?", stem)
    if numbered and numbered[1] != "data":
        return split_name(numbered[1])
    for name in (re.sub(r"[-_.]?\d+$", "", stem), *reversed(folders)):
        if is_split_name(name):
            return split_name(name)
    words = [split_name(word) for word in re.split(r"[-_. \d]+", stem)]
    return next((word for word in reversed(words) if is_split_name(word)), "train")


def by_split(paths: Iterable[str]) -> dict[str, list[str]]:
    """Files of each split, in the order in which splits are reported.

    Where no name says train, validation or test, everything is train.
    """
    paths = list(paths)
    splits: dict[str, list[str]] = {}
    for path in paths:
        splits.setdefault(split_of_file(path), []).append(path)
    return in_order(splits) if any(map(is_split_name, splits)) else {"train": paths}


def in_order(splits: dict[str, T]) -> dict[str, T]:
    """train, validation and test first, then the others by name."""
    usual = {"train": 0, "validation": 1, "test": 2}
    return {name: splits[name] for name in sorted(splits, key=lambda n: (usual.get(n, 3), n))}


def expand_braces(pattern: str) -> list[str]:
    """`a-{00..03}.tar` and `{a,b}.tar` as the paths they stand for; zeros are kept."""
    parts = []
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        spread = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
        if spread:
            first, last = spread.groups()
            width = len(first) if first.startswith("0") or len(first) == len(last) else 0
            parts.append([f"{n:0{width}d}" for n in range(int(first), int(last) + 1)])
        elif piece.startswith("{") and "," in piece:
            parts.append(piece[1:-1].split(","))
        else:
            parts.append([piece])
    return ["".join(choice) for choice in product(*parts)]
