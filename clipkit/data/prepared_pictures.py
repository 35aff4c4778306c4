"""Pictures brought to a smaller one before a training view is drawn, or to what evaluation sees.

What is prepared may be kept in a file of raw bytes. It holds the first rows up to a bound; the
others, and those that cannot be decoded, are prepared when they are asked for. So the file changes
the time that a picture takes and nothing else.
"""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image, features
from torch.utils.data import DataLoader, Dataset

from clipkit.data.array_file import ArrayFile, ArrayWriter, open_or_build
from clipkit.data.broken import BrokenRowError, check_picture
from clipkit.data.identity import image_id
from clipkit.data.images import (
    RESAMPLING,
    Box,
    SmallerPicture,
    Source,
    decode_for_box,
    decode_image,
    resize_for_eval,
)
from clipkit.data.picture_files import read_picture
from clipkit.encoders.base import Interpolation, ResizeMode

if TYPE_CHECKING:
    from clipkit.data.rows import Picture, Rows

log = logging.getLogger(__name__)

_FORMAT = 2  # to be raised whenever the same pictures would give another file
_SIZES = ("height", "width", "full_width", "full_height")
_INDEX = {"start": "<i8", **dict.fromkeys(_SIZES, "<i4"), "image_id": "<i8", "crc": "<u4"}
_BYTES_A_ROW = sum(np.dtype(kind).itemsize for kind in _INDEX.values())
_OVERHEAD = 4096  # bytes of a file beside its arrays
_NOT_KEPT = -1
_SAMPLED = 64  # pictures that a file is asked for before it is trusted

Prepare = Callable[[Source], SmallerPicture]


@dataclass(frozen=True)
class Shrunk:
    """A picture whose short side is not longer than this; of a smaller one every pixel is kept."""

    side: int
    interpolation: Interpolation

    def __call__(self, source: Source) -> SmallerPicture:
        sizes: list[tuple[int, int]] = []

        def whole(size: tuple[int, int]) -> Box:
            sizes.append(size)
            return (0, 0, *size)

        decoded = decode_for_box(source, whole, self.side)
        width, height = sizes[0]
        short = min(width, height)
        if short <= self.side:
            return SmallerPicture(decoded.image, (width, height))
        size = (round(width * self.side / short), round(height * self.side / short))
        image = decoded.image.resize(size, RESAMPLING[self.interpolation], decoded.whole)
        return SmallerPicture(image, (width, height))


@dataclass(frozen=True)
class AsEvaluated:
    """A picture as evaluation sees it, which `resize_for_eval` leaves as it is."""

    size: int
    resize_mode: ResizeMode
    interpolation: Interpolation

    def __call__(self, source: Source) -> SmallerPicture:
        image = decode_image(source)
        seen = resize_for_eval(image, self.size, self.resize_mode, self.interpolation)
        return SmallerPicture(seen, image.size)


class Prepared(NamedTuple):
    """A picture on its way to a view, and the id of what it was made from."""

    picture: SmallerPicture
    image_id: int


