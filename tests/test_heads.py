import math

import pytest
import torch

from clipkit.heads import Head, LinearHead, MLPHead


@pytest.mark.parametrize(
    "head", [LinearHead(12, 5), LinearHead(12, 5, bias=True), MLPHead(12, 5, hidden_dim=7)]
)
def test_features_to_embeddings_and_every_parameter_learns(head: Head) -> None:
    embeddings = head(torch.randn(3, 12))
    assert embeddings.shape == (3, 5)
    embeddings.square().sum().backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize(
    "projection",
    [LinearHead(400, 300).projection, MLPHead(20, 300, hidden_dim=400).projection],
)
def test_projections_are_drawn_as_clip_draws_them(projection: torch.nn.Linear) -> None:
    assert projection.bias is None
    assert projection.weight.std().item() == pytest.approx(1 / math.sqrt(400), rel=0.02)
    assert projection.weight.mean().item() == pytest.approx(0.0, abs=1e-3)


def test_bias_starts_at_zero() -> None:
    assert torch.equal(LinearHead(4, 3, bias=True).projection.bias, torch.zeros(3))


def test_dropout_is_for_training_only() -> None:
    head = MLPHead(8, 4, dropout=0.5)
    features = torch.randn(2, 8)
    assert not torch.equal(head(features), head(features))
    assert torch.equal(head.eval()(features), head(features))
