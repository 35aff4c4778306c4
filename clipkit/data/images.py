"""Pictures to pixels: decoding, resizing for evaluation, random views for training.

Everything leaves as uint8, (3, H, W): the device scales it to [0, 1], the image encoder normalises.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from clipkit.data.picture_files import ImageDecodeError as ImageDecodeError
from clipkit.data.picture_files import opened
from clipkit.encoders.base import Interpolation, ResizeMode
from clipkit.errors import UserError

RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
WHITE = (255, 255, 255)
LUMA = (0.299, 0.587, 0.114)

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


class SmallerPicture(NamedTuple):
    """An RGB picture that was made smaller; a view of it has the box that the full one's had."""

    image: Image.Image
    full_size: tuple[int, int]


Source = bytes | str | os.PathLike[str] | Image.Image | SmallerPicture

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FIRST_ON_ITS_SIDE = 5  # from here on width and height change places
_LEFT_WAS_LAST, _TOP_WAS_LAST = (2, 3, 6, 7), (3, 4, 7, 8)
# What libjpeg can decode to without ever making the full picture.
_DRAFT_SCALES = (8, 4, 2)
# A strip longer than this many times its short side is cut before it is resized: a line of
# 1 x 10,000 pixels would pass through 1.5 GB of which a centre crop of 224 x 224 is kept.
_LONGEST_STRIP = 16


def decode_image(source: Source) -> Image.Image:
    """Any picture as upright RGB, with transparency composited on white.

    A file is JPEG, PNG, WebP, GIF, BMP, TIFF, PPM or AVIF, whatever its name, and has at most 2**27
    pixels; of an animation the first frame is decoded. Wide pixels become eight bits: 16-bit grey,
    and 32-bit integers that exceed 255, by 1/257; floating point times 255 where nothing exceeds 1.

    Raises:
        ImageDecodeError: it cannot be read or decoded; an OSError with a `reason`.
    """
    if isinstance(source, SmallerPicture):
        source = source.image
    with opened(source) as image:
        image.load()  # first, since PIL turns a TIFF upright in loading it
        return _to_rgb(_upright(image, _orientation(image)))


class Decoded(NamedTuple):
    """An upright RGB picture, perhaps smaller than its file says, and what lies where in it."""

    image: Image.Image
    box: Box  # what was asked for
    whole: Box  # the picture, whose edges may lie inside the outermost pixels of a smaller one


def decode_for_box(
    source: Source, choose_box: Callable[[tuple[int, int]], Box], size: int
) -> Decoded:
    """Any picture as upright RGB, decoded no larger than a view of a box in it needs.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where the box keeps `size` pixels a side, which spares
    most of its inverse transform and of the resizing; everything else is as `decode_image` has it.

    Args:
        source: The picture. One that is open already is decoded in full, and left as it is.
        choose_box: From the full upright width and height to the box, in full-size pixels.
        size: Pixels a side of the view that the box is to become.

    Raises:
        ImageDecodeError: it cannot be read or decoded; an OSError with a `reason`.
    """
    if isinstance(source, SmallerPicture):
        return _decoded_already(source, choose_box(source.full_size))
    with opened(source) as image:
        scalable = image is not source and _is_scalable(image)
        if not scalable:
            image.load()  # first, since not every format knows size and orientation before
        orientation = _orientation(image)
        width, height = image.size if orientation < _FIRST_ON_ITS_SIDE else image.size[::-1]
        box = choose_box((width, height))
        scale = _draft(image, box, size) if scalable else 1.0
        image = _to_rgb(_upright(image, orientation))
    # A half of 641 pixels is 321. What is too much lies at the right and the bottom of the file,
    # so at the left and the top of a picture that is mirrored.
    x = image.width - width / scale if orientation in _LEFT_WAS_LAST else 0.0
    y = image.height - height / scale if orientation in _TOP_WAS_LAST else 0.0

    def placed(left: float, top: float, right: float, bottom: float) -> Box:
        return left / scale + x, top / scale + y, right / scale + x, bottom / scale + y

    return Decoded(image, placed(*box), placed(0, 0, width, height))


def _decoded_already(smaller: SmallerPicture, box: Box) -> Decoded:
    image, (width, height) = smaller
    x, y = image.width / width, image.height / height
    placed = (box[0] * x, box[1] * y, box[2] * x, box[3] * y)
    return Decoded(image, placed, (0, 0, *image.size))


@contextmanager
def naming_broken(name: str) -> Iterator[None]:
    """Whatever fails inside, in reading or decoding a picture, ends as a sentence that names it.

    Raises:
        UserError: the picture cannot be opened or is broken.
    """
    try:
        yield
    except OSError as error:
        message = f"data: the picture {name} is broken: {error}; mend it or take it out"
        raise UserError(message) from error


