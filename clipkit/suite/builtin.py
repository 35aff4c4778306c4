"""Built-in evaluation data, there without a network: drawn shapes and scikit-learn's digits.

Equal everywhere and always, whatever model is judged: pictures have a size of their own, and a
split's pictures, their order and their captions are fixed.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
from PIL import Image

from clipkit.data.drawing import CLASS_NAMES, COLORS, SHAPES, Drawing, Split, captions, draw, sample
from clipkit.data.rows import Source, StoredRows
from clipkit.errors import UserError

IMAGE_SIZE = 64
"""Pixels a side of every built-in picture."""

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Consecutive stretches of the 1,797, as neighbours are of the same writers.
_DIGIT_SPLITS = {"train": (0, 600), "validation": (600, 997), "test": (997, 1797)}
# Drawn as ShapesPairs draws, with seeds that it does not use: which combinations of colour and
# shape (all, or those that it never trains on), the seed, and how many.
_SHAPE_SPLITS: dict[str, tuple[Split, int, int]] = {
    "train": ("test", 9001, 800),
    "validation": ("test", 9002, 400),
    "test": ("test", 9003, 1000),
    "unseen": ("unseen", 9003, 320),
}

BUILTIN: dict[str, Sequence[str]] = {"digits": tuple(_DIGIT_SPLITS), "shapes": tuple(_SHAPE_SPLITS)}
"""Names that `EvalData.path` takes for built-in data, and the splits of each."""


def open_builtin(name: str, split: str, *, caption_column: str | None = None) -> StoredRows:
    """Return the rows of built-in data; both have the classes of their column `label`.

    `shapes` has captions besides, no two of a split alike: what stands in column `caption` is right
    and `negative_caption` is wrong in one word; the pattern `*caption` takes the two in this order.

    Raises:
        UserError: there is no such data, split or caption column, or scikit-learn is missing.
    """
    if name not in BUILTIN:
        raise UserError(f"there is no built-in data {name!r}; there are: {', '.join(BUILTIN)}")
    if split not in BUILTIN[name]:
        raise UserError(
            f"built-in data {name!r} has no split {split!r}; it has: {', '.join(BUILTIN[name])}"
        )
    source = _digits(split) if name == "digits" else _shapes(split)
    keys = pa.array([f"{name}-{split}-{index}" for index in range(len(source))])
    return StoredRows(source, captions=_captions(source, name, caption_column), keys=keys)


class _DrawnSource(Source):
    """Shapes, drawn when they are asked for."""

    def __init__(self, drawings: Sequence[Drawing]) -> None:
        self._drawings = list(drawings)
        self.columns = ["label", "caption", "negative_caption"]

    def __len__(self) -> int:
        return len(self._drawings)

    def image(self, position: int) -> Image.Image:
        return Image.fromarray(draw(self._drawings[position], IMAGE_SIZE))

    def image_sizes(self, positions: np.ndarray) -> np.ndarray:
        return np.full(len(positions), 3 * IMAGE_SIZE**2, np.int64)

    def column(self, name: str) -> pa.ChunkedArray:
        if name == "label":
            return pa.chunked_array([pa.array([drawing.label for drawing in self._drawings])])
        shown = self._drawings
        if name == "negative_caption":
            shown = [_altered(drawing, place) for place, drawing in enumerate(shown)]
        return pa.chunked_array([pa.array([captions(drawing)[-1] for drawing in shown])])

    def class_names(self, name: str) -> list[str] | None:
        return list(CLASS_NAMES) if name == "label" else None


class _DigitSource(Source):
    """Handwritten digits, white on black."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray) -> None:
        self._pixels = pixels  # (N, 8, 8) uint8
        self._labels = labels  # (N,) int64
        self.columns = ["label"]

    def __len__(self) -> int:
        return len(self._labels)

    def image(self, position: int) -> Image.Image:
        digit = Image.fromarray(self._pixels[position])
        margin = IMAGE_SIZE // 8  # the strokes reach the border
        inner = IMAGE_SIZE - 2 * margin
        picture = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
        picture.paste(digit.resize((inner, inner), Image.Resampling.BICUBIC), (margin, margin))
        return picture.convert("RGB")

    def image_sizes(self, positions: np.ndarray) -> np.ndarray:
        return np.full(len(positions), 3 * IMAGE_SIZE**2, np.int64)

    def column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([pa.array(self._labels)])

    def class_names(self, name: str) -> list[str] | None:
        return list(_DIGITS)


def _shapes(split: str) -> Source:
    """Return the first drawings of which no two have the same full caption."""
    combinations, seed, length = _SHAPE_SPLITS[split]
    drawings: dict[str, Drawing] = {}
    index = 0
    while len(drawings) < length:
        drawing = sample(seed, combinations, index)
        drawings.setdefault(captions(drawing)[-1], drawing)
        index += 1
    return _DrawnSource(list(drawings.values()))


def _altered(drawing: Drawing, index: int) -> Drawing:
    """Return what a picture does not show: another colour, shape or place, in turn."""
    turn, step = index % 3, index // 3
    if turn == 0:
        return replace(drawing, color=_other(list(COLORS), drawing.color, step))
    if turn == 1:
        return replace(drawing, shape=_other(SHAPES, drawing.shape, step))
    return replace(drawing, column=int(_other("012", str(drawing.column), step)))


def _other(values: Sequence[str], value: str, step: int) -> str:
    return values[(values.index(value) + 1 + step % (len(values) - 1)) % len(values)]


def _digits(split: str) -> Source:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(
            "built-in data 'digits' comes with scikit-learn: pip install scikit-learn"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    part = slice(*_DIGIT_SPLITS[split])
    levels = pixels[part].reshape(-1, 8, 8).astype(np.int64)  # 0 .. 16
    return _DigitSource((levels * 255 // 16).astype(np.uint8), labels[part].astype(np.int64))


def _captions(source: Source, name: str, wanted: str | None) -> pa.Array:
    texts = [column for column in source.columns if column.endswith("caption")]
    if wanted is None and not texts:
        return pa.nulls(len(source), pa.string())
    chosen = [column for column in texts if fnmatch.fnmatchcase(column, wanted or "caption")]
    if not chosen:
        raise UserError(
            f"built-in data {name!r} has no column of captions {wanted!r}; it has: "
            f"{', '.join(texts) or 'none'}"
        )
    columns = [source.column(column).to_pylist() for column in chosen]
    return pa.array([list(cells) for cells in zip(*columns, strict=True)], pa.list_(pa.string()))
