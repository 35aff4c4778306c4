"""Batches without data: they are what a loader would give, and the same work either way."""

import pytest
import torch

from benchmarks.batches import LENGTHS, batches_of, lengths_like_coco, without_lengths
from benchmarks.models import CONTRACT, module_of
from benchmarks.step import operations, our_loss


def test_captions_are_as_long_as_cocos():
    lengths = lengths_like_coco(1024, seed=0)
    assert len(lengths) == 1024
    mean = sum(length * count for length, count in LENGTHS.items()) / sum(LENGTHS.values())
    assert sum(lengths) / 1024 == pytest.approx(mean, rel=0.01)


def test_a_batch_says_of_itself_what_is_true():
    (batch,) = batches_of(1, 20, 8, "cpu")
    found = CONTRACT.lengths(batch["tokens"])
    assert found.tolist() == batch["lengths"]
    assert found[batch["by_length"]].tolist() == sorted(batch["lengths"], reverse=True)
    assert batch["images"].shape == (20, 3, 8, 8)
    ends = (batch["tokens"] == CONTRACT.end_id).int()
    assert ends.sum(1).tolist() == [1] * 20
    assert (ends.argmax(1) + 1).tolist() == found.tolist()


def test_padding_changes_neither_loss_nor_gradient():
    module = module_of("tiny").double()
    (batch,) = batches_of(1, 6, 32, "cpu")
    losses = []
    for one in (batch, without_lengths(batch)):
        module.zero_grad()
        loss = our_loss(module, one)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
        losses.append((loss.detach(), gradient))
    for grouped, padded in zip(*losses, strict=True):
        torch.testing.assert_close(grouped, padded, rtol=1e-9, atol=1e-12)


def test_fewer_tokens_are_fewer_operations():
    module = module_of("tiny")
    assert operations(module, [10, 10]) < operations(module, [77, 77])
    assert operations(module, [10] * 4) == pytest.approx(2 * operations(module, [10] * 2))
