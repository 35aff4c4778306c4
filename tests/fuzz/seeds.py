"""Whole files to begin with: drawn pictures in every variety of each format, and real ones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DATA = Path(__file__).parents[3] / "shared" / "data"
FORMS = ("jpeg", "png", "webp", "gif", "bmp")


def seeds() -> dict[str, list[bytes]]:
    """Return files of each format; real pictures too, where they lie beside the checkout."""
    files = {form: _drawn(form) for form in FORMS}
    photos = [path.read_bytes() for path in sorted((DATA / "coco_mini").rglob("*.jpg"))[:2]]
    files["jpeg"] += photos
    for encoded in photos:
        image = Image.open(io.BytesIO(encoded)).resize((120, 90))
        for form in ("png", "webp", "gif", "bmp"):
            files[form].append(_encoded(image, form))
    files["png"] += [
        _first_picture(DATA / name / "data" / "test-00000-of-00001.parquet")
        for name in ("emoji_vendors", "game_icons", "lucide_icons")
        if (DATA / name).is_dir()
    ]
    return files


def _drawn(form: str) -> list[bytes]:
    image = _picture(72, 67)
    clear = image.convert("RGBA")
    clear.putalpha(_picture(72, 67, 1).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [_picture(72, 67, 2), _picture(72, 67, 3)]}
    varieties: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "jpeg": [
            (image, {"exif": exif}),
            (image, {"progressive": True}),
            (image.convert("L"), {"quality": 95}),
            (image.convert("CMYK"), {}),
            (image, {"restart_marker_rows": 1, "subsampling": 0}),
        ],
        "png": [
            (image, {"exif": exif}),
            (clear, {}),
            (image.quantize(64), {"transparency": 3}),
            (image.convert("I;16"), {}),
            (image.convert("1"), {}),
            (image, frames),
        ],
        "webp": [
            (image, {"exif": exif}),
            (clear, {}),
            (clear, {"lossless": True}),
            (image, frames),
        ],
        "gif": [
            (image, {}),
            (image.quantize(16), {"transparency": 3, "interlace": False}),
            (image, frames),
        ],
        "bmp": [
            (image, {}),
            (image.convert("L"), {}),
            (image.quantize(16), {}),
            (image.convert("1"), {}),
            (clear, {}),
        ],
    }
    return [_encoded(picture, form, **options) for picture, options in varieties[form]]


def _picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Colour at every scale, the finer the weaker, as in photos."""
    values, draws = np.zeros((height, width, 3)), np.random.default_rng(seed)
    for cells in (2, 4, 8, 16, 32):
        coarse = Image.fromarray(draws.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        resized = coarse.resize((width, height), Image.Resampling.BICUBIC)
        values += (np.asarray(resized) - 128.0) / cells**0.7
    return Image.fromarray(np.clip(values + 128, 0, 255).astype(np.uint8))


def _encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _first_picture(file: Path) -> bytes:
    import pyarrow.parquet as pq

    batch = next(pq.ParquetFile(file).iter_batches(1, columns=["image"]))
    encoded: bytes = batch.to_pylist()[0]["image"]["bytes"]
    return encoded
