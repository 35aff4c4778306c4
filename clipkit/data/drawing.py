"""Drawn pictures with captions: an endless data set that is arithmetic, not files.

Every picture shows one shape of one colour. Some combinations of colour and shape are never drawn
for training, so that zero-shot classification of them measures whether a model composes what it
learned. A picture depends on (seed, split, index) alone. Everything is hashed and rasterised in
integers, so the bytes are the same on every platform and with every version of Python and numpy.
"""

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from clipkit.errors import UserError

Split = Literal["train", "validation", "unseen", "test"]
RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "yellow": (245, 196, 28),
    "green": (46, 150, 68),
    "cyan": (40, 200, 212),
    "blue": (38, 84, 204),
    "purple": (126, 52, 168),
    "pink": (246, 126, 180),
    "brown": (126, 76, 38),
    "grey": (132, 134, 138),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "moon")
SIZES = ("small", "medium", "large")
BACKGROUNDS = ("plain", "striped", "dotted", "checked")
PLACES = (  # row by row
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)

COMBINATIONS = tuple((color, shape) for color in COLORS for shape in SHAPES)
CLASS_NAMES = tuple(f"{color} {shape}" for color, shape in COMBINATIONS)
# Steps of 5 through the 80 combinations: every shape is held out twice, every colour at most twice.
HELD_OUT = frozenset(COMBINATIONS[2::5])

TEMPLATES = (
    "a {color} {shape}",
    "a picture of a {color} {shape}",
    "a {shape} painted {color}",
    "one {size} {color} {shape}",
    "a {color} {shape} {place}",
    "a {color} {shape} on a {background} background",
    "a {size} {color} {shape} {place} on a {background} background",
)
PROMPTS = ("a {}", "a picture of a {}", "one {}", "a drawing of a {}")

_COMBINATIONS_OF: dict[str, tuple[tuple[str, str], ...]] = {
    "train": tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT),
    "validation": tuple(pair for pair in COMBINATIONS if pair not in HELD_OUT),
    "unseen": tuple(pair for pair in COMBINATIONS if pair in HELD_OUT),
    "test": COMBINATIONS,
}
_SIDE = 1024  # lengths in a specification are in 1/1024 of the picture's side
_RADII = {"small": (150, 175), "medium": (210, 240), "large": (285, 320)}
_MARGIN = 16
_DEGREES = 20  # a square turned further would read as a diamond
_SUBSAMPLES = 4  # a pixel's coverage is counted at 4 x 4 points
_UNIT = 1024  # radius of the circle around each shape in the shape's own coordinates


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """What one picture shows; lengths are in 1/1024 of its side."""

    color: str
    shape: str
    size: str
    row: int
    column: int
    background: str
    x: int
    y: int
    radius: int
    degrees: int
    paint: RGB
    paper: RGB
    pattern: RGB

    @property
    def place(self) -> str:
        """Where the shape is, in words."""
        return PLACES[self.row][self.column]

    @property
    def label(self) -> int:
        """Index of the picture's class in `CLASS_NAMES`."""
        return COMBINATIONS.index((self.color, self.shape))


def sample(seed: int, split: Split, index: int) -> Drawing:
    """Return picture number `index` of a split; consecutive indices walk through the classes."""
    if split not in _COMBINATIONS_OF:
        raise UserError(f"split: {split!r} is not one of {', '.join(get_args(Split))}.")
    combinations = _COMBINATIONS_OF[split]
    color, shape = combinations[index % len(combinations)]
    digest = hashlib.sha256(f"{seed}/{split}/{index}".encode()).digest()
    words: Iterator[int] = iter(struct.unpack("<16H", digest))

    def uniform(low: int, high: int) -> int:
        return low + (next(words) * (high - low + 1) >> 16)

    size = SIZES[uniform(0, 2)]
    background = BACKGROUNDS[uniform(0, 3)]
    row, column = uniform(0, 2), uniform(0, 2)
    radius = uniform(*_RADII[size])
    # The farthest the centre may go; named places take the outer 45 % or the inner 20 % of it.
    room = _SIDE // 2 - radius - _MARGIN
    x, y = (
        _SIDE // 2 + room * (80 * (place - 1) + uniform(-20, 20)) // 100 for place in (column, row)
    )
    degrees = uniform(-_DEGREES, _DEGREES)
    red, green, blue = (channel + uniform(-10, 10) for channel in COLORS[color])
    paper = uniform(224, 250), uniform(224, 250), uniform(224, 250)
    depth = uniform(18, 30)
    return Drawing(
        color=color,
        shape=shape,
        size=size,
        row=row,
        column=column,
        background=background,
        x=x,
        y=y,
        radius=radius,
        degrees=degrees,
        paint=(_clip(red), _clip(green), _clip(blue)),
        paper=paper,
        pattern=(paper[0] - depth, paper[1] - depth, paper[2] - depth),
    )


def captions(drawing: Drawing) -> list[str]:
    """Return one caption for each of `TEMPLATES`, in their order; the last one says everything."""
    return [
        template.format(
            color=drawing.color,
            shape=drawing.shape,
            size=drawing.size,
            place=drawing.place,
            background=drawing.background,
        )
        for template in TEMPLATES
    ]


