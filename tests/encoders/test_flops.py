"""Operations of the towers: the numbers that open_clip's table of profiles gives, and by hand."""

import pytest
import torch

from clipkit.encoders import (
    BagOfTokens,
    ConvNet,
    HuggingFaceTextEncoder,
    TextTransformer,
    TimmImageEncoder,
)
from clipkit.encoders import flops as flops_module
from clipkit.encoders.flops import backward_share, image_operations, text_operations
from clipkit.encoders.locking import lock
from clipkit.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def contract():
    return Tokenizer("english").contract


def of_length(operations, length):
    return operations.total(captions=1, tokens=length, squares=length**2)


# What open_clip's last block computes of tokens that are not pooled: its MLP, 16 w^2 for each.
OF_OTHERS = {
    "vit_base_patch32_clip_224": 16 * 768**2 * 49, "vit_base_patch16_clip_224": 16 * 768**2 * 196
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vit_base_patch32_clip_224", {}, 8.82e9),
        ("vit_base_patch16_clip_224", {}, 35.13e9),
        ("resnet50_clip", {}, 12.22e9),
        ("vit_base_patch32_clip_224", {"patch_drop_ratio": 0.5}, 4.50e9),
    ],
)
def test_image_towers_as_in_open_clip(name, options, expected):
    encoder = TimmImageEncoder(name, **options)
    others = OF_OTHERS.get(name, 0)
    expected -= others * (1 - options.get("patch_drop_ratio", 0))
    weights = {key: value.clone() for key, value in encoder.named_buffers()}
    state = torch.get_rng_state()
    assert image_operations(encoder) == pytest.approx(expected, rel=0.02)
    assert torch.equal(torch.get_rng_state(), state)
    # Running statistics and where the weights lie are as they were.
    assert all(torch.equal(value, weights[key]) for key, value in encoder.named_buffers())
    assert {p.device.type for p in encoder.parameters()} == {"cpu"}
    if options:
        assert image_operations(encoder.eval()) == pytest.approx(8.82e9 - others, rel=0.02)


@pytest.mark.parametrize(("length", "expected"), [(77, 5.96e9), (32, 2.44e9), (16, 1.21e9)])
def test_the_text_tower_as_in_open_clip(contract, length, expected):
    # Its last block computes the MLP, and attention's way out, of tokens that are not pooled.
    expected -= 18 * 512**2 * (length - 1)
    found = of_length(text_operations(TextTransformer(contract), contract), length)
    assert found == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("ratio", [4.0, 2.5])
def test_the_closed_form_is_what_is_counted(contract, ratio):
    encoder = TextTransformer(contract, width=32, depth=3, heads=4, mlp_ratio=ratio)
    formula = text_operations(encoder, contract)
    for length in (5, 77):
        counted = flops_module._counted(encoder, flops_module._caption(contract, length))
        assert of_length(formula, length) == counted
    if ratio == 4.0:
        whole = 3 * (24 * 7 * 32**2 + 4 * 7**2 * 32)
        assert of_length(formula, 7) == whole - 18 * 6 * 32**2


def test_other_text_towers_are_counted_and_fitted(contract):
    bag = text_operations(BagOfTokens(contract, width=32, hidden_dim=64), contract)
    assert bag == pytest.approx((2 * 2 * 32 * 64, 0, 0), abs=1e-3)
    pytest.importorskip("transformers")
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 2, "intermediate_size": 64}  # fmt: skip
    bert = HuggingFaceTextEncoder(contract, name="small", pretrained=False, config=config)
    found = text_operations(bert, contract)
    for length in (3, 20, 77):
        by_hand = 2 * (24 * length * 16**2 + 4 * length**2 * 16)
        assert of_length(found, length) == pytest.approx(by_hand, rel=1e-6)


def test_a_tower_that_looks_at_numbers_is_counted_all_the_same():
    class Looks(ConvNet):
        def forward(self, images):
            assert float(images.sum()) == 0
            return super().forward(images)

    options = {"image_size": 16, "widths": (4, 8)}
    looking = Looks(**options)
    assert image_operations(looking) == image_operations(ConvNet(**options)) > 0
    assert int(looking.stem[1].num_batches_tracked) == 0


def test_the_share_that_a_gradient_passes(contract):
    def share(open_groups):
        encoder = TextTransformer(contract, width=8, depth=4, heads=2)
        lock(encoder, open_groups)
        return backward_share(encoder)

    # The embeddings are a group of their own, and cost nothing.
    assert [share(groups) for groups in (0, 1, 2, 4, 5)] == [0, 0.25, 0.5, 1, 1]
    assert backward_share(BagOfTokens(contract)) == 1
