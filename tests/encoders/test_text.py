import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.encoders import BagOfTokens, TextEncoder, TextTransformer
from clipkit.encoders.text import Activation, TextPooling
from clipkit.errors import UserError
from clipkit.tokenizer import TextContract

END, PAD = 7, 0  # the end id is not the highest, so that pooling by argmax would show


def contract(**changes: int) -> TextContract:
    values = {"vocab_size": 40, "context_length": 12, "start_id": 6, "end_id": END, "pad_id": PAD}
    return TextContract(**{**values, **changes}, pad_to_context=False, clean="lower")


TOKENS = torch.tensor([[6, 30, 31, 32, END], [6, 39, END, PAD, PAD], [6, END, PAD, PAD, PAD]])


def padded(tokens: Tensor, length: int, pad_id: int = PAD) -> Tensor:
    return F.pad(tokens, (0, length - tokens.shape[1]), value=pad_id)


def small(contract: TextContract, **arguments: object) -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(contract, width=16, depth=2, heads=4, **arguments).double().eval()


def naive(tower: TextTransformer, tokens: Tensor) -> Tensor:
    """The tower token by token and head by head, all layers' outputs after the final norm."""
    rows = []
    for caption in tokens:
        hidden = tower.token_embedding.weight[caption] + tower.position_embedding[: len(caption)]
        for block in tower.blocks:
            normed = block.attention_norm(hidden)
            attention = block.attention
            query, key, value = (
                linear(normed) for linear in (attention.query, attention.key, attention.value)
            )
            mixed = torch.zeros_like(hidden)
            for head in torch.arange(tower.feature_dim).chunk(attention.heads):
                for place in range(len(caption)):
                    seen = place + 1 if tower.causal else len(caption)
                    scores = key[:seen, head] @ query[place, head] / math.sqrt(len(head))
                    mixed[place, head] = torch.softmax(scores, dim=0) @ value[:seen, head]
            hidden = hidden + attention.out(mixed)
            normed = block.mlp_norm(hidden)
            expanded = block.mlp.expand(normed)
            gelu = expanded * (1 + torch.erf(expanded / math.sqrt(2))) / 2
            hidden = hidden + block.mlp.shrink(gelu)
        rows.append(tower.final_norm(hidden))
    return torch.stack(rows)


@pytest.mark.parametrize("causal", [True, False])
def test_against_the_loop_version_for_every_pooling(causal: bool) -> None:
    ends = [4, 2, 1]
    for pooling, pick in (
        ("end", lambda hidden, row: hidden[row, ends[row]]),
        ("first", lambda hidden, row: hidden[row, 0]),
        ("last", lambda hidden, row: hidden[row, -1]),
        ("mean", lambda hidden, row: hidden[row, : ends[row] + 1].mean(dim=0)),
    ):
        tower = small(contract(), causal=causal, pooling=pooling, attend_padding=True)
        hidden = naive(tower, TOKENS)
        expected = torch.stack([pick(hidden, row) for row in range(len(TOKENS))])
        torch.testing.assert_close(tower(TOKENS), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("causal", "pooling", "attend_padding", "exact"),
    [
        (causal, pooling, attend_padding, pooling != "last" and (causal or not attend_padding))
        for causal, pooling, attend_padding in product(
            (True, False), ("end", "first", "mean", "last"), (True, False)
        )
    ],
)
def test_trim_is_exact_where_it_says_so_and_only_there(
    causal: bool, pooling: TextPooling, attend_padding: bool, exact: bool
) -> None:
    tower = small(contract(), causal=causal, pooling=pooling, attend_padding=attend_padding)
    assert tower.trim_is_exact is exact
    trimmed, full = tower(TOKENS), tower(padded(TOKENS, 12))
    assert torch.allclose(trimmed, full, rtol=0, atol=1e-13) is exact


def test_padding_with_the_end_token_gives_the_same_features() -> None:
    for causal, pooling in ((True, "end"), (False, "end"), (False, "mean")):
        tower = small(contract(), causal=causal, pooling=pooling)
        other = small(contract(pad_id=END), causal=causal, pooling=pooling)
        tokens = torch.where(TOKENS == PAD, END, TOKENS)
        torch.testing.assert_close(other(padded(tokens, 12, END)), tower(TOKENS))


def test_a_causal_tower_ignores_what_follows_the_first_end() -> None:
    tower = small(contract())
    second_end = torch.tensor([[6, 30, END, 39, END, 3]])
    torch.testing.assert_close(tower(second_end), tower(second_end[:, :3]))
    without_end = torch.tensor([[6, 30, 31]])
    torch.testing.assert_close(tower(without_end), naive(tower, without_end)[:, -1])


