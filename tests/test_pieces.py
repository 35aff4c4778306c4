"""Micro-batches and captions by length: the gradient of the whole batch, in float64."""

import itertools

import pytest
import torch
from torch import nn

from clipkit.data.samples import PairCollate, Sample
from clipkit.encoders import BagOfTokens, TextEncoder, TextTransformer
from clipkit.encoders.convnet import ConvNet
from clipkit.encoders.image import TimmImageEncoder
from clipkit.heads import LinearHead, MLPHead
from clipkit.losses import Ids, InfoNCELoss, SigLIPLoss
from clipkit.module import CLIPModule
from clipkit.pieces import Span, embed_pieces, number_of_pieces, spans_of
from clipkit.temperature import Temperature
from clipkit.tokenizer import Tokenizer

CAPTIONS = [
    "a", "two red circles and a small green square", "a cat", "a dog on a very long green sofa",
    "a", "one bird", "an old man who reads the newspaper at night", "a cat", "stairs", "a red car",
    "nothing at all",
]  # fmt: skip


class Drops(nn.Module):
    """A tower that forgets at random."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_dim, out_dim), nn.Dropout(0.3), nn.Tanh())

    def forward(self, features):
        return self.layers(features)


def vit():
    return TimmImageEncoder("test_vit", image_size=32)


def made(micro_batch=None, *, loss=None, image_encoder=vit, text=TextTransformer, head=LinearHead,
         **settings):  # fmt: skip
    torch.manual_seed(0)
    shape = {"width": 16, "depth": 2, "heads": 2} if text is TextTransformer else {"width": 16}
    return CLIPModule(
        image_encoder=image_encoder(),
        text_encoder=lambda contract: text(contract, **shape),
        tokenizer=Tokenizer("english"), image_head=head, text_head=head,
        temperature=Temperature(bias=-2.0), loss=loss or InfoNCELoss(),
        optimizer=torch.optim.AdamW, schedule=lambda optimizer, total_steps: None, embed_dim=8,
        micro_batch=micro_batch, **settings,
    ).double()  # fmt: skip


def batch(size=32):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (len(CAPTIONS), 3, size, size), generator=generator)
    samples = [
        Sample(picture, caption, number, number)
        for number, (picture, caption) in enumerate(zip(pictures.byte(), CAPTIONS, strict=True))
    ]
    return PairCollate(Tokenizer("english"))(samples)


def gradients(module, pairs):
    """The loss of the batch, and the gradient of every parameter."""
    torch.manual_seed(5)
    image, text = module(pairs)
    ids = Ids(pairs["caption_ids"], pairs["image_ids"])
    loss = module.loss(image, text, image, text, offset=0, scale=module.scale,
                       bias=module.temperature.bias, ids=ids, all_ids=ids).loss  # fmt: skip
    loss.backward()
    return loss, {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("loss", [InfoNCELoss(), SigLIPLoss()])
@pytest.mark.parametrize("micro_batch", [1, 4, 11, 64])
def test_micro_batches_have_the_gradient_of_the_batch(micro_batch, loss):
    expected = gradients(made(loss=loss), batch())
    assert {"temperature.log_scale", "temperature.bias"} <= expected[1].keys()
    assert_same(gradients(made(micro_batch, loss=loss), batch()), expected)


def test_what_open_clips_accumulation_does_instead():
    """Its second pass counts the scale once a micro-batch: the gradient is K times too large."""
    module, pairs = made(), batch()
    with torch.no_grad():
        whole = module(pairs)
    for rows in torch.arange(len(CAPTIONS)).split(4):
        part = {k: v[rows] for k, v in pairs.items() if k in ("images", "tokens")}
        image, text = (
            torch.cat([side[: rows[0]], own, side[rows[-1] + 1 :]])
            for side, own in zip(whole, module(part), strict=True)
        )
        module.loss(image, text, image, text, offset=0, scale=module.scale).loss.backward()
    without_ids = made()
    image, text = without_ids(pairs)
    without_ids.loss(image, text, image, text, offset=0, scale=without_ids.scale).loss.backward()
    found, right = module.temperature.log_scale.grad, without_ids.temperature.log_scale.grad
    assert found / right == pytest.approx(3, abs=1e-9)
    name = next(name for name, _ in module.named_parameters() if name.startswith("image_head"))
    torch.testing.assert_close(
        dict(module.named_parameters())[name].grad,
        dict(without_ids.named_parameters())[name].grad, rtol=0, atol=1e-10,
    )  # fmt: skip


def test_the_random_numbers_of_a_piece_are_drawn_once():
    """With dropout, exact means the gradient of the forward pass that was run."""
    images = torch.randn(9, 6, dtype=torch.float64)
    head = Drops(6, 4).double()

    def run(recompute):
        torch.manual_seed(3)
        head.zero_grad()
        found = embed_pieces(
            head, [(i,) for i in images.split(2)], modules=[head], recompute=recompute
        )
        (found**3).sum().backward()
        return found, [p.grad.clone() for p in head.parameters()]

    (kept, expected), (again, found) = run(False), run(True)
    assert torch.equal(kept, again)
    assert (kept == 0).any()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("keep_last", [False, True])
@pytest.mark.parametrize("size", [2, 9])
def test_pieces_are_run_again_from_the_last_to_the_first(size, keep_last):
    images, seen = torch.randn(9, 6), []
    head = nn.Linear(6, 4)
    head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, 0].item()))
    pieces = [(i,) for i in images.split(size)]
    found = embed_pieces(head, pieces, modules=[head], recompute=True, keep_last=keep_last)
    first = [piece[0, 0].item() for (piece,) in pieces]
    assert seen == first
    (found**2).sum().backward()
    kept = keep_last or len(pieces) == 1
    assert seen == [*first, *reversed(first[:-1] if kept else first)]


class Trims(TextEncoder):
    """A user's tower, which does not see its padding and knows nothing of packing."""

    trim_is_exact = True

    def __init__(self, contract, **shape):
        super().__init__(feature_dim=16)
        self.tower = TextTransformer(contract, width=16, depth=2, heads=2)

    def forward(self, tokens):
        return self.tower(tokens)


