"""What is too large is refused before it is there."""

import pytest
import torch
from torch import nn

from clipkit.allocations import AllocationBound
from clipkit.errors import UserError


def test_a_model_within_the_bound_is_as_without():
    torch.manual_seed(0)
    plain = nn.Linear(8, 4).weight
    torch.manual_seed(0)
    with AllocationBound(1000, 10, "too much: {size}") as bound:
        bounded = nn.Linear(8, 4).weight
    assert torch.equal(plain, bounded)
    assert bound.asked >= 4 * (8 * 4 + 4)
    assert bound.tensors == 2


def test_terabytes_are_refused():
    refused = pytest.raises(UserError, match=r"^too much: 4,398\.0 GB$")
    with refused, AllocationBound(2**30, 10, "too much: {size}"):
        nn.Embedding(2**31, 512)


def test_many_small_ones_add_up():
    with (
        pytest.raises(UserError, match="too much"),
        AllocationBound(10_000, 1000, "too much: {size}"),
    ):
        nn.Sequential(*(nn.Linear(16, 16) for _ in range(100)))


def test_many_tiny_ones_are_too_many():
    refused = pytest.raises(UserError, match=r"^too much: over 100 tensors$")
    with refused, AllocationBound(2**30, 100, "too much: {size}"):
        nn.Sequential(*(nn.LayerNorm(1) for _ in range(51)))
