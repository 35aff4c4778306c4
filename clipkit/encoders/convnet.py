"""A small residual conv net for small pictures, which learns from scratch in minutes on a CPU."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.encoders.base import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGE_KEY,
    ImageEncoder,
    Interpolation,
    LayerGroup,
    ResizeMode,
)
from clipkit.errors import UserError
from clipkit.pieces import counting_norms, run_again
from clipkit.ranges import check_ratio, check_whole


class ConvNet(ImageEncoder):
    """A stem, stages of residual 3x3 blocks that halve the picture, a coarse pool, a linear layer.

    The pool averages to a grid of `pool` x `pool`, so where something lies is still known, and the
    linear layer mixes the grid into features (B, feature_dim).

    Args:
        image_size: Side of the pictures it is made for; other sizes work too.
        widths: Channels of each stage; the first runs at 1/`stem_stride` of the picture's side,
            each later one at half the side before it.
        blocks: Residual blocks in each stage: one number for all, or one for each.
        stem_stride: Stride of the first convolution; 2 costs a quarter of what 1 does.
        pool: Side of the grid that the last stage is averaged to.
        feature_dim: Width of the features.
        dropout: Dropout on the pooled grid.
        gradient_checkpointing: Keep the inputs of the stages alone, and run each again for its
            gradient.
    """

    def __init__(
        self,
        *,
        image_size: int = 64,
        widths: tuple[int, ...] = (64, 128, 192),
        blocks: int | tuple[int, ...] = 1,
        stem_stride: Literal[1, 2, 4] = 2,
        pool: int = 2,
        feature_dim: int = 256,
        dropout: float = 0.0,
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
        interpolation: Interpolation = "bicubic",
        resize_mode: ResizeMode = "shortest",
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(
            feature_dim=feature_dim,
            image_size=image_size,
            mean=mean,
            std=std,
            interpolation=interpolation,
            resize_mode=resize_mode,
        )
        for stage_width in widths:
            check_whole(f"{IMAGE_KEY}.widths", stage_width)
        check_whole(f"{IMAGE_KEY}.pool", pool, most=64)
        check_ratio(f"{IMAGE_KEY}.dropout", dropout)
        counts = (blocks,) * len(widths) if isinstance(blocks, int) else tuple(blocks)
        if not widths or len(counts) != len(widths) or min(counts) < 1:
            raise UserError(
                f"{IMAGE_KEY}.blocks: {blocks!r} does not give each stage of the widths "
                f"{widths!r} at least one block"
            )
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 2 * stem_stride + 1, stem_stride, stem_stride, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        stages: list[nn.Module] = []
        width = widths[0]
        for index, (stage_width, count) in enumerate(zip(widths, counts, strict=True)):
            layers: list[nn.Module] = []
            for block in range(count):
                layers.append(
                    _Block(width, stage_width, stride=2 if index > 0 and block == 0 else 1)
                )
                width = stage_width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.gradient_checkpointing = gradient_checkpointing
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(width * pool * pool, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Float pixels in [0, 1], (B, 3, H, W) -> (B, feature_dim)."""
        # A CPU convolves a third faster where the channels lie side by side.
        pixels = self.normalise(images).contiguous(memory_format=torch.channels_last)
        maps = self.stem(pixels)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for stage in self.stages:
            maps = run_again(stage, maps, norms=counting_norms([stage])) if again else stage(maps)
        features: Tensor = self.project(self.dropout(self.pool(maps).flatten(1)))
        return features

    def layer_groups(self) -> list[LayerGroup]:
        """The stem, each stage, the linear layer."""
        return [[self.stem], *([stage] for stage in self.stages), [self.project]]


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut that is averaged where they stride."""

    def __init__(self, in_width: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        nn.init.zeros_(
            self.norm2.weight
        )  # the block starts as its shortcut, which trains faster (1706.02677)
        shortcut: list[nn.Module] = []
        if stride > 1:
            shortcut.append(nn.AvgPool2d(stride, ceil_mode=True))
        if in_width != width:
            shortcut += [nn.Conv2d(in_width, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, maps: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(maps)), inplace=True)
        inner = self.norm2(self.conv2(inner))
        return F.relu(inner + self.shortcut(maps), inplace=True)
