"""What is no whole picture is refused with a reason; what is one is decoded."""

import io
import os
import pickle
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from clipkit.data import picture_files
from clipkit.data.images import decode_for_box, decode_image
from clipkit.data.picture_files import REASONS, ImageDecodeError, read_picture
from tests.data.test_images import encoded, noise, photo

JPEG = encoded(photo(61, 43), "JPEG")
PNG = encoded(photo(61, 43), "PNG")


def decode_small(source: Any) -> Image.Image:
    return decode_for_box(source, lambda whole: (0, 0, *whole), 8).image


both = pytest.mark.parametrize("decode", [decode_image, decode_small])
Decode = Callable[[Any], Image.Image]


def refused(decode: Decode, source: Any) -> ImageDecodeError:
    with pytest.raises(ImageDecodeError, match=r"^cannot decode (a|the) picture ") as caught:
        decode(source)
    assert caught.value.reason in REASONS
    assert f": {caught.value.reason}" in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)


def test_the_sentence_names_the_picture_and_the_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(PNG[:100])
    broken = refused(decode_image, tmp_path / "broken.png")
    assert str(broken) == f"cannot decode the picture '{tmp_path}/broken.png': truncated"
    assert (
        str(refused(decode_image, b"text")) == "cannot decode a picture of 4 bytes: not a picture"
    )
    assert isinstance(broken, OSError)


