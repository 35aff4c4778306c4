"""Opening the file of a picture, which may be anything: one exception, a reason to count.

PIL is strict about files that end early. It is made stricter where a format allows it (the
checksums of a PNG, a JPEG whose end was put too soon), and bounded where a small file could ask for
much: pixels before any is allocated, the scans of a JPEG before any is decoded.
"""

import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Literal, get_args

from PIL import (
    Image,
    TiffImagePlugin,  # noqa: F401  PIL itself registers five formats, importing these two more
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]
"""What is decoded, by its content. PIL knows more, and would hand an EPS to Ghostscript."""

with suppress(ImportError):  # PIL has it from 11.3 on
    from PIL import AvifImagePlugin  # noqa: F401

    FORMATS.append("AVIF")

MAX_PIXELS = 2**27
"""The largest picture: 134 million pixels, half a gigabyte as PIL holds them."""

MAX_SCANS = 100
"""The most scans of a progressive JPEG: a few dozen bytes are one more pass over all pixels."""

MAX_BYTES = 8 * MAX_PIXELS
"""The largest file: every pixel of the largest picture, as widely as PIL reads it."""

Reason = Literal[
    "no picture",
    "missing file",
    "cannot be read",
    "empty file",
    "not a picture",
    "too large",
    "truncated",
    "damaged",
]
REASONS: tuple[Reason, ...] = get_args(Reason)


class ImageDecodeError(OSError):
    """A picture that could not be decoded; the message names it.

    Attributes:
        reason: why, one of `REASONS`. A file is `truncated` where it ends before its picture does,
            `damaged` for every other disagreement with its format; `too large` is more than
            `MAX_PIXELS`, `MAX_SCANS` or `MAX_BYTES`, or more than there is memory.
    """

    def __init__(self, message: str, reason: Reason = "damaged") -> None:
        super().__init__(message)
        self.reason: Reason = reason


