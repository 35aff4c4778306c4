"""Any timm model as an image tower, with the pixel statistics and resizing it was made for."""

import difflib
import math
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from clipkit.encoders.base import IMAGE_KEY as KEY
from clipkit.encoders.base import (
    MOST_PIXELS,
    ImageEncoder,
    Interpolation,
    LayerGroup,
    ResizeMode,
    shape_of_features,
)
from clipkit.errors import UserError
from clipkit.pieces import counting_norms, leave_out_reruns
from clipkit.ranges import check_ratio, check_whole

# What timm calls our arguments.
OPTIONS = {
    "drop_path_rate": "drop_path_ratio",
    "patch_drop_rate": "patch_drop_ratio",
    "dynamic_img_size": "any_size",
}
# Parameters that hold one row for each position, or stand at one, by the last part of their name.
POSITION_PARTS = ("pos_embed", "rel_pos", "relative_position_bias_table", "cls_token", "reg_token")


class TimmImageEncoder(ImageEncoder):
    """A timm model without its classifier, (B, 3, H, W) -> (B, feature_dim).

    Image size, mean, std, interpolation and resize mode are the model's own where left out. A ViT
    with a class token that starts from nothing draws its weights as open_clip's does.

    Args:
        name: a name timm knows, with or without a weight tag (`vit_base_patch32_clip_224.openai`).
        pretrained: fetch the model's weights from the hub; position tables follow `image_size`.
        weights: a local .safetensors, .pt, .pth or .bin file instead; prefixes such as open_clip's
            `visual.trunk.` are found and cut, position tables resized, classifiers left out.
        drop_path_ratio: stochastic depth, up to this ratio in the last block.
        patch_drop_ratio: patches left out of each training step (https://arxiv.org/abs/2212.00794).
        gradient_checkpointing: keep the inputs of the blocks alone, and run each again for its
            gradient.
        any_size: a ViT takes pictures of other sizes too, and resamples its position table for
            them in each forward pass; what `data.image_sizes` needs.

    Raises:
        UserError: a name, size, option or weight file that timm or the model does not take.
    """

    def __init__(
        self,
        name: str,
        *,
        image_size: int | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        drop_path_ratio: float = 0.0,
        patch_drop_ratio: float = 0.0,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: Interpolation | None = None,
        resize_mode: ResizeMode | None = None,
        gradient_checkpointing: bool = False,
        any_size: bool = False,
    ) -> None:
        import timm

        from clipkit.encoders.class_token import (
            leave_patches_out_of_the_last_block,
            pools_its_class_token,
        )
        from clipkit.encoders.initialisation import draw_as_clip

        config = _pretrained_config(timm, name)
        if pretrained and weights is not None:
            raise UserError(
                f"{KEY}.pretrained: true and {KEY}.weights: {weights} exclude each other"
            )
        options = _drop_options(drop_path_ratio, patch_drop_ratio)
        if any_size and config.fixed_input_size:
            options["dynamic_img_size"] = True
        native_size = config.input_size[-1]
        size = native_size if image_size is None else image_size
        check_whole(f"{KEY}.image_size", size, most=MOST_PIXELS)
        trunk = _create(
            timm, name, native_size if pretrained else size, options, pretrained=pretrained
        )
        if pretrained and size != native_size and config.fixed_input_size:
            hub_weights = trunk.state_dict()
            trunk = _create(timm, name, size, options)
            _load(trunk, hub_weights, source=f"{KEY}.pretrained: the hub's file")
        if weights is not None:
            _load(trunk, _read_tensors(weights), source=f"{KEY}.weights: {weights}")
        elif not pretrained and pools_its_class_token(trunk):
            draw_as_clip(trunk)
        # SigLIP was trained on squashed pictures, though timm evaluates it on crops.
        squashed = config.crop_mode == "squash" or "siglip" in name
        super().__init__(
            feature_dim=_measured_feature_dim(trunk, name, size),
            image_size=size,
            mean=mean or config.mean,
            std=std or config.std,
            interpolation=interpolation
            or ("bilinear" if config.interpolation == "bilinear" else "bicubic"),
            resize_mode=resize_mode or ("squash" if squashed else "shortest"),
        )
        self.trunk = trunk
        leave_patches_out_of_the_last_block(trunk)
        self.any_size = any_size
        self.convolutional = _is_convolutional(trunk)
        if self.convolutional:
            trunk.to(memory_format=torch.channels_last)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            _checkpoint_blocks(trunk, name)

    def forward(self, images: Tensor) -> Tensor:
        if self.gradient_checkpointing:
            leave_out_reruns(counting_norms([self.trunk]))
        pixels = self.normalise(images)
        if self.convolutional:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.trunk(pixels)
        return features

    def layer_groups(self) -> list[LayerGroup]:
        from timm.models import group_parameters

        if not hasattr(self.trunk, "group_matcher"):
            return [[self]]
        groups = group_parameters(self.trunk, self.trunk.group_matcher(coarse=False))
        parameters = dict(self.trunk.named_parameters())
        return [[parameters[name] for name in groups[index]] for index in sorted(groups)]

    def no_weight_decay(self) -> set[str]:
        listed = self.trunk.no_weight_decay() if hasattr(self.trunk, "no_weight_decay") else ()
        names = [name for name, _ in self.trunk.named_parameters()]
        positions = (name for name in names if name.rpartition(".")[2].startswith(POSITION_PARTS))
        return {f"trunk.{name}" for name in {*listed, *positions}.intersection(names)}

    def carried(self) -> dict[str, object]:
        return {
            "pretrained": False,
            "weights": None,
            # The statistics behind a name may change with the version of timm.
            "image_size": self.image_size,
            "mean": self.mean.flatten().tolist(),
            "std": self.std.flatten().tolist(),
            "interpolation": self.interpolation,
            "resize_mode": self.resize_mode,
        }


