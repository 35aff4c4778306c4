"""Lock a tower, or all but its top, as in LiT (https://arxiv.org/abs/2111.07991)."""

from collections.abc import Iterable

from torch import nn

from clipkit.encoders.base import Encoder, ImageEncoder, LayerGroup
from clipkit.errors import UserError


def lock(encoder: Encoder, open_groups: int) -> None:
    """Freeze all but the top `open_groups` layer groups; 0 freezes the whole encoder.

    Frozen layers stay in evaluation when the encoder is switched to training: no dropout, and
    BatchNorm neither uses nor updates the statistics of the batch.

    Raises:
        UserError: the encoder has fewer groups than that.
    """
    groups = encoder.layer_groups()
    if not 0 <= open_groups <= len(groups):
        key = "model.lock_image" if isinstance(encoder, ImageEncoder) else "model.lock_text"
        raise UserError(
            f"{key}: {open_groups} layer groups of {type(encoder).__name__} cannot be left open, "
            f"accepted are 0 (all locked) to {len(groups)} (all open)"
        )
    closed = len(groups) - open_groups
    frozen = {id(parameter) for group in groups[:closed] for parameter in _parameters(group)}
    for parameter in encoder.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
    encoder.hold_in_eval(_wholly_within(encoder, frozen))


def _parameters(group: LayerGroup) -> Iterable[nn.Parameter]:
    for part in group:
        yield from [part] if isinstance(part, nn.Parameter) else part.parameters()


def _wholly_within(module: nn.Module, frozen: set[int]) -> list[nn.Module]:
    """The largest modules below `module` that have parameters, all of them frozen."""
    parameters = list(module.parameters())
    if not parameters:
        return []
    if all(id(parameter) in frozen for parameter in parameters):
        return [module]
    return [found for child in module.children() for found in _wholly_within(child, frozen)]