def draw(drawing: Drawing, size: int) -> NDArray[np.uint8]:
    """Rasterise a picture of `size` x `size` pixels; (H, W, 3) in RGB."""
    palette = np.array((drawing.paper, drawing.pattern), dtype=np.uint8)
    # Thrice as fast as palette[...].
    picture = palette.take(_pattern(drawing.background, size), axis=0)
    mask = _mask(drawing.shape, max(1, _pixels(drawing.radius, size)), drawing.degrees)
    # The mask is even and sits on whole pixels: it depends on few numbers and is worth keeping.
    half = len(mask) // 2
    top, left = _pixels(drawing.y, size) - half, _pixels(drawing.x, size) - half
    rows = slice(max(top, 0), min(top + 2 * half, size))
    columns = slice(max(left, 0), min(left + 2 * half, size))
    cover = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    paint = np.array(drawing.paint, dtype=np.uint16)
    full = _SUBSAMPLES**2
    below = picture[rows, columns]
    picture[rows, columns] = (below * (full - cover) + paint * cover + full // 2) // full
    return picture


def _clip(channel: int) -> int:
    return min(max(channel, 0), 255)


def _pixels(length: int, size: int) -> int:
    return (2 * length * size + _SIDE) // (2 * _SIDE)


@cache
def _pattern(background: str, size: int) -> NDArray[np.intp]:
    """Where the paper's pattern is drawn; (H, W) of 0 and 1."""
    y, x = np.ogrid[:size, :size]
    match background:
        case "striped":
            inside = (x + y) * 14 // size % 2 == 0
        case "dotted":
            cell = 6
            # Position in the cell, from its middle, in units of 1 / (2 * size) of the cell.
            u, v = ((2 * z + 1) * cell % (2 * size) - size for z in (x, y))
            inside = 4 * (u * u + v * v) <= size * size
        case "checked":
            inside = (x * 8 // size + y * 8 // size) % 2 == 0
        case _:
            inside = np.zeros((size, size), dtype=bool)
    return np.asarray(inside, dtype=np.intp)


@lru_cache(maxsize=8192)
def _mask(shape: str, radius: int, degrees: int) -> NDArray[np.uint16]:
    """Count of covered sample points in each pixel around a shape's centre; (2R, 2R, 1)."""
    half = radius + 1
    points = 2 * half * _SUBSAMPLES
    # Sample points lie at odd multiples of 1 / (2 * _SUBSAMPLES) of a pixel.
    steps = 2 * np.arange(points, dtype=np.int64) - points + 1
    y, x = steps[:, None], steps[None, :]
    cos = round(4096 * math.cos(math.radians(degrees)))
    sin = round(4096 * math.sin(math.radians(degrees)))
    scale = 4096 * 2 * _SUBSAMPLES * radius
    inside = _inside(
        shape, (x * cos + y * sin) * _UNIT // scale, (y * cos - x * sin) * _UNIT // scale
    )
    counts = inside.reshape(2 * half, _SUBSAMPLES, 2 * half, _SUBSAMPLES).sum(axis=(1, 3))
    return np.asarray(counts, dtype=np.uint16)[:, :, None]


def _inside(shape: str, x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.bool_]:
    match shape:
        case "circle":
            return _disc(x, y, 0, 0, 980)
        case "square":
            return (abs(x) <= 720) & (abs(y) <= 720)
        case "triangle":
            return _polygon(x, y, ((0, -1020), (883, 510), (-883, 510)))
        case "star":
            return _polygon(x, y, _STAR)
        case "heart":
            lobes = _disc(x, y, -430, -330, 480) | _disc(x, y, 430, -330, 480)
            return lobes | _polygon(x, y, _HEART_POINT)
        case "ring":
            return _disc(x, y, 0, 0, 1000) & ~_disc(x, y, 0, 0, 560)
        case "cross":
            return (abs(x) <= 960) & (abs(y) <= 960) & ((abs(x) <= 310) | (abs(y) <= 310))
        case "moon":
            return _disc(x, y, 0, 0, 1020) & ~_disc(x, y, 480, -180, 840)
    raise AssertionError(shape)


_STAR = (
    (0, -1020), (258, -355), (970, -315), (417, 136), (600, 825),
    (0, 439), (-600, 825), (-417, 136), (-970, -315), (-258, -355),
)  # fmt: skip
_HEART_POINT = ((-808, -34), (-430, -330), (430, -330), (808, -34), (0, 1000))


def _disc(
    x: NDArray[np.int64], y: NDArray[np.int64], center_x: int, center_y: int, radius: int
) -> NDArray[np.bool_]:
    result: NDArray[np.bool_] = (x - center_x) ** 2 + (y - center_y) ** 2 <= radius**2
    return result


def _polygon(
    x: NDArray[np.int64], y: NDArray[np.int64], corners: tuple[tuple[int, int], ...]
) -> NDArray[np.bool_]:
    """Even-odd rule without a division: an edge counts where a ray to the right crosses it."""
    inside = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        spans = (y0 <= y) != (y1 <= y)
        side = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
        inside ^= spans & ((side > 0) == (y1 > y0)) & (side != 0)
    return inside
