from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision

from clipkit.errors import UserError
from clipkit.evaluation import classify_multilabel, multilabel_metrics

# Few directions: many exact ties.
DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])


def naive_scores(image: Tensor, text: Tensor) -> list[list[float]]:
    image, text = image.double(), text.double()
    return [[round(float(i @ t / i.norm() / t.norm()), 6) for t in text] for i in image]


def over_tie_orders(scores: list[float]) -> list[list[int]]:
    """Every ranking that a random order of ties may give, each as often as it happens."""
    return [
        sorted(order, key=lambda which: -scores[which])
        for order in permutations(range(len(scores)))
    ]


def naive_eleven_points(scores: list[float], targets: list[bool]) -> float:
    """As in VOC2007's development kit."""
    found, curve = 0, []
    for place, which in enumerate(sorted(range(len(scores)), key=lambda i: -scores[i]), 1):
        found += targets[which]
        curve.append((found, found / place))
    return (
        sum(
            max(precision for right, precision in curve if 10 * right >= tenths * found)
            for tenths in range(11)
        )
        / 11
    )


def naive_average_precision(ranking: list[int], targets: list[bool]) -> float:
    hits = [place for place, which in enumerate(ranking, 1) if targets[which]]
    return sum(found / place for found, place in enumerate(hits, 1)) / len(hits)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_average_precision_is_the_mean_over_all_orders_of_ties(data: st.DataObject) -> None:
    num_images = data.draw(st.integers(1, 6))
    rows = st.lists(st.integers(0, 3), min_size=num_images, max_size=num_images)
    images, classes = DIRECTIONS[data.draw(rows)], DIRECTIONS[:2]
    flags = st.lists(st.booleans(), min_size=num_images, max_size=num_images)
    targets = torch.tensor([data.draw(flags), data.draw(flags)]).T
    found = classify_multilabel(images, classes, targets, block_size=data.draw(st.integers(1, 3)))
    assert found.classes.tolist() == targets.any(dim=0).nonzero().flatten().tolist()
    for which, value in zip(found.classes, found.average_precision, strict=True):
        scores = [row[which] for row in naive_scores(images, classes)]
        orders = over_tie_orders(scores)
        present = targets[:, which].tolist()
        expected = sum(naive_average_precision(order, present) for order in orders) / len(orders)
        assert float(value) == pytest.approx(expected)


def test_map_is_that_of_torchmetrics_where_nothing_is_tied() -> None:
    images, classes = torch.randn(200, 8).double(), torch.randn(5, 8).double()
    targets = torch.rand(200, 5) < 0.2
    scores = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(classes).T
    expected = multilabel_average_precision((scores + 1) / 2, targets.long(), 5, average="macro")
    found = multilabel_metrics(classify_multilabel(images, classes, targets))
    assert found["map"].value == pytest.approx(float(expected), abs=1e-6)
    by_sklearn = average_precision_score(targets.numpy(), scores.numpy(), average="macro")
    assert found["map"].value == pytest.approx(float(by_sklearn), abs=1e-6)
    elevens = [naive_eleven_points(scores[:, c].tolist(), targets[:, c].tolist()) for c in range(5)]
    assert found["map_11point"].value == pytest.approx(sum(elevens) / 5, abs=1e-6)


def test_targets_must_be_zero_and_one() -> None:
    with pytest.raises(UserError, match="other than 0 and 1"):
        classify_multilabel(torch.ones(2, 2), torch.ones(3, 2), torch.full((2, 3), 2))
    with pytest.raises(ValueError, match=r"\(images, classes\)"):
        classify_multilabel(torch.ones(2, 2), torch.ones(3, 2), torch.ones(3, 2))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_the_eleven_points_are_those_of_the_expected_curve(data: st.DataObject) -> None:
    num_images = data.draw(st.integers(1, 6))
    rows = st.lists(st.integers(0, 3), min_size=num_images, max_size=num_images)
    images = DIRECTIONS[data.draw(rows)]
    flags = st.lists(st.booleans(), min_size=num_images, max_size=num_images).filter(any)
    present = data.draw(flags)
    outcomes = classify_multilabel(images, DIRECTIONS[:1], torch.tensor([present]).T)
    scores = [row[0] for row in naive_scores(images, DIRECTIONS[:1])]
    orders = over_tie_orders(scores)
    curve = []
    for place in range(1, num_images + 1):
        found = sum(sum(present[which] for which in order[:place]) for order in orders)
        curve.append((found / len(orders), found / len(orders) / place))
    expected = [
        max(precision for found, precision in curve if 10 * found >= t * sum(present) - 1e-9)
        for t in range(11)
    ]
    assert float(outcomes.interpolated) == pytest.approx(sum(expected) / 11)


