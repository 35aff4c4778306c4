"""The gradient of one process, by the plainest means: that of the module and its losses."""

from typing import get_args

import pytest
import torch

from clipkit.check.reference import gradients, joined
from clipkit.encoders import BagOfTokens, TextTransformer
from clipkit.losses import InfoNCELoss, SigLIPLoss
from clipkit.losses.base import Duplicates
from tests import test_pieces
from tests.test_pieces import batch, made

DUPLICATES = get_args(Duplicates)
LOSSES = [
    *(InfoNCELoss(duplicates=d, label_smoothing=s) for d in DUPLICATES for s in (0.0, 0.2)),
    *(SigLIPLoss(duplicates=d) for d in DUPLICATES),
]


def named(loss):
    keys = ("duplicates", "label_smoothing")
    settings = [str(getattr(loss, key)) for key in keys if hasattr(loss, key)]
    return "-".join([type(loss).__name__, *settings])


class Half(InfoNCELoss):
    """A loss of the user's own."""

    def forward(self, *arguments, **keywords):
        terms = super().forward(*arguments, **keywords)
        return terms._replace(loss=terms.loss / 2)


def pairs_with_repeats():
    pairs = batch()
    pairs["image_ids"][3] = pairs["image_ids"][8]
    return pairs


def both_ways(loss, **settings):
    module = made(loss=loss, **settings)
    _, expected = test_pieces.gradients(module, pairs_with_repeats())
    module.zero_grad()
    found = gradients(module, joined([pairs_with_repeats()], module))
    assert all(parameter.grad is None for parameter in module.parameters())
    return found, expected


@pytest.mark.parametrize("loss", [*LOSSES, Half()], ids=named)
@pytest.mark.parametrize("text", [TextTransformer, BagOfTokens])
def test_it_is_the_gradient_of_the_module(loss, text):
    found, expected = both_ways(loss, text=text)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12, msg=name)


def test_what_is_frozen_is_left_out():
    found, expected = both_ways(InfoNCELoss(), lock_image=0)
    assert found.keys() == expected.keys()
    assert not any(name.startswith("image_encoder") for name in found)


def test_shares_of_different_lengths_are_joined():
    module = made()
    short = {k: v[:1] for k, v in batch().items()}
    short["tokens"] = short["tokens"][:, :3]
    whole = joined([short, batch()], module)
    context = module.tokenizer.contract.context_length
    assert whole["tokens"].shape == (12, context)
    torch.testing.assert_close(whole["tokens"][0], whole["tokens"][1])
    assert whole["images"].shape[0] == len(whole["caption_ids"]) == 12
