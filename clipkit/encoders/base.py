"""What an encoder is: pixels or tokens in, feature vectors out, and what others may ask it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from clipkit.encoders.packing import Packed
from clipkit.errors import UserError
from clipkit.ranges import check_choice, check_whole

Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "squash"]
LayerGroup = Sequence[nn.Module | nn.Parameter]

# The statistics of OpenAI's CLIP training pictures, used wherever nothing else is said.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

IMAGE_KEY = "model.image_encoder"
MOST_PIXELS = 8192
"""The longest side that an encoder may ask of pictures: all of them become as large."""


class Encoder(nn.Module, ABC):
    """What both sides share: a feature width, groups for locking, what a checkpoint carries."""

    feature_dim: int

    def __init__(self, *, feature_dim: int) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self._held_in_eval: list[nn.Module] = []

    def layer_groups(self) -> list[LayerGroup]:
        """Modules and parameters from bottom to top, each parameter in exactly one group."""
        return [[self]]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters of this encoder that never decay, such as position tables."""
        return set()

    def carried(self) -> dict[str, object]:
        """Constructor arguments that replace what the constructor read from outside."""
        return {}

    def hold_in_eval(self, modules: list[nn.Module]) -> None:
        """Keep modules that `locking.lock` froze in evaluation whenever the encoder trains."""
        self._held_in_eval = modules
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        # Whoever switches the whole model to training passes here, so no hook has to remember it.
        super().train(mode and self not in self._held_in_eval)
        for module in self._held_in_eval:
            if module is not self:
                module.eval()
        return self


class ImageEncoder(Encoder):
    """Pixels in [0, 1], (B, 3, H, W), to features (B, feature_dim); owns their mean and std."""

    image_size: int
    interpolation: Interpolation
    resize_mode: ResizeMode
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        feature_dim: int,
        image_size: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        interpolation: Interpolation = "bicubic",
        resize_mode: ResizeMode = "shortest",
    ) -> None:
        check_whole(f"{IMAGE_KEY}.feature_dim", feature_dim)
        check_whole(f"{IMAGE_KEY}.image_size", image_size, most=MOST_PIXELS)
        check_choice(f"{IMAGE_KEY}.interpolation", interpolation, get_args(Interpolation))
        check_choice(f"{IMAGE_KEY}.resize_mode", resize_mode, get_args(ResizeMode))
        super().__init__(feature_dim=feature_dim)
        self.image_size = image_size
        self.interpolation = interpolation
        self.resize_mode = resize_mode
        self.register_buffer("mean", _of_channels("mean", mean))
        self.register_buffer("std", _of_channels("std", std))

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] to zero mean and unit deviation, by this encoder's own statistics."""
        return (images - self.mean) / self.std

    def try_size(self, size: int) -> None:
        """Run on an empty picture of a size; fails, with whatever it fails, where it is refused."""
        shape_of_features(self, size)

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Float pixels in [0, 1], not yet normalised, (B, 3, H, W) -> (B, feature_dim)."""


class TextEncoder(Encoder):
    """Tokens (B, L) to features (B, feature_dim).

    `trim_is_exact` says that padding after the longest caption of a batch may be left out without
    changing any feature; where it is false, tokens are padded to the whole context.
    """

    trim_is_exact: bool = False

    @abstractmethod
    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids, int64, (B, L) -> (B, feature_dim)."""


class PackingTextEncoder(TextEncoder):
    """A text encoder that also takes captions without their padding, where `trim_is_exact`."""

    @abstractmethod
    def look_up(self, tokens: Tensor) -> Tensor:
        """Token ids, int64, (T,) -> their vectors in the token table, (T, W)."""

    @abstractmethod
    def forward(self, tokens: Tensor, packed: Packed | None = None) -> Tensor:
        """Token ids, int64, (B, L) -> (B, feature_dim).

        With `packed`, the real tokens among them, no layer but attention computes padding.
        """


def _of_channels(key: str, values: Sequence[float]) -> Tensor:
    """Return three statistics of pixels to compute with, (1, 3, 1, 1)."""
    numbers = [float(value) for value in values]
    is_std = key == "std"
    if (
        len(numbers) != 3
        or not all(map(math.isfinite, numbers))
        or (is_std and min(numbers) <= 0.0)
    ):
        above = " above 0" if is_std else ""
        raise UserError(
            f"{IMAGE_KEY}.{key}: {list(values)} is not accepted, it takes three numbers{above}"
        )
    return torch.tensor(numbers).view(1, 3, 1, 1)


def shape_of_features(module: nn.Module, size: int) -> torch.Size:
    """Return the shape of what a module gives for one picture of a size, in evaluation."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            try:  # shapes alone cost nothing, even for the largest tower
                picture = torch.empty(1, 3, size, size, device="meta")
                features: Tensor = torch.func.functional_call(module, shapes, (picture,))
            except Exception:  # a wrong size, or a module that has to look at numbers
                features = module(torch.zeros(1, 3, size, size).to(next(module.parameters())))
    finally:
        module.train(training)
    return features.shape