@pytest.mark.parametrize("width", [128, 192])
def test_every_tensor_is_drawn_as_clip_draws_it(width: int) -> None:
    depth = 3
    torch.manual_seed(0)
    tower = TextTransformer(
        contract(vocab_size=1000, context_length=77), width=width, depth=depth, heads=4
    )
    residual = width**-0.5 * (2 * depth) ** -0.5
    normal = {
        "token_embedding.weight": 0.02,
        "position_embedding": 0.01,
        **{f"attention.{name}.weight": width**-0.5 for name in ("query", "key", "value")},
        "attention.out.weight": residual,
        "mlp.expand.weight": (2 * width) ** -0.5,
        "mlp.shrink.weight": residual,
    }
    constant = {
        **{f"attention.{name}.bias": 0.0 for name in ("query", "key", "value", "out")},
        **{f"{norm}.weight": 1.0 for norm in ("attention_norm", "mlp_norm", "final_norm")},
        **{f"{norm}.bias": 0.0 for norm in ("attention_norm", "mlp_norm", "final_norm")},
    }
    uniform = {"mlp.expand.bias": width**-0.5, "mlp.shrink.bias": (4 * width) ** -0.5}
    for full_name, tensor in tower.named_parameters():
        name = full_name.split(".", 2)[2] if full_name.startswith("blocks.") else full_name
        if name in normal:
            assert tensor.std().item() == pytest.approx(normal[name], rel=0.02), full_name
            assert abs(tensor.mean().item()) < 0.05 * normal[name], full_name
        elif name in constant:
            assert torch.equal(tensor, torch.full_like(tensor, constant[name])), full_name
        else:  # PyTorch's own rule for the biases of a linear layer
            assert tensor.abs().max().item() <= uniform[name], full_name
            assert tensor.std().item() == pytest.approx(uniform[name] / math.sqrt(3), rel=0.15)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2),
        ("quick_gelu", lambda x: x / (1 + torch.exp(-1.702 * x))),
        (
            "gelu_tanh",
            lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
    ],
)
def test_activations(activation: Activation, function: nn.Module) -> None:
    mlp = small(contract(), activation=activation).blocks[0].mlp
    values = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(mlp.activation(values), function(values))


def test_norm_eps_and_mlp_ratio_reach_the_blocks() -> None:
    tower = small(contract(), norm_eps=1e-6, mlp_ratio=2.5)
    assert {m.eps for m in tower.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert tower.blocks[0].mlp.expand.out_features == 40


@pytest.mark.parametrize("pooling", ["end", "mean"])
@pytest.mark.parametrize("kind", [TextTransformer, BagOfTokens])
def test_gradient_reaches_every_parameter(kind: type[TextEncoder], pooling: str) -> None:
    arguments = {"heads": 2, "depth": 2, "pooling": pooling} if kind is TextTransformer else {}
    tower = kind(contract(context_length=5), width=8, **arguments)
    assert tower(TOKENS).shape == (3, tower.feature_dim)
    (tower(TOKENS) ** 3).sum().backward()
    untouched = [
        name
        for name, parameter in tower.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    # A bias common to all keys cancels in the softmax.
    assert all(name.endswith("attention.key.bias") for name in untouched)
    assert tower.no_weight_decay() <= dict(tower.named_parameters()).keys()


def test_dropout_is_for_training_only() -> None:
    for tower in (
        TextTransformer(contract(), width=8, depth=1, heads=2, dropout=0.5),
        BagOfTokens(contract(), width=8, dropout=0.5),
    ):
        assert not torch.equal(tower.train()(TOKENS), tower(TOKENS))
        assert torch.equal(tower.eval()(TOKENS), tower(TOKENS))


def test_a_bag_has_no_order_and_no_padding() -> None:
    bag = BagOfTokens(contract(), width=16, hidden_dim=4).double()
    assert bag.trim_is_exact
    assert bag.mlp.expand.out_features == 4
    shuffled = torch.tensor([[31, 6, 32, 30, END]])
    torch.testing.assert_close(bag(shuffled), bag(TOKENS[:1]), rtol=0, atol=1e-14)
    torch.testing.assert_close(bag(padded(TOKENS, 12)), bag(TOKENS), rtol=0, atol=1e-14)
    mean = bag.token_embedding.weight[[6, 39, END]].mean(dim=0)
    torch.testing.assert_close(bag(TOKENS)[1], bag.mlp(bag.norm(mean)))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"width": 10, "heads": 4}, r"text_encoder\.heads: 4 does not divide the width 10"),
        ({"pooling": "argmax"}, r"text_encoder\.pooling: argmax .* end or last or first or mean"),
        ({"activation": "relu"}, r"text_encoder\.activation: relu .* quick_gelu"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TextTransformer(contract(), **{"width": 8, "heads": 2, "depth": 1, **arguments})


def test_tokens_longer_than_the_position_table() -> None:
    tower = small(contract(context_length=4))
    with pytest.raises(UserError, match=r"context_length: tokens are 5 long, .* up to 4"):
        tower(TOKENS)