def test_captions_by_length_have_the_gradient_of_padded_ones():
    for text, head in itertools.product((Trims, BagOfTokens), (LinearHead, MLPHead)):
        pairs = batch()
        expected = gradients(made(text=text, head=head), pairs_without_lengths(pairs))
        assert_same(gradients(made(text=text, head=head), pairs), expected)


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
@pytest.mark.parametrize("settings", [
    {}, {"pooling": "mean"}, {"pooling": "first"}, {"causal": False},
    {"causal": False, "pooling": "mean"},
])  # fmt: skip
def test_captions_without_padding_have_the_gradient_of_padded_ones(settings, micro_batch):
    def text(contract, **shape):
        return TextTransformer(contract, width=16, depth=2, heads=2, **settings)

    pairs = batch()
    expected = gradients(made(text=text), pairs_without_lengths(pairs))
    assert_same(gradients(made(micro_batch, text=text), pairs), expected)


def test_no_layer_but_attention_computes_padding():
    module, pairs = made(), batch()
    rows = []
    module.text_encoder.blocks[0].mlp.register_forward_hook(
        lambda mlp, inputs, output: rows.append(inputs[0].shape[:-1].numel())
    )
    module(pairs)
    assert rows == [sum(pairs["lengths"])]
    assert sum(pairs["lengths"]) < pairs["tokens"].numel()


def test_the_token_table_is_looked_up_once():
    module, pairs = made(3), batch()
    seen = []
    module.text_encoder.token_embedding.weight.register_hook(lambda gradient: seen.append(1))
    looked_up = []
    module.text_encoder.token_embedding.register_forward_hook(
        lambda table, tokens, vectors: looked_up.append(len(tokens[0]))
    )
    gradients(module, pairs)
    assert looked_up == [sum(pairs["lengths"])]  # and not again when a piece is run again
    assert seen == [1]


def pairs_without_lengths(pairs):
    return {k: v for k, v in pairs.items() if k not in ("lengths", "by_length")}


def test_a_tower_that_sees_its_padding_gets_all_of_it():
    def seeing(contract, **shape):
        return TextTransformer(contract, causal=False, attend_padding=True, pooling="last", **shape)

    module = made(3)
    module.text_encoder = seeing(module.tokenizer.contract, width=16, depth=2, heads=2).double()
    other = made()
    other.load_state_dict(module.state_dict())
    other.text_encoder = module.text_encoder
    pairs = batch()
    torch.testing.assert_close(module(pairs).text, other(pairs_without_lengths(pairs)).text)


def test_spans_leave_out_padding_where_it_pays():
    lengths = [40, 16, 16, 16, 8, 8, 8, 8]
    assert spans_of(lengths, pieces=None, overhead=0) == [
        Span(slice(0, 1), 40), Span(slice(1, 4), 16), Span(slice(4, 8), 8),
    ]  # fmt: skip
    assert spans_of(lengths, pieces=None, overhead=40) == [
        Span(slice(0, 1), 40),
        Span(slice(1, 8), 16),
    ]
    assert spans_of(lengths, pieces=None, overhead=10**6) == [Span(slice(0, 8), 40)]
    assert spans_of(lengths, pieces=3, overhead=0) == [
        Span(slice(0, 3), 40), Span(slice(3, 6), 16), Span(slice(6, 8), 8),
    ]  # fmt: skip


