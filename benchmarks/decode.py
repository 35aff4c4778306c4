"""JPEG bytes to a training tensor on one core: clipkit against open_clip's training transform.

python -m benchmarks.decode [--data ../shared/data] [--rounds 9]

Both get the same bytes, picture by picture in turn, and both draw CLIP's mild random crop. The
pictures are photos brought to 640 x 480 and encoded at quality 90; those at hand were smaller, so
a second case adds grain, until a file is as large as such photos are from a camera. open_clip
returns normalised floats, clipkit bytes that the device normalises; `clipkit_normalised` does that
on the core too. Time is the processor's, of all threads, which a busy machine leaves alone.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import interleaved
from benchmarks.interleaved import spread
from clipkit.data.images import RESAMPLING, Augmentation, decode_for_box, decode_image, to_uint8

SIZE, QUALITY = (640, 480), 90
GRAINS = (0.0, 8.0)  # deviation of the grain, in grey levels
OUTPUTS = (224, 64)
GOALS = {"times_as_fast": {"output": 224, "at_least": 2.0}}

View = Callable[[bytes, int], Tensor]  # an encoded picture and its number to a training tensor


def photos(folder: Path, grain: float) -> list[bytes]:
    """Return the folder's photos as JPEG of 640 x 480 at quality 90, with so much grain."""
    return [
        _encoded(path, grain, np.random.default_rng(number))
        for number, path in enumerate(sorted(folder.rglob("*.jpg")))
    ]


def _encoded(path: Path, grain: float, rng: np.random.Generator) -> bytes:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC))
    noise = rng.normal(0.0, grain, (*pixels.shape[:2], 1))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)).save(
        buffer, "JPEG", quality=QUALITY
    )
    return buffer.getvalue()


def sides(output: int) -> dict[str, View]:
    """Return what is compared, each from bytes to a tensor (3, output, output)."""
    from open_clip.transform import image_transform

    transform = image_transform(output, is_train=True)
    augment = Augmentation()
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (transform.transforms[-1].mean, transform.transforms[-1].std)
    )

    def theirs(encoded: bytes, number: int) -> Tensor:
        tensor: Tensor = transform(Image.open(io.BytesIO(encoded)))
        return tensor

    def ours(encoded: bytes, number: int) -> Tensor:
        return augment(encoded, output, "bicubic", np.random.default_rng((0, 0, number)))

    def normalised(encoded: bytes, number: int) -> Tensor:
        return (ours(encoded, number).float() / 255.0 - mean) / std

    def decoded_in_full(encoded: bytes, number: int) -> Tensor:
        image = decode_image(encoded)
        return augment(image, output, "bicubic", np.random.default_rng((0, 0, number)))

    return {
        "open_clip": theirs,
        "clipkit": ours,
        "clipkit_normalised": normalised,
        "clipkit_decoded_in_full": decoded_in_full,
    }


def measure(pictures: list[bytes], output: int, rounds: int) -> dict[str, Any]:
    """Time every side on every picture, in turn."""
    views = sides(output)
    _round(pictures[:5], views)  # warm up
    milliseconds: dict[str, list[float]] = {name: [] for name in views}
    for _ in range(rounds):
        for name, value in _round(pictures, views).items():
            milliseconds[name].append(value)
    theirs = milliseconds["open_clip"]
    return {
        "kilobytes_a_picture": round(sum(map(len, pictures)) / len(pictures) / 1e3, 1),
        "output": output,
        "milliseconds_a_picture": {name: spread(values) for name, values in milliseconds.items()},
        "times_as_fast_as_open_clip": {
            name: spread([slow / fast for slow, fast in zip(theirs, values, strict=True)])
            for name, values in milliseconds.items()
            if name != "open_clip"
        },
        "grey_levels_from_decoded_in_full": _difference(pictures, views),
        "milliseconds_of_clipkits_parts": parts(pictures, output),
    }


def _round(pictures: list[bytes], views: dict[str, View]) -> dict[str, float]:
    """Return the mean milliseconds a picture of each side."""
    seconds = dict.fromkeys(views, 0.0)
    for number, encoded in enumerate(pictures):
        for name in list(views) if number % 2 == 0 else reversed(views):
            began = time.process_time()
            views[name](encoded, number)
            seconds[name] += time.process_time() - began
    return {name: 1e3 * value / len(pictures) for name, value in seconds.items()}


def _difference(pictures: list[bytes], views: dict[str, View]) -> float:
    """Return the mean absolute difference that the scaled decoding makes."""
    differences = [
        views["clipkit"](encoded, number).float()
        - views["clipkit_decoded_in_full"](encoded, number).float()
        for number, encoded in enumerate(pictures)
    ]
    return round(float(torch.stack(differences).abs().mean()), 3)


def parts(pictures: list[bytes], output: int) -> dict[str, float]:
    """Return where clipkit's milliseconds go, for the box in the middle that crops a twentieth."""
    box = (16.0, 12.0, SIZE[0] - 16.0, SIZE[1] - 12.0)
    decode = partial(decode_for_box, choose_box=lambda _: box, size=output)
    seconds = {"decode": 0.0, "crop_and_resize": 0.0, "to_uint8": 0.0, "draw": 0.0}
    for number, encoded in enumerate(pictures):
        times = [time.process_time()]
        decoded = decode(encoded)
        times.append(time.process_time())
        view = decoded.image.resize((output, output), RESAMPLING["bicubic"], decoded.box)
        times.append(time.process_time())
        to_uint8(view)
        times.append(time.process_time())
        np.random.default_rng((0, 0, number)).random(64).tolist()
        times.append(time.process_time())
        for name, took in zip(seconds, np.diff(times).tolist(), strict=True):
            seconds[name] += took
    return {name: round(1e3 * value / len(pictures), 3) for name, value in seconds.items()}


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    parser = interleaved.parser(__doc__, rounds=9, threads=1)
    interleaved.add_data(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    cases = []
    for grain in GRAINS:
        pictures = photos(options.data / "coco_mini", grain)
        if not pictures:
            parser.error(f"--data: there are no .jpg files in {options.data}/coco_mini")
        cases += [{"grain": grain, **measure(pictures, size, options.rounds)} for size in OUTPUTS]
    result = {
        "pillow": metadata.version("pillow"),
        "pictures": f"{len(pictures)} photos of coco_mini, JPEG of 640 x 480",
        "quality": QUALITY,
        "must_show": GOALS,
        "cases": cases,
    }
    print(interleaved.record("decode", options, result).read_text())


if __name__ == "__main__":
    main()
