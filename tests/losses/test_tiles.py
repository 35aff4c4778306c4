"""Losses by tiles: value and gradient of the whole matrix, in memory that grows with the batch."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.losses import Ids, InfoNCELoss, SigLIPLoss, info_nce, siglip, tiles
from tests.losses import dense

DIM = 5


@pytest.fixture
def small_tiles(monkeypatch):
    """Seven pairs are nine tiles, none of which divides them."""
    monkeypatch.setattr(tiles, "_CPU_TILE", 3)


def unit(rows, dtype=torch.float64, dim=DIM):
    return F.normalize(torch.randn(rows, dim, dtype=dtype), dim=1).requires_grad_()


def scalar(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype, requires_grad=True)


class Batch:
    """Pairs, of which some share a caption or a picture, and captions that are nobody's."""

    def __init__(self, num_pairs, extra, *, with_ids):
        torch.manual_seed(num_pairs + extra)
        self.image, self.text, self.extra = unit(num_pairs), unit(num_pairs), unit(extra)
        self.scale, self.bias = scalar(7.0), scalar(-1.5)
        captions = torch.randint(0, 5, (num_pairs + extra,))
        images = torch.randint(10, 16, (num_pairs,))
        self.all_ids = Ids(captions, images) if with_ids else None
        self.ids = Ids(captions[:num_pairs], images) if with_ids else None
        self.all_text = torch.cat([self.text, self.extra]) if extra else self.text
        self.inputs = (self.image, self.text, self.scale, self.bias)

    def terms(self, loss, start=0):
        """The loss of the rows from a place on: of one process from 0, else of the last rank."""
        ids = None if self.ids is None else Ids(*(part[start:] for part in self.ids))
        everything = (self.image, self.all_text)
        rows = (self.image[start:], self.text[start:]) if start else (self.image, self.text)
        return loss(
            *rows, *everything, offset=start, scale=self.scale, bias=self.bias,
            ids=ids, all_ids=self.all_ids,
        )  # fmt: skip

    def dense(self, loss, start=0):
        repeated = None
        if self.ids is not None and loss.duplicates != "negative":
            ids = Ids(*(part[start:] for part in self.ids))
            repeated = dense.duplicate_columns(ids, self.all_ids, start)
        positive = loss.duplicates == "positive"
        settings = {"offset": start, "scale": self.scale, "positive": positive}
        image, text = self.image[start:], self.text[start:]
        if isinstance(loss, SigLIPLoss):
            found = dense.siglip(
                image, self.all_text, bias=self.bias, repeated=repeated, **settings
            )
            return (found,)
        both = [
            dense.info_nce(
                rows, columns, smoothing=loss.label_smoothing,
                repeated=None if repeated is None else repeated[:, : len(columns)], **settings,
            )
            for rows, columns in ((image, self.all_text), (text, self.image))
        ]  # fmt: skip
        return (sum(both) / 2, *both)


