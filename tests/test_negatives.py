"""Captions that are negatives only: in float64 the gradient of the naive formulas, on any ranks."""

import itertools
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from clipkit.check.reference import gradients as reference
from clipkit.check.reference import joined
from clipkit.data.samples import PairCollate, Sample
from clipkit.encoders import BagOfTokens, TextTransformer
from clipkit.losses import InfoNCELoss, SigLIPLoss
from clipkit.tokenizer import Tokenizer
from tests.test_pieces import CAPTIONS, made

# The second half, a rank's share of two, has fewer; one is its row's own caption, one another's.
NEGATIVES = [
    "a circle", "a dog on a very long green sofa", "a cat", None, "a blue square and nothing else",
    "two birds", None, None, "a lift", None, None, None,
]  # fmt: skip
LOSSES = [
    InfoNCELoss(),
    InfoNCELoss(label_smoothing=0.1, duplicates="positive"),
    SigLIPLoss(),
    SigLIPLoss(duplicates="negative"),
]
MICRO_BATCHES = [None, 2]
TEXTS = [TextTransformer, BagOfTokens]
CASES = list(itertools.product(LOSSES, MICRO_BATCHES, TEXTS))
NOBODY = [None] * len(NEGATIVES)


class Step(torch.nn.Module):
    """`training_step` itself, of a module without a trainer."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        module._logs_this_step = lambda: False
        module._note_non_finite = lambda loss: None

    def forward(self, batch):
        return self.module.training_step(batch, 0)


def shares(negatives, ranks=1):
    generator = torch.Generator().manual_seed(1)
    captions = [*CAPTIONS, "a green square"]
    pictures = torch.randint(0, 256, (len(captions), 3, 32, 32), generator=generator).byte()
    samples = [
        Sample(picture, caption, number, number, negative=negative)
        for number, (picture, caption, negative) in enumerate(
            zip(pictures, captions, negatives, strict=True)
        )
    ]
    size = len(samples) // ranks
    collate = PairCollate(Tokenizer("english"), negatives=True)
    return [collate(samples[rank * size : (rank + 1) * size]) for rank in range(ranks)]


def gradients(loss, micro_batch, text, negatives, rank=0, ranks=1):
    module = made(micro_batch, loss=loss, text=text)
    step = Step(module)
    if ranks > 1:
        step = DistributedDataParallel(step)
    step(shares(negatives, ranks)[rank]).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def expected(loss, text, negatives=NEGATIVES):
    module = made(loss=loss, text=text)
    return reference(module, joined(shares(negatives), module))


def assert_equal(found, expected):
    for name, values in expected.items():
        own = found.get(name, torch.zeros_like(values))
        torch.testing.assert_close(own, values, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize(("loss", "micro_batch", "text"), CASES)
def test_one_process(loss, micro_batch, text):
    assert_equal(gradients(loss, micro_batch, text, NEGATIVES), expected(loss, text))


def test_batches_without_any_are_those_without_the_column():
    for loss in LOSSES:
        module = made(loss=loss)
        (plain,) = shares(NOBODY)
        del plain["negatives"], plain["negative_ids"]
        Step(module)(plain).backward()
        assert_equal(
            gradients(loss, None, TextTransformer, NOBODY),
            {n: p.grad for n, p in module.named_parameters() if p.grad is not None},
        )


def test_they_are_negatives_and_a_rows_own_caption_is_none():
    """The loss against loops over the plain definition."""
    (batch,) = shares(NEGATIVES)
    module = made(loss=InfoNCELoss())
    image, text = (side.detach() for side in module(batch))
    pairs = len(batch["tokens"])
    scale = float(module.scale.detach())
    captions = [*CAPTIONS, "a green square", *filter(None, NEGATIVES)]
    total = 0.0
    for row in range(pairs):
        others = [
            column
            for column in range(len(captions))
            if column == row or captions[column] != captions[row]
        ]
        logits = scale * image[row] @ text[others].T
        total += float(logits.logsumexp(0) - logits[others.index(row)]) / 2
        back = [other for other in others if other < pairs]
        logits = scale * text[row] @ image[back].T
        total += float(logits.logsumexp(0) - logits[back.index(row)]) / 2
    assert Step(module)(batch).item() == pytest.approx(total / pairs, abs=1e-10)
    siglip = made(loss=SigLIPLoss())
    logits = (siglip.scale * image @ text.T + siglip.temperature.bias).detach()
    questions = 0.0
    for row in range(pairs):
        for column in range(len(captions)):
            if column == row:
                questions -= F.logsigmoid(logits[row, column])
            elif captions[column] != captions[row]:
                questions -= F.logsigmoid(-logits[row, column])
    assert Step(siglip)(batch).item() == pytest.approx(float(questions) / pairs, abs=1e-10)


def work(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks
    )
    found = [gradients(*case, NEGATIVES, rank, ranks) for case in CASES]
    found.append(gradients(LOSSES[0], None, TextTransformer, NOBODY, rank, ranks))
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.destroy_process_group()


def test_two_ranks_of_which_one_has_more():
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, args=(2, folder), nprocs=2, start_method="spawn")
        *found, of_nobody = torch.load(f"{folder}/found")
    for gradient, (loss, _, text) in zip(found, CASES, strict=True):
        assert_equal(gradient, expected(loss, text))
    assert_equal(of_nobody, expected(LOSSES[0], TextTransformer, NOBODY))