class PreparedPictures:
    """The pictures of some rows, prepared; read from a file where it holds them.

    Args:
        rows: where the pictures come from.
        prepare: what is done with each.
        file: as `kept_pictures` builds it.
    """

    def __init__(self, rows: Rows, prepare: Prepare, file: ArrayFile | None = None) -> None:
        self._rows = rows
        self._prepare = prepare
        self._file = file
        self._checked: np.ndarray[Any, np.dtype[np.bool_]] | None = None
        self._said_damaged = False

    def __getitem__(self, row: int) -> Prepared:
        """Return the picture of a row.

        Raises:
            OSError: it cannot be read or decoded.
        """
        pixels = None if self._file is None else self._kept(self._file, row)
        if pixels is None or self._file is None:
            encoded = read_encoded(self._rows.image(row))
            return Prepared(self._prepare(encoded), image_id(encoded))
        full_size = (int(self._file["full_width"][row]), int(self._file["full_height"][row]))
        picture = SmallerPicture(Image.fromarray(pixels), full_size)
        return Prepared(picture, int(self._file["image_id"][row]))

    def _kept(self, file: ArrayFile, row: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
        start = int(file["start"][row])
        if start == _NOT_KEPT:
            return None
        shape = int(file["height"][row]), int(file["width"][row]), 3
        pixels = file["pixels"][start : start + shape[0] * shape[1] * 3]
        # Checked where a process first reads it: all of them in advance would take minutes.
        if self._checked is None:
            self._checked = np.zeros(len(self._rows), np.bool_)
        if not self._checked[row]:
            if zlib.crc32(pixels.data) != file["crc"][row]:
                file.mark_damaged()
                if not self._said_damaged:
                    self._said_damaged = True
                    log.warning(
                        "warning: row %d of %s is damaged, and others may be; what is damaged is "
                        "decoded as usual, and the next run builds the file again",
                        row, file.path,
                    )  # fmt: skip
                return None
            self._checked[row] = True
        return pixels.reshape(shape)


def read_encoded(picture: Picture) -> bytes | Image.Image:
    """Return the bytes of a picture that is given by its path, others as they are.

    Raises:
        ImageDecodeError: a file that cannot be read.
        BrokenRowError: it is no picture by its type.
    """
    check_picture(picture)
    return read_picture(picture) if isinstance(picture, str) else picture


# --- The file ------------------------------------------------------------------------------------


def kept_pictures(
    rows: Rows, prepare: Prepare, folder: Path, *, pictures: str, max_bytes: int, split: str
) -> PreparedPictures:
    """Open the file of a split's prepared pictures, building it where it is not there.

    Its name is a digest of where the pictures come from and of what is done with them. Other
    pictures of the same names, lengths and times would share it: so some of them, spread over the
    rows, are compared with the file before it is used.

    Args:
        rows: where the pictures come from.
        prepare: what is done with each; its `repr` says it.
        folder: where the file belongs.
        pictures: digest of the pictures.
        max_bytes: what the file may take.
        split: for messages.

    Raises:
        UserError: the folder cannot be written.
    """
    if _room(rows, max_bytes) <= 0:
        log.info("data: data.cache_pictures_gb has no room for a picture of %s", split)
        return PreparedPictures(rows, prepare)
    path = folder / f"pictures-{_key(prepare, pictures)}.clipkit"
    file, built = open_or_build(
        path,
        lambda writer: _write(writer, rows, prepare, max_bytes, split),
        unchecked=["pixels"],
        accepts=lambda file: _is_within(file, max_bytes) and _is_of(file, rows),
    )
    num_kept, done = int((file["start"] != _NOT_KEPT).sum()), "now in" if built else "read from"
    log.info(
        f"data: pictures of {split}, {num_kept:,} of {len(rows):,}: {done} {file.describe()}"
        f"{_of_the_rest(len(rows), num_kept, file)}"
    )
    return PreparedPictures(rows, prepare, file)


def _key(prepare: Prepare, pictures: str) -> str:
    # Another decoder may give other bits.
    versions = (PIL.__version__, features.version("jpg"))
    settings = repr((_FORMAT, pictures, repr(prepare), versions))
    return blake2b(settings.encode(), digest_size=8).hexdigest()


def _room(rows: Rows, max_bytes: int) -> int:
    """Bytes that are left for pixels."""
    return max_bytes - len(rows) * _BYTES_A_ROW - _OVERHEAD


def _is_within(file: ArrayFile, max_bytes: int) -> bool:
    built_for, is_full = file["bound"].tolist()
    return file.size <= max_bytes and (not is_full or built_for == max_bytes)


def _is_of(file: ArrayFile, rows: Rows) -> bool:
    kept = np.flatnonzero(file["start"] != _NOT_KEPT)
    chosen = np.linspace(0, len(kept) - 1, min(len(kept), _SAMPLED)).astype(np.int64)
    try:
        return all(
            image_id(read_encoded(rows.image(row))) == file["image_id"][row]
            for row in kept[chosen].tolist()
        )
    except (OSError, BrokenRowError):
        return False


def _of_the_rest(num_rows: int, num_kept: int, file: ArrayFile) -> str:
    _, is_full = file["bound"].tolist()
    if num_kept == num_rows:
        return ""
    if is_full:
        return "; data.cache_pictures_gb has no room for the others, which are decoded as usual"
    return "; the others cannot be decoded"


def _write(writer: ArrayWriter, rows: Rows, prepare: Prepare, max_bytes: int, split: str) -> None:
    index = {name: np.zeros(len(rows), kind) for name, kind in _INDEX.items()}
    index["start"][:] = _NOT_KEPT
    room = _room(rows, max_bytes)
    end, is_full = 0, False
    places: dict[int, int] = {}  # a picture that several rows show is written once
    writer.append("pixels", np.zeros(0, np.uint8))
    for row, picture in enumerate(_all_prepared(rows, prepare, split)):
        if picture is None:
            continue
        pixels, full_size, identity = picture
        first = places.setdefault(identity, row)
        if first == row:
            is_full = end + pixels.nbytes > room
            if is_full:
                break
            writer.append("pixels", pixels)
            sizes = zip(_SIZES, (*pixels.shape[:2], *full_size), strict=True)
            values = {**dict(sizes), "start": end, "image_id": identity}
            values["crc"] = zlib.crc32(pixels.data)
            end += pixels.nbytes
        else:
            values = {name: column[first] for name, column in index.items()}
        for name, value in values.items():
            index[name][row] = value
    for name, column in index.items():
        writer.append(name, column)
    writer.append("bound", np.array([max_bytes, is_full], "<i8"))


class _Found(NamedTuple):
    """Pixels (H, W, 3), width and height of the full picture, its id."""

    pixels: np.ndarray[Any, np.dtype[np.uint8]]
    full_size: tuple[int, int]
    image_id: int


def _all_prepared(rows: Rows, prepare: Prepare, split: str) -> Iterator[_Found | None]:
    """Yield every picture in the order of the rows, None for a broken one; on all cores."""
    from tqdm import tqdm

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    loader = DataLoader(
        _Preparing(rows, prepare),
        batch_size=None,
        num_workers=cores if cores and cores > 1 and len(rows) > 2 * _FEW else 0,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # training's random numbers are not touched
    )
    bar = tqdm(
        loader, desc=f"pictures of {split}", unit="picture", delay=3, leave=False, disable=None
    )
    yield from bar


_FEW = 64  # pictures that take less time than starting a process


class _Preparing(Dataset[_Found | None]):
    def __init__(self, rows: Rows, prepare: Prepare) -> None:
        self._rows = rows
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> _Found | None:
        try:
            encoded = read_encoded(self._rows.image(row))
            image, full_size = self._prepare(encoded)
        except (OSError, BrokenRowError):  # to be named when its turn comes, as without a file
            return None
        return _Found(np.array(image), full_size, image_id(encoded))


def _as_it_is(found: Any) -> Any:
    return found