LOSSES = [
    loss
    for duplicates in ("ignore", "positive", "negative")
    for loss in (
        InfoNCELoss(duplicates=duplicates),
        InfoNCELoss(duplicates=duplicates, label_smoothing=0.1),
        SigLIPLoss(duplicates=duplicates),
    )
]


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{type(loss).__name__}{vars(loss)}")
@pytest.mark.usefixtures("small_tiles")
def test_value_and_gradients_are_those_of_the_whole_matrix(loss, extra, with_ids):
    for num_pairs in (6, 7):
        for start in (0, 3):
            batch = Batch(num_pairs, extra, with_ids=with_ids)
            found, expected = batch.terms(loss, start), batch.dense(loss, start)
            terms = [term for term in found if term is not None]
            for one, other in zip(terms, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
            # A sum of the outputs that is none of them: each has its own gradient.
            total = sum(w * t for w, t in zip((1.7, 0.3, -0.4), terms, strict=False))
            reference = sum(w * t for w, t in zip((1.7, 0.3, -0.4), expected, strict=False))
            gradients = torch.autograd.grad(total, batch.inputs)
            references = torch.autograd.grad(reference, batch.inputs, allow_unused=True)
            for one, other in zip(gradients, references, strict=True):
                # The bias cancels in a softmax.
                other = torch.zeros_like(one) if other is None else other
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("function", [info_nce, siglip])
@pytest.mark.usefixtures("small_tiles")
def test_gradients_are_those_of_finite_differences(function):
    torch.manual_seed(0)

    def of(rows, columns, scale):
        return function(rows, columns, offset=2, scale=scale)

    assert torch.autograd.gradcheck(of, (unit(4), unit(8), scalar(3.0)))


@pytest.mark.usefixtures("small_tiles")
def test_whoever_wants_no_gradient_of_one_side_gets_that_of_the_other():
    batch = Batch(7, 0, with_ids=True)
    for loss in (InfoNCELoss(), SigLIPLoss()):
        image = batch.image.detach()
        found = loss(image, batch.text, image, batch.text, offset=0, scale=batch.scale,
                     bias=batch.bias).loss  # fmt: skip
        both = loss(batch.image, batch.text, batch.image, batch.text, offset=0, scale=batch.scale,
                    bias=batch.bias).loss  # fmt: skip
        (one,), (other,) = (torch.autograd.grad(value, batch.text) for value in (found, both))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


class _Watched(TorchDispatchMode):
    """Keeps the size of the largest tensor made, and of all products together."""

    def __init__(self):
        super().__init__()
        self.largest, self.logits = 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        made = function(*arguments, **(keywords or {}))
        if isinstance(made, torch.Tensor):
            self.largest = max(self.largest, made.numel())
            if function is torch.ops.aten.mm.default:
                self.logits += made.numel()
        return made


@pytest.mark.parametrize("loss", [InfoNCELoss(label_smoothing=0.1), SigLIPLoss()])
def test_no_tensor_grows_with_the_square_of_the_batch(loss):
    num_pairs = 2500
    image, text = (unit(num_pairs, torch.float32, 16) for _ in range(2))
    ids = Ids(torch.arange(num_pairs) // 2, torch.arange(num_pairs))
    with _Watched() as watched:
        found = loss(image, text, image, text, offset=0, scale=scalar(7.0, torch.float32),
                     bias=None, ids=ids, all_ids=ids).loss  # fmt: skip
        assert watched.logits == num_pairs**2  # one product, both ways
        found.backward()
    assert watched.largest <= 1024**2


@pytest.mark.parametrize("loss", [InfoNCELoss(), SigLIPLoss()])
@pytest.mark.usefixtures("small_tiles")
def test_half_precision_has_the_gradient_of_float32(loss):
    batch = Batch(7, 0, with_ids=True)
    image, text = (t.detach().bfloat16().requires_grad_() for t in (batch.image, batch.text))
    scale = scalar(100.0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(image, text, image, text, offset=0, scale=scale, ids=batch.ids,
                     all_ids=batch.ids).loss  # fmt: skip
        assert value.dtype == torch.float32
        found = torch.autograd.grad(value, (image, text, scale))
    wide = [t.detach().double().requires_grad_() for t in (image, text, scale)]
    exact = loss(wide[0], wide[1], wide[0], wide[1], offset=0, scale=wide[2], ids=batch.ids,
                 all_ids=batch.ids).loss  # fmt: skip
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    for one, other in zip(found, torch.autograd.grad(exact, wide), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("loss", [InfoNCELoss(), SigLIPLoss()])
@pytest.mark.usefixtures("small_tiles")
def test_it_compiles_as_one_graph(loss):
    batch = Batch(7, 0, with_ids=True)
    compiled = torch.compile(batch.terms, backend="aot_eager", fullgraph=True)
    values = [terms.loss for terms in (compiled(loss), batch.terms(loss))]
    found, expected = (torch.autograd.grad(value, batch.inputs) for value in values)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_far_apart_logits_neither_overflow_nor_vanish(scale):
    image, text = (unit(64, torch.float32, 2) for _ in range(2))
    found = info_nce(image, text, scale=torch.tensor(scale))
    exact = dense.info_nce(image.double(), text.double(), offset=0, scale=scale)
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)