def test_spans_are_the_best_of_all():
    torch.manual_seed(0)
    for overhead in (0, 3, 10):
        lengths = torch.randint(1, 12, (9,)).sort(descending=True).values.tolist()

        def cost(cuts, lengths=lengths, overhead=overhead):
            starts, stops = [0, *cuts], [*cuts, len(lengths)]
            return sum(lengths[a] * (b - a) + overhead for a, b in zip(starts, stops, strict=True))

        every = itertools.chain.from_iterable(
            itertools.combinations(range(1, 9), k) for k in range(9)
        )
        found = [span.rows.start for span in spans_of(lengths, pieces=None, overhead=overhead)]
        assert cost(found[1:]) == min(map(cost, every))


# --- Batch norm ----------------------------------------------------------------------------------


def test_running_statistics_move_once_towards_the_mean_of_the_pieces():
    norm = nn.BatchNorm1d(4, momentum=0.1).double()
    by_hand = nn.BatchNorm1d(4, momentum=None).double()
    images = torch.randn(10, 4, dtype=torch.float64) + 3
    for piece in images.split(5):
        by_hand(piece)
    before = norm.running_mean.clone(), norm.running_var.clone()
    found = embed_pieces(norm, [(i,) for i in images.split(5)], modules=[norm], recompute=True)
    found.pow(2).sum().backward()
    for old, new, mean in zip(
        before, (norm.running_mean, norm.running_var),
        (by_hand.running_mean, by_hand.running_var), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(new, 0.9 * old + 0.1 * mean, rtol=0, atol=1e-14)
    assert norm.num_batches_tracked == 1
    assert norm.momentum == 0.1


def test_each_piece_is_normalised_by_itself_also_when_it_is_run_again():
    def convnet():
        return ConvNet(image_size=16, widths=(8,), feature_dim=16)

    pairs = batch(16)
    module, other = made(4, image_encoder=convnet), made(image_encoder=convnet)
    found = gradients(module, pairs)
    torch.manual_seed(5)
    image = torch.cat([other.encode_image(part) for part in pairs["images"].split(4)])
    text = other.encode_text(pairs["tokens"])
    ids = Ids(pairs["caption_ids"], pairs["image_ids"])
    loss = other.loss(image, text, image, text, offset=0, scale=other.scale,
                      bias=other.temperature.bias, ids=ids, all_ids=ids).loss  # fmt: skip
    loss.backward()
    assert_same(found, (loss, {n: p.grad for n, p in other.named_parameters()}))


@pytest.mark.parametrize(
    ("rows", "most", "norms", "pieces"),
    [(11, None, True, 1), (11, 4, False, 3), (57, 8, False, 8), (9, 2, False, 5), (9, 2, True, 4),
     (3, 2, True, 1), (1, 1, True, 1), (5, 64, False, 1), (5, 1, False, 5)],
)  # fmt: skip
def test_pieces_are_even_and_none_is_alone_under_batch_norm(rows, most, norms, pieces):
    modules = [nn.BatchNorm1d(2)] if norms else []
    assert number_of_pieces(rows, most, modules) == pieces
    sizes = [len(piece) for piece in torch.arange(rows).tensor_split(pieces)]
    spans = spans_of([1] * rows, pieces=pieces, overhead=0)
    assert [span.rows.stop - span.rows.start for span in spans] == sizes


def test_a_last_pair_is_not_normalised_alone():
    """57 pairs by 8 leave one over; where a picture is a single place, one has no statistics."""

    def convnet():
        return ConvNet(image_size=4, widths=(8,), feature_dim=16)

    module = made(2, image_encoder=convnet)
    loss, _ = gradients(module, batch(4))  # of 11 pairs
    assert loss.isfinite()


def test_frozen_statistics_are_exact_again():
    def convnet():
        return ConvNet(image_size=16, widths=(8,), feature_dim=16)

    found, expected = (
        gradients(made(micro_batch, image_encoder=convnet, lock_image=0), batch(16))
        for micro_batch in (3, None)
    )
    assert not any(name.startswith("image_encoder") for name in found[1])
    assert_same(found, expected)


def test_a_locked_tower_is_not_run_twice(monkeypatch):
    module = made(4, lock_image=0)
    calls = []
    module.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    module.image_head.requires_grad_(False)
    gradients(module, batch())
    assert len(calls) == 3


def test_a_micro_batch_that_is_none():
    with pytest.raises(ValueError, match="micro_batch: 0"):
        made(0)
