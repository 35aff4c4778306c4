import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.errors import UserError
from clipkit.evaluation import ties


@pytest.fixture
def reduced_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@settings(deadline=None)
@given(
    greater=st.integers(0, 12),
    tied=st.integers(1, 12),
    right=st.integers(1, 12),
    k=st.integers(1, 12),
)
def test_a_hit_among_ties_is_hypergeometric(greater: int, tied: int, right: int, k: int) -> None:
    right = min(right, tied)
    free = min(max(k - greater, 0), tied)
    expected = 1 - math.comb(tied - right, free) / math.comb(tied, free)
    at = ties.Places(torch.tensor([greater]), torch.tensor([tied]))
    found = ties.hit_within(k, at, torch.tensor([right]))
    assert float(found) == pytest.approx(expected, abs=1e-12)
    if right == 1:
        torch.testing.assert_close(found, ties.share_within(k, at))


def test_scores_within_the_tolerance_are_tied() -> None:
    scores = torch.tensor([[0.5, 0.5 + 5e-7, 0.5 - 5e-7, 0.5 + 2e-6, 0.5 - 2e-6]])
    at = ties.places(scores, scores[:, 0])
    assert at.greater.tolist() == [1]
    assert at.tied.tolist() == [3]


def test_similarities_keep_float32_inside_autocast(reduced_precision: None) -> None:
    a, b = torch.randn(7, 33), torch.randn(5, 33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ b.T).dtype is torch.bfloat16
        inside = ties.similarities(a, b)
    assert inside.dtype is torch.float32
    torch.testing.assert_close(inside.double(), a.double() @ b.double().T, atol=1e-5, rtol=0)
    assert ties.similarities(a.bfloat16(), b).dtype is torch.float32
    assert ties.similarities(a.double(), b).dtype is torch.float64
    assert torch.get_float32_matmul_precision() == "high"


def test_embeddings_that_are_not_finite_are_refused() -> None:
    embeddings = torch.randn(6, 3)
    embeddings[1, 0], embeddings[4, 2], embeddings[4, 1] = torch.nan, torch.inf, torch.nan
    with pytest.raises(UserError, match="2 of 6 rows of the text embeddings"):
        ties.unit(embeddings, "text")


def test_a_zero_embedding_is_tied_with_everything() -> None:
    assert ties.unit(torch.zeros(2, 3), "image").tolist() == [[0.0] * 3] * 2


def test_block_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size is 0"):
        list(ties.score_blocks(torch.ones(2, 2), torch.ones(2, 2), 0))
