"""When two gradients are the same, and what is said of them where they are not."""

import pytest
import torch
from torch import nn

from clipkit.check.gradients import (
    _any_equal,
    _differences,
    _factor,
    _moving_parts,
    _off_zero,
    few_pairs,
)
from clipkit.encoders import ConvNet, TimmImageEncoder
from clipkit.heads import MLPHead
from tests.test_pieces import made


def test_a_difference_is_relative_to_the_parameters_largest():
    expected = {"a": torch.tensor([100.0, 1.0]), "b": torch.tensor([0.01])}
    found = {"a": torch.tensor([100.0, 2.0]), "b": torch.tensor([0.03])}
    assert _differences(found, expected) == pytest.approx({"a": 0.01, "b": 2})


def test_rounding_where_the_gradient_is_zero_is_no_difference():
    expected = {"a": torch.ones(2).double(), "key_bias": torch.full((2,), 1e-18).double()}
    found = {"a": torch.ones(2).double(), "key_bias": torch.full((2,), -3e-17).double()}
    assert _differences(found, expected)["key_bias"] < 1e-10
    # But a gradient where none belongs is one, however small it is.
    found["key_bias"] += 1e-10
    assert _differences(found, expected)["key_bias"] > 1e-5


@pytest.mark.parametrize("wrong", [None, torch.tensor([float("nan"), 2.0])])
def test_a_gradient_that_is_missing_or_not_a_number_differs(wrong):
    differences = _differences({"a": wrong}, {"a": torch.tensor([1.0, 2.0])})
    assert differences["a"] >= 1


def test_a_gradient_that_is_only_too_large_is_told():
    expected = torch.tensor([1.0, -2.0]).double()
    assert _factor(3 * expected, expected) == pytest.approx(3)
    assert _factor(expected + 0.1, expected) is None
    assert _factor(expected, 0 * expected) is None


def test_ranks_that_were_given_the_same_pairs():
    rows = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    assert not _any_equal(rows)
    assert _any_equal([*rows, torch.tensor([2, 1])])


def test_what_moves_while_it_trains_is_named():
    assert _moving_parts(made()) == []

    def tower():
        return TimmImageEncoder(
            "test_vit", image_size=32, drop_path_ratio=0.1, patch_drop_ratio=0.5
        )

    assert _moving_parts(made(image_encoder=tower)) == ["patch dropout", "stochastic depth"]

    def head(in_dim, out_dim):
        return MLPHead(in_dim, out_dim, hidden_dim=8, dropout=0.1)

    small = {"image_encoder": lambda: ConvNet(image_size=32, widths=(8,))}
    assert _moving_parts(made(head=head, **small)) == ["batch norm", "dropout"]
    # What is frozen is in evaluation mode anyway.
    assert _moving_parts(made(**small, lock_image=0)) == []


def test_parameters_at_zero_are_drawn_the_same_on_every_rank():
    one, other = made(), made()
    for module in (one, other):
        nn.init.zeros_(module.text_encoder.final_norm.weight)
        _off_zero(module)
    assert all(parameter.any() for parameter in one.parameters())
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter, other.get_parameter(name), msg=name)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_few_pairs_divide_by_the_ranks_and_are_a_batch_at_most(ranks):
    module = made()
    for batch_size in (ranks, 2 * ranks, 600 * ranks):
        pairs = few_pairs(module, batch_size, ranks)
        assert pairs % ranks == 0
        assert 0 < pairs <= min(batch_size, 256)
    assert few_pairs(module, 600, 1) == 256

    class Heavy(ConvNet):
        def forward(self, images):
            for _ in range(3):
                super().forward(images)
            return super().forward(images)

    def heavy():
        return Heavy(image_size=512, widths=(256, 256, 256), stem_stride=1)

    assert few_pairs(made(image_encoder=heavy), 600, 1) < 256
