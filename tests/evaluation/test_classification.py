from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from clipkit.errors import UserError
from clipkit.evaluation import (
    build_classifier,
    classification_metrics,
    classify,
    expand,
)

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


def test_the_classifier_is_the_normalised_mean_of_normalised_prompts() -> None:
    text, classes = torch.randn(11, 8), torch.tensor([2, 0, 1, 2, 2, 0, 1, 1, 0, 2, 1])
    expected = []
    for which in range(3):
        total = sum(
            row.double() / row.double().norm()
            for row, c in zip(text, classes, strict=True)
            if c == which
        )
        assert isinstance(total, Tensor)
        expected.append(total / total.norm())
    found = build_classifier(text, classes, 3)
    torch.testing.assert_close(found, torch.stack(expected).float())
    assert build_classifier(text.double(), classes, 3).dtype is torch.float64


@pytest.mark.parametrize(
    ("classes", "message"),
    [([0, 0, 2], "classes without a prompt: 1"), ([0, 1, 3], "outside the list: 3")],
)
def test_a_classifier_needs_a_prompt_for_each_class(classes: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_classifier(torch.randn(3, 4), torch.tensor(classes), 3)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_outcomes_are_the_mean_over_all_orders_of_ties(data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(1, 6))
    picks = st.lists(st.integers(0, 3), min_size=num_classes, max_size=num_classes)
    classes = DIRECTIONS[data.draw(picks)]
    images = DIRECTIONS[data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))]
    labels = torch.tensor([data.draw(st.integers(0, num_classes - 1)) for _ in images])
    found = classify(images, classes, labels, block_size=data.draw(st.integers(1, 5)))
    for row, scores in enumerate(naive_scores(images, classes)):
        label = int(labels[row])
        orders = over_tie_orders(scores)
        top1 = sum(order[0] == label for order in orders) / len(orders)
        top5 = sum(label in order[:5] for order in orders) / len(orders)
        assert float(found.top1[row]) == pytest.approx(top1)
        assert (found.top5 is None) == (num_classes < 5)
        assert found.top5 is None or float(found.top5[row]) == pytest.approx(top5)
        assert bool(found.strict_top1[row]) == (top1 == 1)
        assert bool(found.tied[row]) == (0 < top1 < 1)
        assert int(found.predicted[row]) == scores.index(max(scores))


def test_metrics_are_those_of_torchmetrics_where_nothing_is_tied() -> None:
    labels = torch.randint(3, 12, (400,))  # classes 0, 1 and 2 are absent
    classes = torch.randn(12, 16)
    images = classes[labels] + 2 * torch.randn(400, 16)
    outcomes = classify(images, classes, labels, block_size=37)
    metrics = classification_metrics(outcomes)
    scores = torch.nn.functional.normalize(images, dim=1) @ torch.nn.functional.normalize(classes).T
    for name, average, k in [
        ("top1", "micro", 1),
        ("top5", "micro", 5),
        ("mean_class_top1", "macro", 1),
    ]:
        # Its macro average counts a predicted but absent class as zero: leave those out by hand.
        values = multiclass_accuracy(scores, labels, 12, average="none", top_k=k)
        micro = multiclass_accuracy(scores, labels, 12, average="micro", top_k=k)
        expected = micro if average == "micro" else values[labels.unique()].mean()
        assert metrics[name].value == pytest.approx(float(expected), abs=1e-6)
    assert torch.equal(outcomes.predicted, scores.argmax(dim=1))


@pytest.mark.parametrize("num_classes", [2, 5, 50])
def test_a_constant_model_scores_chance(num_classes: int) -> None:
    labels = torch.randint(num_classes, (99,))
    metrics = classification_metrics(
        classify(torch.ones(99, 7), torch.ones(num_classes, 7), labels, block_size=10)
    )
    expected = {"top1": 1 / num_classes, "mean_class_top1": 1 / num_classes, "strict_top1": 0}
    if num_classes >= 5:
        expected["top5"] = 5 / num_classes
    assert metrics.pop("tie_rate").value == 1.0
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(expected)
    assert all(metric.value == metric.chance for metric in metrics.values())