def _pretrained_config(timm: ModuleType, name: str) -> Any:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() lists them"
        raise UserError(f"{KEY}.name: {name} is not a model of timm {timm.__version__}, {hint}")
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError:
        architecture = name.partition(".")[0]
        tags = [tagged.partition(".")[2] for tagged in timm.list_pretrained(f"{architecture}.*")]
        raise UserError(
            f"{KEY}.name: {name} names no weights of {architecture}, "
            f"accepted tags: {', '.join(tags) or 'none'}"
        ) from None


def _is_convolutional(trunk: nn.Module) -> bool:
    # A ViT has one convolution, which cuts the patches.
    return sum(isinstance(module, nn.Conv2d) for module in trunk.modules()) > 2


def _drop_options(drop_path_ratio: float, patch_drop_ratio: float) -> dict[str, float]:
    options = {}
    ratios = {"drop_path_rate": drop_path_ratio, "patch_drop_rate": patch_drop_ratio}
    for option, ratio in ratios.items():
        check_ratio(f"{KEY}.{OPTIONS[option]}", ratio)
        if ratio > 0.0:
            options[option] = ratio
    return options


def _create(
    timm: ModuleType,
    name: str,
    size: int,
    options: Mapping[str, float],
    *,
    pretrained: bool = False,
) -> Any:
    # Only a model whose size is built in (a position table, windows) takes the argument.
    sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **sized, **options)
    except TypeError as error:
        refused = [argument for option, argument in OPTIONS.items() if option in str(error)]
        if not refused:
            raise
        accepted = "false" if refused[0] == "any_size" else "0"
        raise UserError(
            f"{KEY}.{refused[0]}: {name} does not have this option, accepted is {accepted}"
        ) from None
    except Exception as error:
        if pretrained:
            raise UserError(
                f"{KEY}.pretrained: the weights of {name} could not be had from the hub "
                f"({_first_line(error)}), accepted without a network: false, or {KEY}.weights: FILE"
            ) from error
        raise UserError(
            f"{KEY}: timm cannot build {name} for {size} x {size} pixels: {_first_line(error)}"
        ) from error


def _checkpoint_blocks(trunk: Any, name: str) -> None:
    try:
        trunk.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise UserError(
            f"{KEY}.gradient_checkpointing: {name} does not have it, accepted is false"
        ) from None