@both
def test_files_that_cannot_be_read(decode: Decode, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.jpg").touch()
    found = {
        name: refused(decode, str(tmp_path / name)).reason
        for name in ("none.png", ".", "pipe", "empty.jpg", "a\0b", "x" * 300)
    }
    assert list(found.values()) == [
        *("missing file", "cannot be read", "cannot be read", "empty file"),
        *("cannot be read", "cannot be read"),
    ]
    with pytest.raises(ImageDecodeError) as caught:
        read_picture(tmp_path / "none.png")
    assert caught.value.reason == "missing file"


@both
@pytest.mark.parametrize(
    "data",
    [
        b"%PDF-1.7\n1 0 obj",
        b"<!doctype html><html><body>404",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        b"a caption\n",
        bytes(1000),
    ],
    ids=["pdf", "html", "svg", "mp4", "eps", "text", "zeros"],
)
def test_files_of_other_kinds_are_no_picture(decode: Decode, data: bytes) -> None:
    assert refused(decode, data).reason == "not a picture"


def giants() -> dict[str, bytes]:
    end = (b"IEND", b"")
    pixels = (b"IDAT", zlib.compress(bytes(3000)))
    gif, bmp = bytearray(encoded(noise(8, 8), "GIF")), bytearray(encoded(noise(8, 8), "BMP"))
    gif[6:10] = b"\xff" * 4
    bmp[18:26] = struct.pack("<II", 12_000, 12_000)
    start = JPEG.index(b"\xff\xc0")
    return {
        "png": png(png_header(60_000, 60_000), pixels, end),
        "png above our bound": png(png_header(11_600, 11_600), pixels, end),
        "jpeg": JPEG[: start + 5] + struct.pack(">HH", 65_500, 65_500) + JPEG[start + 9 :],
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "webp": b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff\x3f\0" * 2 + b"ANMF",
    }


@both
@pytest.mark.parametrize("kind", giants())
def test_giants_are_refused_before_memory_is_taken(decode: Decode, kind: str) -> None:
    assert refused(decode, giants()[kind]).reason == "too large"


def test_a_large_picture_is_decoded_without_a_warning() -> None:
    # PIL warns from 89 million pixels on, which is an error here.
    image = Image.new("L", (10_000, 9_000), 7)
    assert decode_small(encoded(image, "JPEG")).size == (1250, 1125)


def test_no_warning_whatever_filters_there_are() -> None:
    data = encoded(photo(31, 23), "JPEG", exif=BROKEN_EXIF["cut"])
    decode_image(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode_image(data)


def test_a_large_file_and_a_lack_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(picture_files.MAX_BYTES + 1)
    assert refused(decode_image, tmp_path / "sparse.png").reason == "too large"

    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.core, "new", no_memory)
    assert refused(decode_image, JPEG).reason == "too large"


@both
def test_a_jpeg_of_endless_scans_is_refused(decode: Decode) -> None:
    data = encoded(photo(61, 43), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert decode(data[:-2] + scan * 50 + data[-2:]).mode == "RGB"
    assert refused(decode, data[:-2] + scan * 100 + data[-2:]).reason == "too large"


FORMS: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "JPEG progressive": {"progressive": True},
    "PNG": {},
    "WEBP": {},
    "WEBP lossless": {"lossless": True},
    "GIF": {},
    "BMP": {},
    "TIFF": {},
    "TIFF lzw": {"compression": "tiff_lzw"},
    "PPM": {},
    "AVIF": {},
}


@both
@pytest.mark.parametrize("form", FORMS)
def test_a_file_cut_at_any_byte_is_refused_or_whole(decode: Decode, form: str) -> None:
    if form not in picture_files.FORMATS and form == "AVIF":
        pytest.skip("this PIL has no AVIF")
    data = encoded(photo(31, 23), form.split()[0], **FORMS[form])
    whole = decode(data).tobytes()
    found = [outcome(decode, data[:length], whole) for length in range(len(data))]
    assert set(found[:40]) <= {"empty file", "not a picture", "truncated", "damaged"}
    # libtiff and libavif do not say why they fail.
    expected = {"whole", "truncated"} | ({"damaged"} if form[:4] in ("TIFF", "AVIF") else set())
    assert set(found[40:]) <= expected
    assert found.count("whole") < 30


def outcome(decode: Decode, data: bytes, whole: bytes) -> str:
    try:
        assert decode(data).tobytes() == whole, f"another picture from {len(data)} bytes"
    except ImageDecodeError as error:
        return error.reason
    return "whole"


@both
def test_every_bit_of_a_png_counts(decode: Decode) -> None:
    data = encoded(photo(16, 12))
    for place in range(8, len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        assert refused(decode, bytes(broken)).reason in ("damaged", "truncated", "not a picture")


@both
def test_pieces_of_a_png_that_are_missing_or_out_of_order(decode: Decode) -> None:
    raw = b"".join(b"\0" + np.random.default_rng(row).bytes(72) for row in range(24))
    pixels = zlib.compress(raw)
    parts = [(b"IDAT", pixels[at : at + 200]) for at in range(0, len(pixels), 200)]
    header, end = png_header(24, 24), (b"IEND", b"")
    whole = decode(png(header, *parts, end)).tobytes()
    assert whole == decode(png(header, (b"IDAT", pixels), end)).tobytes()
    for place in range(len(parts) - 1):  # the last one may hold no more than a checksum
        refused(decode, png(header, *parts[:place], *parts[place + 1 :], end))
    refused(decode, png(header, *parts[::-1], end))


@both
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_whose_end_was_put_too_soon(
    decode: Decode, mode: str, options: dict[str, Any]
) -> None:
    data = encoded(photo(160, 120).convert(mode), "JPEG", **options)
    (first, *_) = picture_files._scans(data)
    start = data.index(b"\xff\xda") + 14
    for length in range(start, first - 30, 40):
        cut = data[:length].rstrip(b"\xff") + b"\xff\xd9"
        assert refused(decode, cut).reason in ("truncated", "damaged")


@both
def test_a_picture_that_is_grey_is_whole(decode: Decode) -> None:
    for mode, grey in (("L", 128), ("RGB", (128, 128, 128))):
        for options in ({}, {"progressive": True}):
            data = encoded(Image.new(mode, (40, 30), grey), "JPEG", **options)
            assert decode(data).getextrema() == ((128, 128),) * 3


@both
@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(decode: Decode, form: str) -> None:
    frames = [photo(31, 23, seed) for seed in range(3)]
    options = {"lossless": True} if form == "WEBP" else {}
    moving = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    still = decode(encoded(frames[0], form, **options))
    assert np.array_equal(np.asarray(decode(moving)), np.asarray(still))


def exif(order: str, kind: int, count: int, value: bytes) -> bytes:
    """An EXIF block whose one entry is the orientation, of any type."""
    head = b"MM\0*" if order == ">" else b"II*\0"
    entry = struct.pack(f"{order}HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0" + head + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


BROKEN_EXIF = {
    "nonsense": b"Exif\0\0nonsense",
    "empty": b"Exif\0\0",
    "cut": exif(">", 3, 1, b"\0\6")[:20],
    "zero": exif(">", 3, 1, b"\0\0"),
    "nine": exif("<", 3, 1, b"\x09\0"),
    "text": exif(">", 2, 4, b"six\0"),
    "several": exif(">", 1, 4, b"\6\6\6\6"),
    "none": exif(">", 3, 0, b""),
    "fraction by nought": exif(">", 5, 1, struct.pack(">I", 8)),
    "far away": exif(">", 5, 1, struct.pack(">I", 2**31)),
    "unknown type": exif(">", 99, 1, b"\0\6"),
    "circle": b"Exif\0\0MM\0*" + struct.pack(">IHHHII", 8, 1, 0x8769, 4, 1, 8) + bytes(4),
}


@both
@pytest.mark.parametrize("trouble", BROKEN_EXIF)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_never_loses_a_picture(decode: Decode, form: str, trouble: str) -> None:
    image = photo(31, 23)
    plain = decode(encoded(image, form))
    found = decode(encoded(image, form, exif=BROKEN_EXIF[trouble]))
    assert np.array_equal(np.asarray(found), np.asarray(plain))


@both
@pytest.mark.parametrize(
    ("kind", "value"), [(3, b"\0\0"), (3, b"\x09\0"), (2, b"si\0"), (1, b"\6"), (7, b"\6\6")]
)
def test_a_broken_orientation_never_loses_a_tiff(decode: Decode, kind: int, value: bytes) -> None:
    tags = {0x0112: 1}
    image = noise(6, 4)
    data = bytearray(encoded(image, "TIFF", tiffinfo=tags))
    place = data.index(struct.pack("<HHI", 0x0112, 3, 1))
    data[place : place + 12] = struct.pack("<HHI", 0x0112, kind, len(value)) + value.ljust(4, b"\0")
    assert decode(bytes(data)).size == (6, 4)


class Broken(Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return np.asarray(decode_image(PNG[:100]))


def test_the_reason_survives_pickling_and_the_sentence_a_worker() -> None:
    error = pickle.loads(pickle.dumps(refused(decode_image, PNG[:100])))
    assert (error.reason, str(error)) == (
        "truncated",
        f"cannot decode a picture of 100 bytes: {error.reason}",
    )
    with pytest.raises(ImageDecodeError, match="a picture of 100 bytes: truncated"):
        next(iter(DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")))


def test_an_open_picture_fails_alike() -> None:
    with Image.open(io.BytesIO(JPEG[:-200])) as image:
        assert refused(decode_image, image).reason in ("truncated", "damaged")