def resize_for_eval(
    image: Image.Image,
    size: int,
    resize_mode: ResizeMode = "shortest",
    interpolation: Interpolation = "bicubic",
) -> Image.Image:
    """An RGB picture as size x size: shortest side resized and centre kept, or all of it squashed.

    The pixels are those of torchvision's Resize and CenterCrop, hence of CLIP and open_clip.
    """
    resampling = RESAMPLING[interpolation]
    if resize_mode == "squash":
        return image.resize((size, size), resampling)
    image = _cut_strip(image)
    width, height = image.size
    short = min(width, height)
    image = image.resize((int(size * width / short), int(size * height / short)), resampling)
    left, top = round((image.width - size) / 2.0), round((image.height - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def to_uint8(image: Image.Image) -> Tensor:
    """An RGB picture as a uint8 tensor (3, H, W)."""
    pixels = np.asarray(image)  # (H, W, 3), read-only: torch needs memory it may write to
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crop, geometry and colour of training pictures; by default exactly CLIP's mild crop.

    A view depends on nothing but the picture and the generator given. Every call draws the same
    count of numbers, so switching one field on leaves what the others do as it was.

    Args:
        scale: Least and greatest share of the area that a crop keeps.
        ratio: Least and greatest width over height of a crop.
        flip: Probability of mirroring left and right.
        rotation: Greatest rotation, in degrees, either way.
        zoom: Least and greatest magnification on top of the crop; below 1 the surroundings come in.
        shift: Greatest move along each side, as a share of it.
        aspect: Greatest stretch of one side against the other: 0.2 is up to a fifth.
        fill: What lies outside the picture: white, or its outermost pixels continued.
        brightness: Greatest change of brightness; 0.2 multiplies by 0.8 to 1.2.
        contrast: Greatest change of contrast around the mean grey.
        saturation: Greatest change of saturation.
        hue: Greatest turn of the hue, as a share of the circle (at most 0.5).
        tint: Greatest change of each colour channel on its own.
        gray: Probability of taking all colour away.
        blur: Probability of a Gaussian blur.
        blur_radius: Least and greatest deviation of the blur, in output pixels.
        erase: Probability of covering one rectangle with a random plain colour.
        erase_area: Least and greatest share of the area covered.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotation: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shift: float = 0.0
    aspect: float = 0.0
    fill: Literal["white", "edge"] = "white"
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    tint: float = 0.0
    gray: float = 0.0
    blur: float = 0.0
    blur_radius: tuple[float, float] = (0.1, 1.0)
    erase: float = 0.0
    erase_area: tuple[float, float] = (0.02, 0.2)

    def __post_init__(self) -> None:
        for names, accepts, accepted in _RANGES:
            for name in names:
                if not accepts(getattr(self, name)):
                    raise UserError(
                        f"data.augment.{name}: {getattr(self, name)!r} is not {accepted}"
                    )

    def __call__(
        self,
        source: Source,
        size: int,
        interpolation: Interpolation,
        rng: np.random.Generator,
    ) -> Tensor:
        """Any picture to one random view of it, uint8 (3, size, size).

        What is encoded is decoded here, no larger than the view needs; it fails as `decode_image`.
        """
        draws = rng.random(_NUM_DRAWS).tolist()
        crop, geometry, colour, rest = draws[:40], draws[40:46], draws[46:54], draws[54:]
        decoded = decode_for_box(source, lambda full: self._crop_box(full, crop), size)
        if self.rotation or self.shift or self.aspect or self.zoom != (1.0, 1.0):
            view = self._warped(decoded, size, interpolation, geometry)
        else:
            # In one pass, so that the filter sees the true neighbours at the border of the box.
            view = decoded.image.resize((size, size), RESAMPLING[interpolation], decoded.box)
            if geometry[0] < self.flip:
                view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        view = self._coloured(view, colour)
        if rest[0] < self.blur:
            view = view.filter(ImageFilter.GaussianBlur(_between(self.blur_radius, rest[1])))
        pixels = to_uint8(view)
        if rest[2] < self.erase:
            self._erase(pixels, rest[3:])
        return pixels

    def side_needed(self, size: int) -> int:
        """Return how long a picture's short side must be for no view of it to be enlarged."""
        narrowest = min(self.ratio[0], 1.0 / self.ratio[1])
        share = math.sqrt(self.scale[0] * min(narrowest, 1.0))  # of the short side, that is kept
        magnified = max(self.zoom[1], 1.0) * math.sqrt(1.0 + self.aspect)
        return math.ceil(size * magnified / share)

    def _crop_box(
        self, image_size: tuple[int, int], draws: list[float]
    ) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of a random crop: ten attempts, then the largest centre."""
        width, height = image_size
        for area, shape, x, y in zip(*[iter(draws)] * 4, strict=True):
            wanted = width * height * _between(self.scale, area)
            ratio = math.exp(_between((math.log(self.ratio[0]), math.log(self.ratio[1])), shape))
            w, h = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _warped(
        self,
        decoded: Decoded,
        size: int,
        interpolation: Interpolation,
        draws: list[float],
    ) -> Image.Image:
        """Crop and geometry in one transform: what a rotation brings in is real picture."""
        flip, turn, zoom, stretch, shift_x, shift_y = draws
        resampling = RESAMPLING[interpolation]
        image, box, whole = decoded
        x, y = whole[:2]
        left, top, right, bottom = box[0] - x, box[1] - y, box[2] - x, box[3] - y
        full_width, full_height = whole[2] - x, whole[3] - y
        # PIL's resize averages over what it shrinks, its transform does not: so the picture is
        # first resized until the crop has the output's size, and the transform works at about 1:1.
        shrink_x, shrink_y = min(1.0, size / (right - left)), min(1.0, size / (bottom - top))
        width, height = (
            max(1, round(full_width * shrink_x)),
            max(1, round(full_height * shrink_y)),
        )
        shrink_x, shrink_y = width / full_width, height / full_height
        image = image.resize((width, height), resampling, whole)

        magnify = _between(self.zoom, zoom)
        tall = (1.0 + self.aspect) ** ((2.0 * stretch - 1.0) / 2.0)
        crop_w, crop_h = (right - left) * shrink_x, (bottom - top) * shrink_y
        step_x, step_y = crop_w / (magnify * tall) / size, crop_h / (magnify / tall) / size
        mirror = -1.0 if flip < self.flip else 1.0
        angle = math.radians(self.rotation) * (2.0 * turn - 1.0)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = (mirror * cos * step_x, -sin * step_y, mirror * sin * step_x, cos * step_y)
        centre_x = (left + right) / 2.0 * shrink_x + self.shift * crop_w * (2.0 * shift_x - 1.0)
        centre_y = (top + bottom) / 2.0 * shrink_y + self.shift * crop_h * (2.0 * shift_y - 1.0)

        if self.fill == "edge":
            reach = (
                size / 2.0 * (abs(matrix[0]) + abs(matrix[1])),
                size / 2.0 * (abs(matrix[2]) + abs(matrix[3])),
            )
            border = (
                math.ceil(
                    max(
                        0.0,
                        *(
                            reach[0] - min(centre_x, width - centre_x),
                            reach[1] - min(centre_y, height - centre_y),
                        ),
                    )
                )
                + 1
            )
            image = Image.fromarray(
                np.pad(np.asarray(image), ((border, border), (border, border), (0, 0)), "edge")
            )
            centre_x, centre_y = centre_x + border, centre_y + border
        a, b, d, e = matrix
        half = size / 2.0
        return image.transform(
            (size, size),
            Image.Transform.AFFINE,
            (a, b, centre_x - (a + b) * half, d, e, centre_y - (d + e) * half),
            resampling,
            fillcolor=WHITE,
        )

    def _coloured(self, image: Image.Image, draws: list[float]) -> Image.Image:
        """Brightness, contrast, saturation, hue, tint and gray as one matrix on the colours."""
        is_gray = draws[0] < self.gray
        brightness, contrast, saturation, hue, *tint = (2.0 * draw - 1.0 for draw in draws[1:])
        if not (
            is_gray or self.brightness or self.contrast or self.saturation or self.hue or self.tint
        ):
            return image
        luma = np.tile(np.asarray(LUMA), (3, 1))  # every output channel the luma
        keep = 0.0 if is_gray else 1.0 + self.saturation * saturation
        matrix = luma + keep * (np.eye(3) - luma)
        if self.hue:
            matrix = matrix @ _hue_rotation(self.hue * hue)
        matrix *= 1.0 + self.tint * np.asarray(tint)[:, None]
        matrix *= 1.0 + self.brightness * brightness
        offset = np.zeros((3, 1))
        if self.contrast:
            factor = 1.0 + self.contrast * contrast
            mean = image.reduce(image.size).getpixel((0, 0))
            offset[:] = (1.0 - factor) * float(np.asarray(LUMA) @ matrix @ np.asarray(mean))
            matrix *= factor
        return image.convert(
            "RGB", tuple(np.concatenate([matrix, offset], axis=1).ravel().tolist())
        )

    def _erase(self, pixels: Tensor, draws: list[float]) -> None:
        area, shape, x, y, *colour = draws
        size = pixels.shape[-1]
        side = size * math.sqrt(_between(self.erase_area, area))
        ratio = math.exp(_between((math.log(1 / 2), math.log(2)), shape) / 2.0)
        w, h = min(size, max(1, round(side * ratio))), min(size, max(1, round(side / ratio)))
        left, top = int(x * (size - w + 1)), int(y * (size - h + 1))
        pixels[:, top : top + h, left : left + w] = (
            (torch.tensor(colour) * 256).to(torch.uint8).view(3, 1, 1)
        )


# Ten attempts at a crop (four each), geometry six, colour eight, blur two, erasing eight.
_NUM_DRAWS = 64


def augmentation(chosen: Augmentation | bool) -> Augmentation | None:
    """Return what a choice stands for: true is CLIP's mild crop, false none."""
    if isinstance(chosen, bool):
        return Augmentation() if chosen else None
    return chosen


def _is_range(low: float, high: float) -> Callable[[Sequence[float]], bool]:
    return lambda pair: len(pair) == 2 and low <= pair[0] <= pair[1] <= high


_RANGES: list[tuple[tuple[str, ...], Callable[..., bool], str]] = [
    (
        ("scale", "erase_area"),
        _is_range(1e-4, 1.0),
        "two rising shares of the area, above 0 and at most 1",
    ),
    (("ratio", "zoom"), _is_range(1e-2, 1e2), "two rising numbers above 0"),
    (("blur_radius",), _is_range(0.0, 1e3), "two rising numbers of pixels, from 0"),
    (
        ("flip", "gray", "blur", "erase"),
        lambda value: 0.0 <= value <= 1.0,
        "a probability from 0 to 1",
    ),
    (("rotation",), lambda value: 0.0 <= value <= 180.0, "degrees from 0 to 180"),
    (("aspect",), lambda value: value >= 0.0, "0 or more"),
    (("hue",), lambda value: 0.0 <= value <= 0.5, "a share of the colour circle from 0 to 0.5"),
    (
        ("shift", "brightness", "contrast", "saturation", "tint"),
        lambda value: 0.0 <= value <= 1.0,
        "a share from 0 to 1",
    ),
    (("fill",), lambda value: value in ("white", "edge"), "white or edge"),
]


def _between(bounds: tuple[float, float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _hue_rotation(turn: float) -> NDArray[np.float64]:
    """The RGB matrix that turns chroma by a share of the circle, in YIQ, and leaves luma alone."""
    to_yiq = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    angle = 2.0 * math.pi * turn
    cos, sin = math.cos(angle), math.sin(angle)
    rotation = np.array([(1.0, 0.0, 0.0), (0.0, cos, -sin), (0.0, sin, cos)])
    matrix: NDArray[np.float64] = np.linalg.inv(to_yiq) @ rotation @ to_yiq
    return matrix


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; an unreadable EXIF block is no reason to lose a picture."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # whatever a broken block of metadata trips over
        return 1
    return int(orientation) if orientation in _UPRIGHT else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _is_scalable(image: Image.Image) -> bool:
    """Whether it is a JPEG of cosines; a lossless one has no quantisation tables, and no scales."""
    return isinstance(image, JpegImageFile) and bool(image.quantization)


def _draft(image: Image.Image, box: Box, size: int) -> float:
    """Have a JPEG decoded as small as leaves the box the size a side; how much smaller that is."""
    width, height = image.size
    short = min(box[2] - box[0], box[3] - box[1])
    scale = next((scale for scale in _DRAFT_SCALES if short >= scale * size), 1)
    drafted = image.draft("RGB", (width // scale, height // scale))
    return 1.0 if drafted is None else width / drafted[1][2]


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()  # only then is its transparency known
    if image.mode.startswith(("I", "F")):
        image = _eight_bit_gray(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", rgba.size, WHITE)
        image.paste(rgba, mask=rgba.getchannel("A"))
    image = image.convert("RGB")  # for RGB a copy, which outlives the file it was read from
    image.info.clear()  # an EXIF orientation that was followed must not be followed again
    return image


def _eight_bit_gray(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16") or (image.mode == "I" and pixels.max(initial=0.0) > 255.0):
        pixels = pixels / 257.0
    elif image.mode == "F":
        pixels = np.nan_to_num(pixels, posinf=255.0, neginf=0.0)
        if pixels.max(initial=0.0) <= 1.0:
            pixels = pixels * 255.0
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _cut_strip(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = _LONGEST_STRIP * min(width, height)
    if max(width, height) <= longest:
        return image
    width, height = min(width, longest), min(height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
