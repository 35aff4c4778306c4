"""Decoding, evaluation pixels and augmentation."""

import base64
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image, features
from torchvision.transforms import (  # type: ignore[import-untyped]
    CenterCrop,
    Compose,
    InterpolationMode,
    Resize,
)
from torchvision.transforms import functional as TF

from clipkit.data.images import (
    Augmentation,
    ImageDecodeError,
    decode_for_box,
    decode_image,
    resize_for_eval,
    to_uint8,
)
from clipkit.encoders.base import Interpolation
from clipkit.errors import UserError

MODES = {"bicubic": InterpolationMode.BICUBIC, "bilinear": InterpolationMode.BILINEAR}
WHOLE: dict[str, Any] = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
EVERYTHING = Augmentation(
    scale=(0.3, 1.0),
    flip=0.5,
    rotation=20.0,
    zoom=(0.8, 1.2),
    shift=0.1,
    aspect=0.2,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.1,
    tint=0.2,
    gray=0.2,
    blur=0.5,
    erase=0.5,
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


def smooth(size: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, size), np.linspace(0, 255, size))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Colour at every scale, the finer the weaker, as in photos."""
    values, draws = np.zeros((height, width, 3)), np.random.default_rng(seed)
    for cells in (2, 4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(draws.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        values += (np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) - 128) / (
            cells**0.7
        )
    return Image.fromarray(np.clip(values + 128, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "PA", "RGBX"]
)
def test_every_mode_keeps_its_colours(mode: str) -> None:
    image = (
        Image.new("RGB", (5, 4), (255, 255, 255))
        .convert("L" if mode in ("PA", "F") else "RGB")
        .convert(mode)
    )
    decoded = decode_image(image)
    assert decoded.mode == "RGB"
    assert decoded.size == (5, 4)
    assert np.asarray(decoded).min() > 250


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 257, 65535]], dtype=np.uint16), [0, 1, 255]),
        (np.array([[0, 7, 255]], dtype=np.int32), [0, 7, 255]),
        (np.array([[0, 25700, 65535]], dtype=np.int32), [0, 100, 255]),
        (np.array([[0.0, 0.4, 1.0]], dtype=np.float32), [0, 102, 255]),
        (np.array([[-3.0, 100.4, 300.0]], dtype=np.float32), [0, 100, 255]),
    ],
)
def test_wide_pixels_become_eight_bits(values: np.ndarray, expected: list[int]) -> None:
    assert np.asarray(decode_image(Image.fromarray(values)))[0].tolist() == [
        [v] * 3 for v in expected
    ]


def test_sixteen_bit_png_file_is_scaled() -> None:
    data = encoded(Image.fromarray(np.full((2, 2), 51400, dtype=np.uint16)))
    assert decode_image(data).getpixel((0, 0)) == (200, 200, 200)


def palette_with_transparency(alpha: bytes | int) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    return encoded(image, transparency=alpha)


def test_transparency_is_composited_on_white() -> None:
    clear_red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert decode_image(clear_red).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 51)))).getpixel((0, 0)) == (
        255,
        204,
        204,
    )
    assert decode_image(encoded(Image.new("LA", (2, 2), (0, 0)))).getpixel((1, 1)) == (
        255,
        255,
        255,
    )
    for alpha in (0, bytes([0, 255])):
        decoded = decode_image(palette_with_transparency(alpha))
        assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    colour_key = encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert decode_image(colour_key).getpixel((0, 0)) == (255, 255, 255)


def turned(upright: Image.Image, orientation: int, form: str, **options: Any) -> bytes:
    """The file of a camera that was held so."""
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    stored = upright if orientation == 1 else upright.transpose(turns[undo])
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(stored, form, exif=exif, **options)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])  # PIL turns a TIFF by itself
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, form: str) -> None:
    upright = noise(6, 4)
    data = turned(upright, orientation, form)
    decoded = decode_image(data)
    assert np.array_equal(np.asarray(decoded), np.asarray(upright))
    assert np.array_equal(np.asarray(decode_image(decoded)), np.asarray(upright))
    views = [Augmentation()(source, 4, "bicubic", rng(0)) for source in (data, upright)]
    assert torch.equal(*views)


def test_paths_bytes_and_pictures_give_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(noise(9, 7)))
    pictures = [
        decode_image(path),
        decode_image(str(path)),
        decode_image(path.read_bytes()),
        decode_image(noise(9, 7)),
    ]
    assert all(np.array_equal(np.asarray(p), np.asarray(pictures[0])) for p in pictures)


def test_decoding_leaves_the_given_picture_alone() -> None:
    image = noise(3, 3)
    decoded = decode_image(image)
    decoded.putpixel((0, 0), (1, 2, 3))
    assert np.array_equal(np.asarray(image), np.asarray(noise(3, 3)))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("width", "height"), [(64, 64), (130, 97), (97, 131), (33, 500), (1, 1), (1, 7), (41, 20)]
)
def test_evaluation_pixels_are_torchvisions(
    width: int, height: int, interpolation: Interpolation
) -> None:
    image = noise(width, height)
    for size in (32, 65):
        shortest = Compose([Resize(size, MODES[interpolation]), CenterCrop(size)])
        squash = Resize((size, size), MODES[interpolation])
        ours = resize_for_eval(image, size, "shortest", interpolation)
        assert np.array_equal(np.asarray(ours), np.asarray(shortest(image)))
        ours = resize_for_eval(image, size, "squash", interpolation)
        assert np.array_equal(np.asarray(ours), np.asarray(squash(image)))


def test_an_endless_strip_is_cut_before_it_is_resized() -> None:
    ours = resize_for_eval(Image.new("RGB", (100_000, 1), (9, 9, 9)), 224)
    assert ours.size == (224, 224)
    assert ours.getpixel((0, 0)) == (9, 9, 9)


def test_to_uint8_is_channels_first_and_owns_its_memory() -> None:
    image = noise(5, 3)
    pixels = to_uint8(image)
    assert pixels.shape == (3, 3, 5)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image))
    for picture in (image, noise(1, 1)):
        to_uint8(picture).zero_()
        assert np.asarray(picture).max() > 0


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int, int]]:
    """The boxes as they are drawn, in full-size pixels."""
    boxes = []
    draw = Augmentation._crop_box

    def recorded(*arguments: Any) -> tuple[int, int, int, int]:
        boxes.append(draw(*arguments))
        return boxes[-1]

    monkeypatch.setattr(Augmentation, "_crop_box", recorded)
    return boxes


def test_default_crop_is_clips(drawn: list[tuple[int, int, int, int]]) -> None:
    image = smooth(200)
    for index in range(300):
        view = Augmentation()(image, 32, "bicubic", rng(0, index))
        left, top, right, bottom = drawn[-1]
        same = to_uint8(
            TF.resized_crop(
                image, top, left, bottom - top, right - left, [32, 32], MODES["bicubic"]
            )
        )
        difference = (view.int() - same.int()).abs()
        assert difference[:, 2:-2, 2:-2].max() <= 1
        assert difference.max() <= 4  # the border, where theirs does not see beyond the box
    left, top, right, bottom = np.array(drawn).T
    area, ratio = (right - left) * (bottom - top) / 200**2, (right - left) / (bottom - top)
    assert 0.89 < area.min() < 0.91
    assert area.max() <= 1.0
    assert 0.75 < ratio.min() < 0.95
    assert 1.05 < ratio.max() < 4 / 3
    assert left.min() == 0
    assert right.max() == 200


def test_a_crop_sees_its_true_neighbours_at_its_border() -> None:
    image = smooth(200)
    view = Augmentation(scale=(0.25, 0.25), ratio=(1.0, 1.0))(image, 25, "bicubic", rng(3))
    steps = view[0, 12].int().diff()
    assert steps.min() >= 4  # a gradient of 255 / 50 a pixel, up to the last one
    assert steps.max() <= 6


@pytest.mark.parametrize(
    ("full", "box", "size", "decoded"),
    [
        ((640, 480), (0, 0, 640, 480), 224, (320, 240)),
        ((640, 480), (100, 9, 548, 457), 224, (320, 240)),
        ((640, 480), (100, 9, 547, 457), 224, (640, 480)),  # 447 pixels wide
        ((640, 480), (100, 9, 548, 456), 224, (640, 480)),
        ((640, 480), (0, 0, 640, 480), 64, (160, 120)),
        ((641, 483), (0, 0, 641, 483), 64, (161, 121)),
        ((641, 483), (0, 0, 641, 483), 60, (81, 61)),
        ((640, 480), (0, 0, 640, 480), 5, (80, 60)),  # there is nothing below an eighth
        ((640, 480), (300, 200, 310, 220), 5, (320, 240)),
        ((9, 7), (0, 0, 9, 7), 7, (9, 7)),
        ((9, 7), (0, 0, 9, 7), 3, (5, 4)),
        ((1, 1), (0, 0, 1, 1), 8, (1, 1)),
    ],
)
def test_a_jpeg_is_decoded_as_small_as_leaves_the_box_its_pixels(
    full: tuple[int, int], box: tuple[int, ...], size: int, decoded: tuple[int, int]
) -> None:
    image = photo(*full)
    asked = []

    def choose(whole: tuple[int, int]) -> Any:
        asked.append(whole)
        return box

    small = decode_for_box(encoded(image, "JPEG"), choose, size)
    assert small.image.size == decoded
    assert small.image.mode == "RGB"
    scale = (box[2] - box[0]) / (small.box[2] - small.box[0])
    assert scale in (1, 2, 4, 8)
    assert small.box == tuple(side / scale for side in box)
    assert small.whole == (0, 0, full[0] / scale, full[1] / scale)
    assert decode_for_box(encoded(image), choose, size).image.size == full
    assert asked == [full] * 2


def test_a_jpeg_that_is_open_is_left_as_it_is() -> None:
    with Image.open(io.BytesIO(encoded(photo(64, 48), "JPEG"))) as image:
        assert decode_for_box(image, lambda _: (0, 0, 64, 48), 8).image.size == (64, 48)
        assert image.size == (64, 48)


VIEWS = [
    Augmentation(),
    Augmentation(scale=(0.2, 1.0), flip=0.5),
    Augmentation(rotation=20.0, zoom=(0.8, 1.2), shift=0.1, flip=0.5),
    Augmentation(rotation=20.0, zoom=(0.5, 0.7), fill="edge"),
]


def views_agree(data: bytes, size: int, levels: float = 2.0) -> None:
    """Of a JPEG decoded small and of the picture decoded in full: the same, and no shift."""
    full = decode_image(data)
    for index in range(8):
        augment = VIEWS[index % len(VIEWS)]
        generators = [rng(index), rng(index)]
        small, plain = (
            augment(source, size, "bicubic", generator).float()
            for source, generator in zip((data, full), generators, strict=True)
        )
        assert (small - plain).abs().mean() < levels
        assert (small - plain).mean((1, 2)).abs().max() < 1.5
        assert generators[0].random() == generators[1].random()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_scaled_views_agree_with_plain_ones(mode: str, options: dict[str, Any]) -> None:
    data = encoded(photo(321, 243).convert(mode), "JPEG", quality=90, **options)
    for size in (32, 96, 400):
        views_agree(data, size)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("full", [(320, 240), (321, 243), (327, 241)])
def test_scaled_views_are_upright(orientation: int, full: tuple[int, int]) -> None:
    data = turned(photo(*full), orientation, "JPEG", quality=90)
    views_agree(data, 30)
    # On an even slope a shift by a tenth of a pixel shows.
    x, y = np.meshgrid(np.linspace(0, 250, full[0]), np.linspace(0, 250, full[1]))
    slope = Image.fromarray(np.stack([x, y, x], axis=-1).round().astype(np.uint8))
    data = turned(slope, orientation, "JPEG", quality=95, subsampling=0)
    box = (40, 40, 280, 200)
    decoded = decode_for_box(data, lambda whole: box, 20)
    assert decoded.image.width < 50
    view, plain = (
        to_uint8(image.resize((20, 20), Image.Resampling.BICUBIC, box)).float()
        for image, box in ((decoded.image, decoded.box), (slope, box))
    )
    assert (view - plain).mean((1, 2)).abs().max() < 0.6


def test_box_and_draws_are_those_of_the_full_picture(
    drawn: list[tuple[int, int, int, int]],
) -> None:
    data = turned(photo(321, 243), 6, "JPEG")
    for index in range(20):
        for source in (data, decode_image(data)):
            Augmentation(scale=(0.1, 1.0))(source, 32, "bicubic", rng(index))
    assert drawn[::2] == drawn[1::2]
    assert max(bottom - top for _, top, _, bottom in drawn) > 200
    views = [EVERYTHING(data, 32, "bicubic", rng(7)) for _ in range(2)]
    assert torch.equal(*views)


def test_real_photos_agree(shared_data: Path) -> None:
    for path in sorted((shared_data / "coco_mini").rglob("*.jpg"))[:8]:
        # Where a crop of fine detail is just twice the output, libjpeg's half is the crisper one.
        views_agree(path.read_bytes(), 64, levels=4.0)


@pytest.mark.parametrize("orientation", [1, 3])
@pytest.mark.parametrize(
    "fields", [{"scale": (0.5, 0.5)}, {"scale": (0.95, 0.95), "rotation": 1e-9}]
)
def test_scaled_views_are_not_shifted(orientation: int, fields: dict[str, Any]) -> None:
    x, y = np.meshgrid(np.linspace(0, 250, 325), np.linspace(0, 250, 241))
    slope = Image.fromarray(np.stack([x, y, x], axis=-1).round().astype(np.uint8))
    data = turned(slope, orientation, "JPEG", quality=95, subsampling=0)
    augment = Augmentation(ratio=(1.3, 1.34), **fields)
    for index in range(6):
        view, plain = (augment(s, 20, "bicubic", rng(index)).float() for s in (data, slope))
        assert (view - plain).mean((1, 2)).abs().max() < 0.7


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_truncated_jpeg_is_no_view(tmp_path: Path, mode: str, options: dict[str, Any]) -> None:
    path = tmp_path / "cut.jpg"
    whole = encoded(photo(320, 240).convert(mode), "JPEG", **options)
    for kept in (len(whole) // 3, len(whole) // 2, len(whole) - 200, len(whole) - 20):
        path.write_bytes(whole[:kept])
        with pytest.raises(ImageDecodeError, match=r"cut\.jpg"):
            Augmentation()(path, 32, "bicubic", rng(0))
        with pytest.raises(ImageDecodeError, match=f"a picture of {kept} bytes"):
            Augmentation()(whole[:kept], 32, "bicubic", rng(0))
    with pytest.raises(ImageDecodeError):
        Augmentation()(str(tmp_path / "none.jpg"), 32, "bicubic", rng(0))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 3), (17, 16)])
def test_tiny_jpegs_have_views(size: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", size, (40, 40, 40)), "JPEG")
    for output in (1, 2, 8, 50):
        for augment in VIEWS[::3]:
            view = augment(data, output, "bicubic", rng(0))
            assert view.shape == (3, output, output)
            assert (view.int() - 40).abs().max() <= 2


@pytest.mark.skipif(
    (features.version("libjpeg_turbo") or "0") < "3", reason="it cannot read a lossless JPEG"
)
def test_a_lossless_jpeg_has_no_scales() -> None:
    data = base64.b64decode(  # 4 x 4 grey pixels, 0 to 240 in steps of 16, by libjpeg-turbo 3
        "/9j/4AAQSkZJRgABAQAAAQABAAD/wwALCAAEAAQBAREA/8QAFgABAQEAAAAAAAAAAAAAAAAABQcI/9oACAEBAAEA"
        "AM/oIIUBBBCgIIIUBBBD/9k="
    )
    decoded = decode_for_box(data, lambda _: (0, 0, 4, 4), 2)
    assert np.asarray(decoded.image)[..., 0].ravel().tolist() == list(range(0, 256, 16))


def test_view_depends_on_the_generator_alone() -> None:
    image = noise(80, 60)
    views = [EVERYTHING(image, 48, "bicubic", rng(1, 2, 3)) for _ in range(2)]
    assert torch.equal(*views)
    assert views[0].shape == (3, 48, 48)
    assert views[0].dtype == torch.uint8
    assert not torch.equal(views[0], EVERYTHING(image, 48, "bicubic", rng(1, 2, 4)))
    generators = [rng(5), rng(5)]
    Augmentation()(image, 48, "bicubic", generators[0])
    EVERYTHING(image, 48, "bicubic", generators[1])
    assert generators[0].random() == generators[1].random()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (2, 3), (300, 20)])
@pytest.mark.parametrize("fill", ["white", "edge"])
def test_tiny_and_thin_pictures_survive_everything(
    size: tuple[int, int], fill: Literal["white", "edge"]
) -> None:
    image = Image.new("RGB", size, (255, 255, 255))
    for index in range(20):
        view = Augmentation(rotation=180, zoom=(0.2, 5.0), shift=1.0, aspect=2.0, fill=fill)(
            image, 16, "bilinear", rng(index)
        )
        assert view.shape == (3, 16, 16)
        assert view.min() == 255


def test_geometry_without_movement_is_the_picture_itself() -> None:
    image = smooth(64)
    still: dict[str, Any] = WHOLE | {"rotation": 1e-9}
    for size in (64, 32):
        view = Augmentation(**still)(image, size, "bicubic", rng(0))
        expected = to_uint8(resize_for_eval(image, size))
        assert (view.int() - expected.int()).abs().max() <= 1
    for fields in (WHOLE, still):
        mirrored = Augmentation(**fields, flip=1.0)(image, 64, "bicubic", rng(0))
        assert (mirrored.int() - to_uint8(image).flip(-1).int()).abs().max() <= 1


@pytest.mark.parametrize(("fill", "corner"), [("white", 255), ("edge", 40)])
def test_what_lies_outside_is_filled(fill: Literal["white", "edge"], corner: int) -> None:
    shrink = Augmentation(**WHOLE, zoom=(0.5, 0.5), rotation=45, fill=fill)
    view = shrink(Image.new("RGB", (40, 40), (40, 40, 40)), 40, "bicubic", rng(0))
    assert view[0, 0, 0] == corner
    assert view[0, 20, 20] == 40


def test_colour_changes_what_it_says() -> None:
    image = smooth(16)

    def mean(**changes: Any) -> list[float]:
        view = Augmentation(**WHOLE, **changes)(image, 16, "bicubic", rng(0))
        return view.float().mean((1, 2)).tolist()

    assert np.ptp(mean(gray=1.0)) < 1
    assert mean(contrast=0.5) == pytest.approx(mean(), abs=2.0)
    assert np.ptp(np.subtract(mean(tint=0.5), mean())) > 5
    brighter = np.divide(mean(brightness=0.3), mean())
    assert np.ptp(brighter) < 0.02
    assert 0.7 <= brighter[0] <= 1.3
    weights = (0.299, 0.587, 0.114)
    for changes in ({"hue": 0.1}, {"saturation": 0.3}):
        assert np.dot(mean(**changes), weights) == pytest.approx(np.dot(mean(), weights), abs=2.0)


def test_blur_and_erase() -> None:
    image = noise(32, 32)
    blurred = Augmentation(**WHOLE, blur=1.0, blur_radius=(2.0, 2.0))(image, 32, "bicubic", rng(0))
    assert blurred.float().std() < 0.5 * to_uint8(image).float().std()
    erased = Augmentation(**WHOLE, erase=1.0, erase_area=(0.25, 0.25))(image, 32, "bicubic", rng(0))
    covered = (erased != to_uint8(image)).any(0)
    assert 0.2 < covered.float().mean() < 0.3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("flip", 1.5),
        ("scale", (0.0, 1.0)),
        ("scale", (1.0, 0.5)),
        ("ratio", (0.0, 1.0)),
        ("rotation", -1.0),
        ("hue", 0.7),
        ("fill", "black"),
        ("blur_radius", (1.0,)),
        ("brightness", -0.1),
    ],
)
def test_a_value_out_of_range_names_its_key(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^data\.augment\.{field}: .* is not "):
        Augmentation(**{field: value})
