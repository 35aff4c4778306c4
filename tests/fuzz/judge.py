"""What may come of a damaged file: a reason, or the picture that PIL alone makes of it."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from clipkit.data.images import decode_for_box, decode_image
from clipkit.data.picture_files import REASONS, ImageDecodeError

SIDE = 8
Pixels = NDArray[np.uint8]


def judge(data: bytes, whole: Pixels | None = None) -> str:
    """Return the reason of a refusal, or `same` or `changed`, compared with the whole picture.

    Raises:
        AssertionError: another exception, a warning, another picture than PIL's, or two ways of
            decoding that do not agree.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        full, small = _outcome(data, scaled=False), _outcome(data, scaled=True)
    assert not said, f"warned: {said[0].message}"
    if isinstance(full, str) or isinstance(small, str):
        agreed = isinstance(full, str) and isinstance(small, str)
        assert agreed, f"in full {_described(full)}, scaled {_described(small)}"
        return str(full)
    _compare(full, small, data)
    return "same" if whole is not None and np.array_equal(full, whole) else "changed"


def pixels_of(data: bytes) -> Pixels:
    return np.asarray(decode_image(data))


def _outcome(data: bytes, *, scaled: bool) -> Pixels | str:
    try:
        if scaled:
            return np.asarray(decode_for_box(data, lambda whole: (0, 0, *whole), SIDE).image)
        return pixels_of(data)
    except ImageDecodeError as error:
        refused = error
    assert refused.reason in REASONS, refused.reason
    assert f": {refused.reason}" in str(refused), str(refused)
    return refused.reason


def _compare(full: Pixels, small: Pixels, data: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = _by_pil(data, scaled=False), _by_pil(data, scaled=True)
    for name, ours, theirs in zip(("full", "scaled"), (full, small), expected, strict=True):
        assert ours.shape == theirs.shape, f"{name}: {ours.shape}, PIL has {theirs.shape}"
        # Two ways of laying on white differ in their rounding.
        off = np.abs(ours.astype(int) - theirs).max(initial=0)
        assert off <= 1, f"{name}: {off} levels from PIL's picture"


def _by_pil(data: bytes, *, scaled: bool) -> Pixels:
    """The picture by PIL's own means, a JPEG perhaps at an eighth, a quarter or a half."""
    with Image.open(io.BytesIO(data)) as image:
        if scaled and image.format in ("JPEG", "MPO"):
            scale = next((s for s in (8, 4, 2) if min(image.size) >= s * SIDE), 1)
            image.draft("RGB", (image.width // scale, image.height // scale))
        image.load()
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I;16"):
            grey = np.rint(np.asarray(upright).astype(float) / 257).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if upright.has_transparency_data:
            clear = upright.convert("RGBA")
            white = Image.new("RGBA", clear.size, "white")
            return np.asarray(Image.alpha_composite(white, clear).convert("RGB"))
        return np.asarray(upright.convert("RGB"))


def _described(outcome: Pixels | str) -> str:
    return repr(outcome) if isinstance(outcome, str) else f"a picture {outcome.shape}"