def test_a_constant_model_scores_chance() -> None:
    targets = torch.rand(60, 7) < torch.linspace(0.02, 0.6, 7)
    metrics = multilabel_metrics(classify_multilabel(torch.ones(60, 4), torch.ones(7, 4), targets))
    for metric in metrics.values():
        assert metric.value == pytest.approx(metric.chance, abs=1e-12)
        assert metric.normalised == pytest.approx(0.0, abs=1e-12)
    shares = targets[:, targets.any(dim=0)].double().mean(dim=0)
    assert metrics["map_11point"].value == pytest.approx(float(shares.mean()))
    # Random order is what chance stands for.
    random = [
        multilabel_metrics(classify_multilabel(torch.randn(60, 4), torch.randn(7, 4), targets))
        for _ in range(60)
    ]
    value = sum(metrics["map"].value for metrics in random) / 60
    assert value == pytest.approx(metrics["map"].chance, abs=0.02)


def test_quantised_scores_lie_between_the_orders_of_their_ties() -> None:
    images, targets = torch.randint(-1, 2, (80, 6)).float(), torch.rand(80, 4) < 0.3
    images[:, 0] = 2.0
    classes = torch.randint(-1, 2, (4, 6)).double()
    classes[:, 0] = 1.0
    found = multilabel_metrics(classify_multilabel(images.double(), classes, targets))
    scores = (
        torch.nn.functional.normalize(images.double()) @ torch.nn.functional.normalize(classes).T
    )
    nudge = 1e-9 * targets.double()
    worst, best = (
        sum(
            naive_average_precision(
                moved[:, c].argsort(descending=True).tolist(), targets[:, c].tolist()
            )
            for c in range(4)
        )
        / 4
        for moved in (scores.round(decimals=7) - nudge, scores.round(decimals=7) + nudge)
    )
    assert worst < found["map"].value < best


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_the_row_of_an_image_is_what_leaving_it_out_changes(data: st.DataObject) -> None:
    num_images = data.draw(st.integers(2, 8))
    rows = st.lists(st.integers(0, 3), min_size=num_images, max_size=num_images)
    images = DIRECTIONS[data.draw(rows)].double()
    flags = st.lists(st.booleans(), min_size=num_images, max_size=num_images).filter(any)
    targets = torch.tensor([data.draw(flags), data.draw(flags)]).T
    outcomes = classify_multilabel(images, DIRECTIONS[:2].double(), targets)
    value = float(outcomes.average_precision.mean())
    without = []
    for left_out in range(num_images):
        rest = torch.arange(num_images) != left_out
        of = classify_multilabel(images[rest], DIRECTIONS[:2].double(), targets[rest])
        without.append(float(of.average_precision.mean()) if len(of.classes) else 0.0)
    mean = sum(without) / num_images
    expected = [value + (num_images - 1) * (mean - each) for each in without]
    assert outcomes.rows.tolist() == pytest.approx(expected)
    assert float(outcomes.rows.mean()) == pytest.approx(value)


def test_the_spread_of_resamples_is_that_of_images_drawn_again() -> None:
    images, classes = torch.randn(150, 8), torch.randn(3, 8)
    targets = (images @ classes.T + 2 * torch.randn(150, 3)) > 3
    outcomes = classify_multilabel(images, classes, targets)
    scores = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(classes).T
    again = []
    for _ in range(300):
        rows = torch.randint(150, (150,))
        values = [
            naive_eleven_points(scores[rows, c].tolist(), targets[rows, c].tolist())
            for c in range(3)
        ]
        again.append(sum(values) / 3)
    spread = float(torch.tensor(again).std())
    assert float(outcomes.interpolated_resamples.std()) == pytest.approx(spread, rel=0.2)
    same = classify_multilabel(images, classes, targets, block_size=1)
    assert torch.equal(same.interpolated_resamples, outcomes.interpolated_resamples)


def test_intervals_hold_what_such_an_evaluation_gives_on_average() -> None:
    classes = torch.nn.functional.normalize(torch.randn(3, 16))
    found = []
    for seed in range(150):
        targets = torch.rand(200, 3) < torch.linspace(0.1, 0.4, 3)
        images = 0.4 * (targets.float() @ classes) + torch.randn(200, 16) / 4
        outcomes = classify_multilabel(images, classes, targets, seed=seed)
        found.append(multilabel_metrics(outcomes))
    for name in ("map", "map_11point"):
        truth = sum(metrics[name].value for metrics in found) / len(found)
        held = 0
        for metrics in found:
            interval = metrics[name].interval
            assert interval is not None
            held += interval.low <= truth <= interval.high
        assert 0.9 <= held / len(found) <= 0.99


def test_a_class_without_an_image_is_left_out() -> None:
    targets = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 0]])
    images, classes = torch.randn(3, 4), torch.randn(3, 4)
    outcomes = classify_multilabel(images, classes, targets)
    assert outcomes.classes.tolist() == [0, 2]
    assert outcomes.positives.tolist() == [2, 2]
    nothing = classify_multilabel(images, classes, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="no row"):
        multilabel_metrics(nothing)
    assert len(classify_multilabel(images[:0], classes, targets[:0]).rows) == 0


def test_one_image_says_nothing() -> None:
    targets = torch.tensor([[1, 0, 0], [0, 1, 1]])[:1]
    metrics = multilabel_metrics(classify_multilabel(torch.randn(1, 4), torch.randn(3, 4), targets))
    assert metrics["map"].interval == (0.0, 1.0)
