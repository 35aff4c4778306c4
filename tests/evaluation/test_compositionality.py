from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import sugarcrepe, sugarcrepe_metrics, winoground, winoground_metrics

PAIR = torch.tensor([[0, 1]])


def score(image_text: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Embeddings of two images and two texts whose cosines are these, [image][text]."""
    cosines = torch.tensor(image_text).double()
    images = torch.cat([torch.eye(2), torch.zeros(2, 2)], dim=1).double()
    rest = (1 - cosines.square().sum(dim=0)).sqrt().diag()
    return images, torch.cat([cosines.T, rest], dim=1)


@pytest.mark.parametrize(
    ("cosines", "text", "image", "group"),
    [
        ([[0.6, 0.2], [0.3, 0.5]], 1, 1, 1),
        ([[0.6, 0.2], [0.55, 0.5]], 0, 1, 0),  # image 1 prefers caption 0
        ([[0.3, 0.2], [0.4, 0.5]], 1, 0, 0),  # caption 0 prefers image 1
        ([[0.1, 0.6], [0.6, 0.1]], 0, 0, 0),
    ],
)
def test_the_scores_are_those_of_the_paper(
    cosines: list[list[float]], text: int, image: int, group: int
) -> None:
    found = winoground(*score(cosines), PAIR, PAIR)
    assert (float(found.text), float(found.image), float(found.group)) == (text, image, group)
    assert (bool(found.strict_text), bool(found.strict_image)) == (bool(text), bool(image))
    assert bool(found.strict_group) == bool(group)
    assert not found.tied


@pytest.mark.parametrize("levels", list(product([0.1, 0.2, 0.3], repeat=4)))
def test_ties_are_the_mean_over_all_orders(levels: tuple[float, ...]) -> None:
    found = winoground(*score([list(levels[:2]), list(levels[2:])]), PAIR, PAIR)
    text = image = group = 0
    for order in permutations(range(4)):
        a, b, c, d = ((level, place) for level, place in zip(levels, order, strict=True))
        text += a > b and d > c
        image += a > c and d > b
        group += a > b and d > c and a > c and d > b
    assert float(found.text) == pytest.approx(text / 24)
    assert float(found.image) == pytest.approx(image / 24)
    assert float(found.group) == pytest.approx(group / 24)
    assert bool(found.tied) == (0 < text < 24 or 0 < image < 24)
    assert bool(found.strict_group) == (group == 24)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_constant_model_scores_the_chance_of_the_paper(value: float) -> None:
    images, texts = torch.full((3, 5), value), torch.full((7, 5), value)
    rows = torch.tensor([[0, 1], [2, 1], [0, 2]])
    metrics = winoground_metrics(winoground(images, texts, rows, torch.randint(7, (3, 2))))
    assert [metrics[name].value for name in ("text", "image")] == [0.25, 0.25]
    assert metrics["group"].value == pytest.approx(1 / 6)
    for name, metric in metrics.items():
        assert metric.chance is None if name == "tie_rate" else metric.value == metric.chance
    assert metrics["tie_rate"].value == 1.0

    metrics = sugarcrepe_metrics(sugarcrepe(images, texts, rows[:, 0], torch.randint(7, (3, 2))))
    assert metrics["accuracy"].value == metrics["accuracy"].chance == 0.5
    assert metrics["strict_accuracy"].value == metrics["strict_accuracy"].chance == 0.0
    assert metrics["tie_rate"].value == 1.0


def test_the_chance_of_random_scores_is_that_of_ties() -> None:
    n = 20_000
    rows = torch.arange(2 * n).reshape(n, 2)
    metrics = winoground_metrics(
        winoground(torch.randn(2 * n, 16), torch.randn(2 * n, 16), rows, rows)
    )
    assert metrics["text"].value == pytest.approx(0.25, abs=0.02)
    assert metrics["group"].value == pytest.approx(1 / 6, abs=0.02)


def test_a_caption_wins_draws_or_loses() -> None:
    images, texts = torch.eye(3), torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0, 0.8, 0.6]])
    found = sugarcrepe(
        images, texts, torch.tensor([0, 1, 0, 0]), torch.tensor([[0, 1], [1, 2], [1, 0], [2, 2]])
    )
    assert found.accuracy.tolist() == [1.0, 0.5, 0.0, 0.5]
    assert found.strict_accuracy.tolist() == [True, False, False, False]
    assert found.tied.tolist() == [False, True, False, True]
    assert found.groups.tolist() == [0, 1, 0, 0]
    metrics = sugarcrepe_metrics(found)
    assert list(metrics) == ["accuracy", "strict_accuracy", "tie_rate"]
    assert metrics["accuracy"].n == 2


def test_scores_within_the_tolerance_are_tied() -> None:
    found = winoground(*score([[0.3 + 5e-7, 0.3], [0.3, 0.3 + 5e-7]]), PAIR, PAIR)
    assert float(found.group) == pytest.approx(1 / 6)
    found = winoground(*score([[0.3 + 3e-6, 0.3], [0.3, 0.3 + 3e-6]]), PAIR, PAIR)
    assert bool(found.strict_group)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 30), st.booleans())
def test_examples_by_row_are_those_embedded_one_by_one(num_rows: int, half: bool) -> None:
    dtype = torch.bfloat16 if half else torch.float32
    images, texts = torch.randn(9, 6).to(dtype), torch.randn(12, 6).to(dtype)
    image_rows, text_rows = torch.randint(9, (num_rows, 2)), torch.randint(12, (num_rows, 2))
    together = winoground(images * 4, texts, image_rows, text_rows)
    for row, (i, t) in enumerate(zip(image_rows, text_rows, strict=True)):
        alone = winoground(images[i], texts[t], PAIR, PAIR)
        for name in ("text", "image", "group", "tied"):
            assert getattr(alone, name)[0] == getattr(together, name)[row]


def test_examples_that_share_an_image_are_one_group() -> None:
    rows = torch.tensor([[0, 1], [2, 3], [3, 4], [5, 6], [6, 0]])
    found = winoground(torch.randn(7, 4), torch.randn(2, 4), rows, PAIR.repeat(5, 1))
    assert found.groups.tolist() == [0, 2, 2, 0, 0]
    metric = winoground_metrics(found)["text"]
    assert metric.n == 2
    assert metric.interval is not None
    assert metric.interval.low <= metric.value <= metric.interval.high


def test_rows_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="1 of 2 examples name texts outside the 3 embeddings"):
        winoground(torch.eye(3), torch.eye(3), PAIR.repeat(2, 1), torch.tensor([[0, 1], [3, 0]]))
    with pytest.raises(UserError, match="name images outside"):
        sugarcrepe(torch.eye(3), torch.eye(3), torch.tensor([-1]), PAIR)
    with pytest.raises(ValueError, match="integer rows"):
        winoground(torch.eye(3), torch.eye(3), PAIR.double(), PAIR)
    with pytest.raises(ValueError, match=r"texts are \(1, 2\) for 2 examples"):
        sugarcrepe(torch.eye(3), torch.eye(3), torch.tensor([0, 1]), PAIR)
    with pytest.raises(ValueError, match=r"one row \(R,\)"):
        sugarcrepe(torch.eye(3), torch.eye(3), PAIR, PAIR)


def test_embeddings_that_are_not_finite_are_refused() -> None:
    images = torch.eye(2)
    images[0, 0] = torch.nan
    with pytest.raises(UserError, match="1 of 2 rows of the image embeddings"):
        winoground(images, torch.eye(2), PAIR, PAIR)


def test_no_example_has_no_mean() -> None:
    nothing = torch.zeros(0, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="no row"):
        winoground_metrics(winoground(torch.eye(2), torch.eye(2), nothing, nothing))
    with pytest.raises(ValueError, match="no row"):
        sugarcrepe_metrics(sugarcrepe(torch.eye(2), torch.eye(2), nothing[:, 0], nothing))
