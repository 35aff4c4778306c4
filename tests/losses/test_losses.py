"""The losses against plain loops in float64, and what they do with duplicates."""

import math

import pytest
import torch
from torch.nn import functional as F

from clipkit.losses import Ids, InfoNCELoss, SigLIPLoss, info_nce, siglip

LOSSES = [InfoNCELoss(), SigLIPLoss()]


def batch(num_pairs=6, dim=4, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        F.normalize(torch.randn(num_pairs, dim, generator=generator, dtype=dtype), dim=-1)
        for _ in range(2)
    )
    return image.requires_grad_(), text.requires_grad_()


def compute(loss, image, text, ids=None, scale=7.0, bias=None):
    return loss(
        image, text, image, text, offset=0, scale=torch.tensor(scale, dtype=image.dtype),
        bias=bias, ids=ids, all_ids=ids,
    ).loss  # fmt: skip


def ids_of(captions, images=None):
    images = images if images is not None else range(100, 100 + len(captions))
    return Ids(torch.tensor(captions), torch.tensor(list(images)))


def naive_info_nce(image, text, scale, repeated=(), smoothing=0.0):
    """Mean over both directions and all rows of -sum_j target_j log p_j, in loops."""
    total = 0.0
    image, text = image.detach(), text.detach()
    for rows, columns in ((image, text), (text, image)):
        for i in range(len(rows)):
            open_to = [j for j in range(len(columns)) if (i, j) not in repeated]
            logits = {j: scale * float(rows[i] @ columns[j]) for j in open_to}
            normaliser = math.log(sum(math.exp(v) for v in logits.values()))
            for j in open_to:
                target = (1 - smoothing) * (i == j) + smoothing / len(open_to)
                total -= target * (logits[j] - normaliser) / len(rows) / 2
    return total


def naive_siglip(image, text, scale, bias, skipped=(), positive=()):
    total = 0.0
    image, text = image.detach(), text.detach()
    for i in range(len(image)):
        for j in range(len(text)):
            if (i, j) in skipped:
                continue
            z = 1 if i == j or (i, j) in positive else -1
            total += math.log1p(math.exp(-z * (scale * float(image[i] @ text[j]) + bias)))
    return total / len(image)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_info_nce_is_its_definition(smoothing):
    image, text = batch()
    expected = naive_info_nce(image, text, 7.0, smoothing=smoothing)
    assert compute(InfoNCELoss(label_smoothing=smoothing), image, text).item() == pytest.approx(
        expected, abs=1e-12
    )


def test_siglip_is_its_definition():
    image, text = batch()
    found = compute(SigLIPLoss(), image, text, bias=torch.tensor(-1.5, dtype=torch.float64))
    assert found.item() == pytest.approx(naive_siglip(image, text, 7.0, -1.5), abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_without_repeats_ids_change_nothing(loss):
    image, text = batch()
    plain = compute(loss, image, text)
    with_ids = compute(loss, image, text, ids_of([1, 2, 3, 4, 5, 6]))
    torch.testing.assert_close(with_ids, plain, rtol=0, atol=1e-12)


# Rows 1 and 4 share a caption, rows 0 and 2 a picture.
REPEATED = {(1, 4), (4, 1), (0, 2), (2, 0)}
REPEATING = ids_of([1, 2, 3, 4, 2, 6], [10, 11, 10, 13, 14, 15])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ignored_duplicates_are_no_candidates(smoothing):
    image, text = batch()
    found = compute(InfoNCELoss(label_smoothing=smoothing), image, text, REPEATING)
    expected = naive_info_nce(image, text, 7.0, REPEATED, smoothing)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_positive_duplicates_share_the_target():
    image, text = batch()
    found = compute(InfoNCELoss(duplicates="positive"), image, text, REPEATING).item()
    same = torch.eye(6, dtype=torch.float64)
    for i, j in REPEATED:
        same[i, j] = 1
    target = same / same.sum(1, keepdim=True)
    logits = 7.0 * image @ text.T
    by_hand = sum(-(target * F.log_softmax(x, 1)).sum(1).mean() / 2 for x in (logits, logits.T))
    assert found == pytest.approx(by_hand.item(), abs=1e-12)


def test_siglip_duplicates():
    image, text = batch()
    bias = torch.tensor(-1.0, dtype=torch.float64)
    ignored = compute(SigLIPLoss(), image, text, REPEATING, bias=bias).item()
    assert ignored == pytest.approx(naive_siglip(image, text, 7.0, -1.0, skipped=REPEATED))
    positive = compute(SigLIPLoss(duplicates="positive"), image, text, REPEATING, bias=bias).item()
    assert positive == pytest.approx(naive_siglip(image, text, 7.0, -1.0, positive=REPEATED))


def test_negative_duplicates_are_the_peers_behaviour():
    image, text = batch()
    for loss in (InfoNCELoss(duplicates="negative"), SigLIPLoss(duplicates="negative")):
        assert compute(loss, image, text, REPEATING) == compute(loss, image, text)


def pull(loss, duplicates):
    """How one row's loss pulls a copy of its caption (column 4) towards its image (row 1)."""
    image, text = batch()
    with torch.no_grad():
        text[4] = text[1]
    everything = ids_of([1, 2, 3, 4, 2, 6])
    own = Ids(*(part[1:2] for part in everything))
    value = loss(
        image[1:2], text, offset=1, scale=torch.tensor(7.0, dtype=torch.float64),
        ids=own, all_ids=everything, duplicates=duplicates,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(value, text)
    return -(gradient[4] @ image[1].detach()).item()


@pytest.mark.parametrize("loss", [info_nce, siglip])
def test_no_gradient_pushes_equal_captions_apart(loss):
    assert pull(loss, "ignore") == 0
    assert pull(loss, "positive") > 0
    assert pull(loss, "negative") < 0


def test_ignored_columns_get_no_gradient_from_the_row():
    image, text = batch(3)
    ids = ids_of([1, 1, 1])
    gradients = torch.autograd.grad(compute(InfoNCELoss(), image, text, ids), (image, text))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("loss", LOSSES)
def test_permuting_the_pairs_changes_nothing(loss):
    image, text = batch()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        compute(loss, image[order], text[order]), compute(loss, image, text), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_swapping_the_sides_changes_nothing(loss):
    image, text = batch()
    torch.testing.assert_close(
        compute(loss, text, image), compute(loss, image, text), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_extra_captions_are_negatives_only(loss):
    image, text = batch()
    extra, _ = batch(2, seed=9)
    arguments = {"offset": 0, "scale": torch.tensor(7.0, dtype=torch.float64)}
    with_extra = loss(image, text, image, torch.cat([text, extra]), **arguments)
    without = loss(image, text, image, text, **arguments)
    assert with_extra.loss > without.loss
    if with_extra.text_to_image is not None:
        torch.testing.assert_close(with_extra.text_to_image, without.text_to_image)


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_computed_in_float32(loss):
    image, text = batch(64, 16, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        value = compute(loss, image.bfloat16(), text.bfloat16(), scale=100.0)
        reference = compute(loss, image.bfloat16().double(), text.bfloat16().double(), scale=100.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(reference.item(), rel=1e-5)


def test_info_nce_of_random_pairs_starts_at_chance():
    image, text = batch(512, 64)
    assert compute(InfoNCELoss(), image, text, scale=1.0).item() == pytest.approx(
        math.log(512), rel=0.01
    )