def _measured_feature_dim(trunk: nn.Module, name: str, size: int) -> int:
    """The width of what the model really returns, from a pass over one empty picture."""
    try:
        shape = shape_of_features(trunk, size)
    except Exception as error:
        raise UserError(
            f"{KEY}.image_size: {name} does not take {size}{_accepted_sizes(trunk)} "
            f"({_first_line(error)})"
        ) from error
    if len(shape) != 2:
        raise UserError(
            f"{KEY}.name: {name} gives features of shape {tuple(shape)}, "
            "accepted is one vector for each picture"
        )
    return shape[1]


def _accepted_sizes(trunk: nn.Module) -> str:
    patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    features = getattr(trunk, "feature_info", None)
    step = patch[0] if patch else features[-1]["reduction"] if features else None
    return f", accepted are multiples of {step}" if step else ""


def _read_tensors(path: str) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(
            f"{KEY}.weights: {path} is not a file, accepted are .safetensors, .pt, .pth and .bin"
        )
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{KEY}.weights: {path} is not a file of tensors ({_first_line(error)})"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(contents, dict) and isinstance(contents.get(wrapper), dict):
            contents = contents[wrapper]
    entries = contents.items() if isinstance(contents, dict) else ()
    tensors = {name: value for name, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{KEY}.weights: {path} holds no tensors by name")
    return tensors


def _load(trunk: Any, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Load tensors under any prefix and of any grid, leaving classifiers out and nothing else."""
    wanted = trunk.state_dict()
    found = _native_names(trunk, _without_prefix(tensors, wanted))
    classifier = trunk.pretrained_cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else classifier
    heads = tuple(f"{name.partition('.')[0]}." for name in classifiers)
    found = {
        name: _resized_positions(value, wanted[name]) if name in wanted else value
        for name, value in found.items()
        if name in wanted or not name.startswith(heads)
    }
    problems = {
        "missing": [n for n in wanted if n not in found and not n.endswith("num_batches_tracked")],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": [n for n in wanted if n in found and found[n].shape != wanted[n].shape],
    }
    if any(problems.values()):
        told = "; ".join(f"{_listed(names)} {what}" for what, names in problems.items() if names)
        raise UserError(f"{source} does not fit the model: {told}")
    trunk.load_state_dict(found, strict=False)


def _without_prefix(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors below the prefix (`visual.trunk.`, ...) under which most of `wanted` is found."""
    matches: dict[str, int] = {}
    for name in tensors:
        for cut in [0, *(index + 1 for index, letter in enumerate(name) if letter == ".")]:
            if name[cut:] in wanted:
                matches[name[:cut]] = matches.get(name[:cut], 0) + 1
    # Of a file in a foreign layout little matches by chance: it is left as it is.
    prefix = max(matches, key=matches.__getitem__, default="")
    if matches.get(prefix, 0) < len(wanted) / 2:
        prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _native_names(trunk: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names and shapes of OpenAI's, open_clip's and other towers to timm's, by timm's own rules."""
    rules = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    try:
        converted: dict[str, Tensor] = rules(tensors, trunk) if rules else tensors
    except Exception:  # the rules expect what is not there: what is missing will be listed
        return tensors
    return converted


def _resized_positions(table: Tensor, wanted: Tensor) -> Tensor:
    """Absolute positions, (tokens, width) or (1, tokens, width), for another square grid."""
    if table.shape == wanted.shape or table.ndim != wanted.ndim or table.ndim not in (2, 3):
        return table
    if table.shape[-1] != wanted.shape[-1]:
        return table
    from timm.layers.pos_embed import resample_abs_pos_embed

    for prefix_tokens in (0, 1, 2, 5):  # none, class token, distillation token, registers
        places = [shape[-2] - prefix_tokens for shape in (table.shape, wanted.shape)]
        if all(count > 0 and math.isqrt(count) ** 2 == count for count in places):
            grid = math.isqrt(places[1])
            resized: Tensor = resample_abs_pos_embed(
                table.reshape(1, *table.shape[-2:]),
                new_size=[grid, grid],
                num_prefix_tokens=prefix_tokens,
            )
            return resized.reshape(wanted.shape)
    return table


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return textwrap.shorten(line, 200, placeholder=" ...")
