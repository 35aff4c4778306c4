"""Numbers out of range end in one sentence, in every constructor that a configuration reaches."""

import inspect
import math
from typing import get_type_hints

import pytest
import torch
from torch import nn

from clipkit.allocations import AllocationBound
from clipkit.encoders import BagOfTokens, ConvNet, TextTransformer, TimmImageEncoder
from clipkit.errors import UserError
from clipkit.heads import MLPHead
from clipkit.losses import InfoNCELoss
from clipkit.module import CLIPModule
from clipkit.optim import WarmupConstant, WarmupConstantCooldown, WarmupCosine
from clipkit.ranges import check_number, check_ratio, check_whole
from clipkit.temperature import Temperature
from clipkit.tokenizer import Tokenizer

CONTRACT = Tokenizer().contract
OPTIMIZER = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
PARTS = {
    TextTransformer: {"contract": CONTRACT, "width": 4, "heads": 2, "depth": 1},
    BagOfTokens: {"contract": CONTRACT, "width": 4},
    ConvNet: {"image_size": 8, "widths": (4,), "feature_dim": 4},
    TimmImageEncoder: {"name": "test_vit", "image_size": 32},
    MLPHead: {"in_dim": 4, "out_dim": 4, "hidden_dim": 4},
    Temperature: {},
    Tokenizer: {},
    InfoNCELoss: {},
    WarmupConstant: {"optimizer": OPTIMIZER, "total_steps": 10},
    WarmupConstantCooldown: {"optimizer": OPTIMIZER, "total_steps": 10},
    WarmupCosine: {"optimizer": OPTIMIZER, "total_steps": 10},
}
WRONG = {
    int: (-3, 0, 2**40, 2**70),
    float: (-1.0, 5.0, math.nan, math.inf, -math.inf, 1e300),
}


def slots(part):
    """The arguments of a part that take numbers, each with wrong ones of its type."""
    hints = get_type_hints(part.__init__)
    for name in inspect.signature(part).parameters:
        for kind, values in WRONG.items():
            if name not in ("in_dim", "out_dim", "total_steps") and kind.__name__ in str(
                hints[name]
            ):
                many = "tuple" in str(hints[name]) or "list" in str(hints[name])
                yield from ((name, [value] * 3 if many else value) for value in values)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_any_number_is_taken_or_refused_in_a_sentence(part):
    refused = []
    for name, value in slots(part):
        try:
            with AllocationBound(2**30, 5000, "{size}"):
                part(**PARTS[part] | {name: value})
        except UserError as error:
            refused.append(str(error))
    assert refused
    assert not [sentence for sentence in refused if "\n" in sentence]


@pytest.mark.parametrize("embed_dim", [-3, 0, 2**70])
def test_the_width_of_the_joint_space(embed_dim):
    parts = dict.fromkeys(
        name for name in inspect.signature(CLIPModule).parameters if name != "embed_dim"
    )
    with pytest.raises(UserError, match=r"model\.embed_dim: .* numbers from 1 to 1,048,576 are"):
        CLIPModule(**parts, embed_dim=embed_dim)


def test_the_ends_of_a_range_are_in_it():
    check_whole("a", 1)
    check_whole("a", 2**20)
    check_number("a", 0, least=0, most=1)
    check_number("a", 1, least=0, most=1)
    check_ratio("a", 0)
    with pytest.raises(UserError, match=r"^a: 1 is not a ratio, accepted are 0 to below 1$"):
        check_ratio("a", 1)