def test_a_tie_is_worth_no_more_where_it_favours_the_right_class() -> None:
    # The right class is always the first of those tied: argmax would score 100 %.
    images = torch.eye(10)
    classes = torch.eye(10)[[0, 0, 0, 1, 1, 1]]
    outcomes = classify(images[[0, 1]].repeat(50, 1), classes, torch.tensor([0, 3]).repeat(50))
    metrics = classification_metrics(outcomes)
    assert metrics["top1"].value == pytest.approx(1 / 3)
    assert metrics["strict_top1"].value == 0.0
    assert metrics["tie_rate"].value == 1.0


def test_classes_of_one_name_share_the_credit() -> None:
    prompts = expand(["missile", "fox", "missile"], "imagenet_7")
    text = torch.randn(len(prompts.unique), 8)
    classifier = build_classifier(text[prompts.prompt_index], prompts.class_of_prompt, 3)
    outcomes = classify(classifier, classifier, torch.tensor([0, 1, 2]))
    assert outcomes.top1.tolist() == [0.5, 1.0, 0.5]
    assert outcomes.tied.tolist() == [True, False, True]


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_neither_blocks_nor_the_order_of_rows_change_anything(block_size: int) -> None:
    images, classes, labels = torch.randn(101, 8), torch.randn(9, 8), torch.randint(9, (101,))
    whole = classify(images, classes, labels, block_size=101)
    order = torch.randperm(101)
    shuffled = classify(images[order], classes, labels[order], block_size=block_size)
    assert torch.equal(shuffled.top1, whole.top1[order])
    assert whole.top5 is not None
    assert shuffled.top5 is not None
    assert torch.equal(shuffled.top5, whole.top5[order])
    assert torch.equal(shuffled.predicted, whole.predicted[order])


def test_labels_outside_the_classes_are_named() -> None:
    with pytest.raises(UserError, match=r"labels .* outside the list: -1, 4 \(3 rows\)"):
        classify(torch.ones(4, 2), torch.ones(4, 2), torch.tensor([0, 4, -1, 4]))
    with pytest.raises(ValueError, match="integer class ids"):
        classify(torch.ones(1, 2), torch.ones(4, 2), torch.tensor([0.0]))


@pytest.mark.parametrize("side", ["image", "class"])
def test_embeddings_that_are_not_finite_are_refused(side: str) -> None:
    images, classes = torch.ones(4, 2), torch.ones(3, 2)
    {"image": images, "class": classes}[side][1] = torch.nan
    with pytest.raises(UserError, match=f"1 of . rows of the {side} embeddings"):
        classify(images, classes, torch.zeros(4, dtype=torch.int64))


def test_no_rows_have_outcomes_but_no_mean() -> None:
    outcomes = classify(torch.ones(0, 2), torch.ones(3, 2), torch.zeros(0, dtype=torch.int64))
    assert len(outcomes.top1) == 0
    with pytest.raises(ValueError, match="no row"):
        classification_metrics(outcomes)


def test_every_metric_has_an_interval_and_its_chance() -> None:
    labels = torch.randint(6, (50,))
    outcomes = classify(torch.randn(50, 4), torch.randn(6, 4), labels)
    metrics = classification_metrics(outcomes)
    assert list(metrics) == ["top1", "top5", "mean_class_top1", "strict_top1", "tie_rate"]
    for metric in metrics.values():
        assert metric.interval is not None
        assert metric.interval.low <= metric.value <= metric.interval.high
        assert metric.n == 50
    chances = [metric.chance for metric in metrics.values()]
    assert chances == [pytest.approx(1 / 6), pytest.approx(5 / 6), pytest.approx(1 / 6), 0.0, None]
    top1 = metrics["top1"]
    assert top1.normalised == pytest.approx((top1.value - 1 / 6) / (5 / 6))
