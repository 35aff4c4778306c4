"""The small conv net."""

from typing import Any

import pytest
import torch
from torch import nn

from clipkit.encoders.convnet import ConvNet
from clipkit.errors import UserError


def tiny(**changes: Any) -> ConvNet:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"image_size": 16, "widths": (4, 8), "feature_dim": 6}
    return ConvNet(**defaults | changes)


@pytest.mark.parametrize("stem_stride", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 7, 16, 33])
def test_shape_at_any_size(stem_stride: int, size: int) -> None:
    encoder = tiny(stem_stride=stem_stride).eval()
    assert encoder(torch.rand(2, 3, size, size)).shape == (2, encoder.feature_dim)


def test_gradient_reaches_every_parameter() -> None:
    encoder = tiny(blocks=(1, 2), dropout=0.1)
    encoder(torch.rand(8, 3, 16, 16)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
    # The second norm of a block starts at zero and so hides what is before it for one step only.
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("norm2.weight"):
                parameter.fill_(1.0)
    encoder.zero_grad()
    encoder(torch.rand(8, 3, 16, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


def test_layer_groups_hold_each_parameter_once() -> None:
    encoder = tiny(blocks=2)
    modules = [module for group in encoder.layer_groups() for module in group]
    grouped = [id(p) for m in modules if isinstance(m, nn.Module) for p in m.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in encoder.parameters())


def test_pixels_are_normalised_inside() -> None:
    images = torch.rand(2, 3, 16, 16)
    plain, shifted = (
        tiny(mean=(0, 0, 0), std=(1, 1, 1)).eval(),
        tiny(mean=(0.5,) * 3, std=(0.25,) * 3).eval(),
    )
    torch.testing.assert_close(shifted(images), plain((images - 0.5) / 0.25))


def test_memory_layout_does_not_change_the_features() -> None:
    encoder, images = tiny().eval(), torch.rand(2, 3, 16, 16)
    features = encoder(images)
    torch.testing.assert_close(encoder.to(memory_format=torch.channels_last)(images), features)


@pytest.mark.parametrize("wrong", [{"blocks": (1,)}, {"blocks": 0}, {"widths": ()}])
def test_stages_that_do_not_match_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"^model\.image_encoder\.blocks: "):
        tiny(**wrong)