@contextmanager
def opened(source: bytes | str | os.PathLike[str] | Image.Image) -> Iterator[Image.Image]:
    """The picture, not decoded yet; it has to be within. A picture that is open already is itself.

    Raises:
        ImageDecodeError: whatever fails inside, with the name of the picture and the reason.
    """
    data = b""
    _silence_pil()
    try:
        if isinstance(source, Image.Image):
            _refuse_giant(source)
            yield source
            return
        data = source if isinstance(source, bytes) else _read(source)
        if not data:
            raise ImageDecodeError("", "empty file")
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse_giant(image)
            if isinstance(image, PngImageFile) and (trouble := _png_trouble(data)):
                raise ImageDecodeError("", trouble)
            if isinstance(image, JpegImageFile) and "progressive" in image.info:
                _refuse_many_scans(data)
            yield image
            if isinstance(image, JpegImageFile):
                _refuse_cut_short(image, data)
    except Exception as error:  # PIL's readers raise whatever their parsing trips over
        raise _failure(source, error, data) from error


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a picture's file.

    Raises:
        ImageDecodeError: there is no such file, it cannot be read, or it is too large.
    """
    try:
        return _read(path)
    except Exception as error:
        raise _failure(path, error, b"") from error


def _read(path: str | os.PathLike[str]) -> bytes:
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, a device has no end
        raise ImageDecodeError("it is no file", "cannot be read")
    if found.st_size > MAX_BYTES:
        raise ImageDecodeError(f"{found.st_size:,} bytes", "too large")
    with open(path, "rb") as file:
        return file.read()


def _refuse_giant(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        sides = f"{image.width} x {image.height} pixels"
        raise ImageDecodeError(f"{sides}, at most {MAX_PIXELS:,} are decoded", "too large")


_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def _silence_pil() -> None:
    """What PIL warns of in a file (odd tags, a large size) is no affair of the user's code.

    For good, and not around each decoding: filters belong to no thread, and pictures are decoded in
    several. In front of all others, hence looked at again.
    """
    if warnings.filters[:1] != [_QUIET]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


# --- Why -----------------------------------------------------------------------------------------


def _failure(source: object, error: Exception, data: bytes) -> ImageDecodeError:
    reason, detail = _why(error, data)
    sentence = f"cannot decode {_describe(source)}: {reason}"
    return ImageDecodeError(f"{sentence} ({detail})" if detail else sentence, reason)


def _why(error: Exception, data: bytes) -> tuple[Reason, str]:
    """The reason, and what PIL or the system said, where that says more."""
    detail = next(iter(str(error).splitlines()), "") or type(error).__name__
    if isinstance(error, ImageDecodeError):
        return error.reason, str(error)
    if isinstance(error, FileNotFoundError):
        return "missing file", ""
    if isinstance(error, OSError) and error.errno is not None:  # the system's, not PIL's
        return "cannot be read", error.strerror or ""
    if isinstance(error, MemoryError):
        return "too large", "more than there is memory"
    if isinstance(error, Image.DecompressionBombError):  # PIL's own bound is a little higher
        return "too large", f"at most {MAX_PIXELS:,} pixels are decoded"
    ends_early = _ends_early(data)
    if isinstance(error, UnidentifiedImageError):  # it speaks of the object in memory
        if ends_early is None:
            return "not a picture", ""
        detail = "its beginning cannot be read"
    if ends_early or "truncated" in detail.lower():
        return "truncated", detail
    return ("damaged" if data else "cannot be read"), detail


def _describe(source: object) -> str:
    if isinstance(source, bytes):
        return f"a picture of {len(source)} bytes"
    return (
        f"the picture {source!r}"
        if isinstance(source, Image.Image)
        else f"the picture {str(source)!r}"
    )


def _ends_early(data: bytes) -> bool | None:
    """Whether a file is shorter than it says itself; None where it is in none of the formats."""
    for magic, is_cut in _FORMATS.items():
        if data.startswith(magic):
            return is_cut(data)
    return False if data[4:12] in (b"ftypavif", b"ftypavis") else None


_FORMATS: dict[bytes, Callable[[bytes], bool]] = {
    b"\xff\xd8\xff": lambda data: b"\xff\xd9" not in data,
    b"\x89PNG\r\n\x1a\n": lambda data: _png_trouble(data) == "truncated",
    b"GIF8": lambda data: not data.endswith(b";"),
    b"RIFF": lambda data: int.from_bytes(data[4:8], "little") + 8 > len(data),
    b"BM": lambda data: int.from_bytes(data[2:6], "little") > len(data),
    b"II*\0": lambda data: int.from_bytes(data[4:8], "little") >= len(data),
    b"MM\0*": lambda data: int.from_bytes(data[4:8], "big") >= len(data),
}


# --- PNG -----------------------------------------------------------------------------------------


def _png_trouble(data: bytes) -> Reason | None:
    """Compare the checksum of every chunk; PIL leaves out those of the pixels."""
    view, place = memoryview(data), 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            return "truncated"
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return "damaged"
        if kind == b"IEND":
            return None
        place = end + 4
    return "truncated"


# --- JPEG ----------------------------------------------------------------------------------------


_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def _scans(data: bytes) -> Iterator[int]:
    """Yield where the coded pixels of each scan of a JPEG end."""
    place = 2
    while 0 <= (place := data.find(b"\xff", place)) < len(data) - 3:
        marker = data[place + 1]
        if marker == 0xD9:
            return
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD8:  # no segment follows
            place += 1
            continue
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == 0xDA:
            found = _END_OF_SCAN.search(data, place)
            place = found.start() if found else len(data)
            yield place


def _refuse_many_scans(data: bytes) -> None:
    if sum(1 for _ in _scans(data)) > MAX_SCANS:
        raise ImageDecodeError(f"more than {MAX_SCANS} scans", "too large")


def _refuse_cut_short(image: JpegImageFile, data: bytes) -> None:
    """Notice a marker that ends the pixels too soon: libjpeg fills up with grey, and PIL is silent.

    Where the last pixel has that grey, bytes are put before the marker. They change a picture that
    was cut short, and no other.
    """
    levels = image.getpixel((image.width - 1, image.height - 1))
    if any(
        level not in (127, 128) for level in (levels if isinstance(levels, tuple) else (levels,))
    ):
        return
    end = next(_scans(data), len(data))
    if _small(data) != _small(data[:end] + _MORE_PIXELS + data[end:]):
        raise ImageDecodeError("its pixels end before the picture does", "truncated")


# With every restart marker, of which the decoder may wait for one.
_MORE_PIXELS = b"".join(
    mark + bytes(range(1, 255, 3)) for mark in (b"", *(bytes([0xFF, 0xD0 + n]) for n in range(8)))
)


def _small(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        image.draft("RGB", (1, 1))
        return image.tobytes()
