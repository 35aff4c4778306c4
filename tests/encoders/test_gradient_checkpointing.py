"""Blocks that run again for their gradient: exact, with less kept, counted once."""

import copy

import pytest
import torch

from clipkit.encoders import (
    ConvNet,
    HuggingFaceTextEncoder,
    TextTransformer,
    TimmImageEncoder,
)
from clipkit.encoders.locking import lock
from clipkit.errors import UserError
from clipkit.pieces import embed_pieces
from clipkit.tokenizer import Tokenizer

CONTRACT = Tokenizer("english").contract
TOKENS = Tokenizer("english")(["two red circles and a green square", "a cat", "a dog"])
PICTURES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()


def text_transformer(**options):
    return TextTransformer(CONTRACT, width=16, depth=4, heads=2, dropout=0.2, **options)


def bert(**options):
    pytest.importorskip("transformers")
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 4,
              "num_attention_heads": 2, "intermediate_size": 32}  # fmt: skip
    return HuggingFaceTextEncoder(
        CONTRACT, name="small", pretrained=False, config=config, **options
    )


def vit(**options):
    return TimmImageEncoder(
        "test_vit", image_size=64, patch_drop_ratio=0.4, drop_path_ratio=0.3, **options
    )


def resnet(**options):
    return TimmImageEncoder("test_resnet", image_size=64, **options)


def convnet(**options):
    return ConvNet(image_size=64, widths=(8, 8, 8), blocks=2, dropout=0.2, **options)


TOWERS = {
    "text": (text_transformer, TOKENS),
    "bert": (bert, TOKENS),
    "vit": (vit, PICTURES),
    "resnet": (resnet, PICTURES),
    "convnet": (convnet, PICTURES),
}
WITH_BATCH_NORM = ("resnet", "convnet")


def pair(name):
    """A tower that keeps everything, its twin that keeps inputs alone, and what they are shown."""
    make, inputs = TOWERS[name]
    torch.manual_seed(0)
    plain = make().double()
    twin = make(gradient_checkpointing=True).double()
    twin.load_state_dict(plain.state_dict())
    return plain, twin, inputs


def step(tower, inputs, *, micro_batch=None):
    """Features, gradients, buffers, random numbers drawn, and the bytes kept in between."""
    torch.manual_seed(3)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = embed_pieces(
            tower, [(piece,) for piece in inputs.split(micro_batch or len(inputs))],
            modules=[tower], recompute=micro_batch is not None,
        )  # fmt: skip
    held = sum(kept.values()) - sum(p.nbytes for p in tower.parameters() if p.data_ptr() in kept)
    if features.requires_grad:
        features.pow(3).sum().backward()
    gradients = {n: p.grad for n, p in tower.named_parameters() if p.grad is not None}
    buffers = {n: b.clone() for n, b in tower.named_buffers()}
    return features, gradients, buffers, torch.rand(1), held


def assert_alike(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    for one, other in zip(found[1:3], expected[1:3], strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-12, msg=name)
    assert torch.equal(found[3], expected[3])


@pytest.mark.parametrize("name", TOWERS)
def test_the_gradient_is_that_of_the_plain_tower_and_less_is_kept(name):
    plain, twin, inputs = pair(name)
    expected, found = step(plain, inputs), step(twin, inputs)
    assert_alike(found, expected)
    assert found[1].keys() == dict(twin.named_parameters()).keys()
    assert found[-1] < 0.8 * expected[-1]


@pytest.mark.parametrize("name", TOWERS)
def test_also_within_micro_batches(name):
    """Then a block runs three times: for the loss, for the inputs of the blocks, for itself."""
    plain, twin, inputs = pair(name)
    assert_alike(step(twin, inputs, micro_batch=2), step(plain, inputs, micro_batch=2))


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_running_values_move_once(name):
    _, twin, inputs = pair(name)
    before = {n: b.clone() for n, b in twin.named_buffers()}
    for micro_batch in (None, 2):
        tower = copy.deepcopy(twin)
        after = step(tower, inputs, micro_batch=micro_batch)[2]
        for key, value in after.items():
            if key.endswith("num_batches_tracked"):
                assert value == before[key] + 1, key


def test_norms_that_take_the_place_of_others_move_once():
    """As `sync_batchnorm` has it, after the encoder was made; and a copy has norms of its own."""
    _, twin, inputs = pair("resnet")
    step(twin, inputs)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                fresh = torch.nn.BatchNorm2d(child.num_features).double()
                fresh.load_state_dict(child.state_dict())
                setattr(module, name, fresh)
    other = copy.deepcopy(twin)
    step(other, inputs)
    assert {int(b) for n, b in other.named_buffers() if "tracked" in n} == {2}
    assert {int(b) for n, b in twin.named_buffers() if "tracked" in n} == {1}


@pytest.mark.parametrize("name", TOWERS)
def test_evaluation_and_locked_towers_are_as_without(name):
    plain, twin, inputs = pair(name)
    assert torch.equal(twin.eval()(inputs), plain.eval()(inputs))
    for tower in (plain, twin):
        lock(tower.train(), 1)
    expected, found = step(plain, inputs), step(twin, inputs)
    assert_alike(found, expected)
    lock(twin, 0)
    assert not step(twin, inputs)[0].requires_grad


def test_towers_that_do_not_have_it():
    with pytest.raises(UserError, match=r"gradient_checkpointing: vgg11 .* accepted is false"):
        TimmImageEncoder("vgg11", image_size=32, gradient_checkpointing=True)
