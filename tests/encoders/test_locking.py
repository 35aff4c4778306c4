import copy

import pytest
import torch
from torch import Tensor, nn

from clipkit.encoders import BagOfTokens, ConvNet, TextTransformer, TimmImageEncoder
from clipkit.encoders.base import Encoder
from clipkit.encoders.locking import lock
from clipkit.errors import UserError
from clipkit.tokenizer import TextContract

CONTRACT = TextContract(
    vocab_size=32,
    context_length=8,
    start_id=30,
    end_id=31,
    pad_id=0,
    pad_to_context=False,
    clean="lower",
)


def build(name: str) -> tuple[Encoder, Tensor]:
    images = torch.rand(4, 3, 32, 32)
    tokens = torch.tensor([[30, 5, 6, 31], [30, 7, 31, 0]])
    if name == "TextTransformer":
        return TextTransformer(CONTRACT, width=16, depth=3, heads=2, dropout=0.5), tokens
    if name == "BagOfTokens":
        return BagOfTokens(CONTRACT, width=16), tokens
    if name == "ConvNet":
        return ConvNet(image_size=32, widths=(8, 8), feature_dim=8), images
    return TimmImageEncoder(name, image_size=32), images


NAMES = ["test_vit", "test_resnet", "ConvNet", "TextTransformer", "BagOfTokens"]


@pytest.mark.parametrize("name", NAMES)
def test_groups_hold_every_parameter_once_from_bottom_to_top(name: str) -> None:
    encoder, _ = build(name)
    held = [
        id(parameter)
        for group in encoder.layer_groups()
        for part in group
        for parameter in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    ]
    assert sorted(held) == sorted(id(parameter) for parameter in encoder.parameters())
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    bottom = ("embed", "cls_token", "stem", "trunk.conv1", "trunk.bn1", "position")
    assert any(part in names[held[0]] for part in bottom)


@pytest.mark.parametrize("open_groups", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_moves_only_the_open_top(name: str, open_groups: int) -> None:
    torch.manual_seed(0)
    encoder, inputs = build(name)
    lock(encoder, open_groups)
    model = nn.Sequential(encoder, nn.Linear(encoder.feature_dim, 4)).train()
    before = copy.deepcopy(encoder.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(inputs).square().mean().backward()
    optimizer.step()

    opened = {
        id(parameter)
        for group in encoder.layer_groups()[len(encoder.layer_groups()) - open_groups :]
        for part in group
        for parameter in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    }
    for parameter_name, parameter in encoder.named_parameters():
        assert parameter.requires_grad == (id(parameter) in opened)
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved <= parameter.requires_grad, parameter_name
    if open_groups == 0:  # neither weights nor running statistics
        for key, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, before[key]), key


def test_frozen_batch_norm_stays_as_it_is_and_the_open_one_learns() -> None:
    encoder, inputs = build("test_resnet")
    lock(encoder, 1)
    before = copy.deepcopy(encoder.state_dict())
    encoder.train()(inputs)
    norms = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.BatchNorm2d)}
    changed = {
        n for n in norms if not torch.equal(norms[n].running_mean, before[f"{n}.running_mean"])
    }
    assert changed == {n for n in norms if norms[n].training}
    assert changed
    assert changed < set(norms)
    assert all(norms[n].weight.requires_grad == (n in changed) for n in norms)


def test_a_locked_tower_gives_the_same_features_in_training_as_in_evaluation() -> None:
    for name in ("TextTransformer", "test_resnet"):
        encoder, inputs = build(name)
        lock(encoder, 0)
        for locked in (encoder, copy.deepcopy(encoder)):
            assert torch.equal(nn.Sequential(locked).train()(inputs), locked.eval()(inputs))


def test_more_open_groups_than_there_are() -> None:
    encoder, _ = build("TextTransformer")
    with pytest.raises(
        UserError, match=r"model\.lock_text: 5 .* 0 \(all locked\) to 4 \(all open\)"
    ):
        lock(encoder, 5)
    lock(encoder, 4)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
