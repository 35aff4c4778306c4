import math

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import classify_by_neighbours, knn_metrics


def blobs(num_train: int, num_test: int, num_classes: int) -> tuple[Tensor, ...]:
    centres = torch.randn(num_classes, 8)
    train, test = torch.randint(num_classes, (num_train,)), torch.randint(num_classes, (num_test,))
    return (
        centres[train] + torch.randn(num_train, 8),
        train,
        centres[test] + torch.randn(num_test, 8),
        test,
    )


def naive_votes(
    train: Tensor, labels: Tensor, image: Tensor, k: int, temperature: float, num_classes: int
) -> list[float]:
    unit = [row.double() / row.double().norm() for row in train]
    cosines = [float(row @ image.double() / image.double().norm()) for row in unit]
    nearest = sorted(range(len(train)), key=lambda row: -cosines[row])[:k]
    votes = [0.0] * num_classes
    for row in nearest:
        votes[int(labels[row])] += math.exp(cosines[row] / temperature)
    return votes


def test_predictions_are_those_of_a_loop() -> None:
    train, train_labels, test, test_labels = blobs(60, 40, 5)
    found = classify_by_neighbours(
        train, train_labels, 7 * test, test_labels, num_classes=5, k=9, temperature=0.2
    )
    for row in range(40):
        votes = naive_votes(train, train_labels, test[row], 9, 0.2, 5)
        assert int(found.predicted[row]) == votes.index(max(votes))
        assert float(found.top1[row]) == float(votes.index(max(votes)) == test_labels[row])


@pytest.mark.parametrize("temperature", [0.07, None])
def test_predictions_are_those_of_scikit_learn(temperature: float | None) -> None:
    train, train_labels, test, test_labels = blobs(500, 300, 6)
    found = classify_by_neighbours(
        train, train_labels, test, test_labels, num_classes=6, k=20, temperature=temperature
    )

    def weights(distance: object) -> object:
        return torch.exp((1 - torch.as_tensor(distance)) / (temperature or 1)).numpy()

    peer = KNeighborsClassifier(
        20, metric="cosine", weights=weights if temperature else "uniform", algorithm="brute"
    ).fit(train.double().numpy(), train_labels.numpy())
    expected = torch.as_tensor(peer.predict(test.double().numpy()))
    # A plain vote may be undecided; both then name the lowest class.
    assert torch.equal(found.predicted, expected)
    assert found.tied.any() == (temperature is None)
    metric = knn_metrics(found)["top1"]
    if temperature:
        assert metric.value == pytest.approx(float((expected == test_labels).double().mean()))
    assert metric.interval is not None
    assert metric.interval.low < metric.value < metric.interval.high


@pytest.mark.parametrize("temperature", [0.07, None])
@pytest.mark.parametrize("counts", [[7, 7, 7, 7, 7], [3, 9, 9, 1, 0]])
def test_a_constant_model_scores_chance(temperature: float | None, counts: list[int]) -> None:
    labels = torch.arange(5).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    test_labels = torch.randint(5, (50,))
    metrics = knn_metrics(
        classify_by_neighbours(
            torch.ones(len(labels), 4), labels, torch.ones(50, 4), test_labels,
            num_classes=5, k=6, temperature=temperature, block_size=7,
        )
    )  # fmt: skip
    most = torch.tensor(counts) == max(counts)
    expected = float((most[test_labels].double() / most.sum()).mean())
    assert metrics["top1"].value == pytest.approx(expected)
    for name, metric in metrics.items():
        assert metric.chance is None if name == "tie_rate" else metric.value == metric.chance


def test_those_tied_for_the_last_place_share_it() -> None:
    # One neighbour is nearer; of the three next, of which class 1 has two, one place is left.
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 2, 3])
    for order in (torch.arange(5), torch.tensor([3, 4, 2, 0, 1])):
        found = classify_by_neighbours(
            train[order], labels[order], torch.tensor([[1.0, 0.0]] * 3), torch.tensor([0, 1, 2]),
            num_classes=4, k=2, temperature=None,
        )  # fmt: skip
        assert found.top1.tolist() == [1.0, 0.0, 0.0]
        # Votes of 1, 2/3 and 1/3.
        tied = classify_by_neighbours(
            train[order], labels[order], torch.tensor([[0.6, 0.8]] * 3), torch.tensor([0, 1, 2]),
            num_classes=4, k=2, temperature=None,
        )  # fmt: skip
        assert tied.top1.tolist() == [0.0, 1.0, 0.0]


def test_classes_of_as_many_votes_share_the_credit() -> None:
    train = torch.eye(4)[[0, 0, 1, 2]]
    found = classify_by_neighbours(
        train, torch.tensor([0, 1, 2, 3]), torch.eye(4)[[0, 0, 0]], torch.tensor([0, 1, 2]),
        num_classes=4, k=2,
    )  # fmt: skip
    assert found.top1.tolist() == [0.5, 0.5, 0.0]
    assert found.tied.tolist() == [True, True, False]
    assert not found.strict_top1.any()


@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_neither_blocks_nor_the_order_of_rows_change_anything(block_size: int) -> None:
    train, train_labels, test, test_labels = blobs(80, 60, 5)
    train[:20] = train[20:40]  # ties
    whole = classify_by_neighbours(train, train_labels, test, test_labels, num_classes=5, k=5)
    order, moved = torch.randperm(80), torch.randperm(60)
    shuffled = classify_by_neighbours(
        train[order], train_labels[order], test[moved], test_labels[moved],
        num_classes=5, k=5, block_size=block_size,
    )  # fmt: skip
    torch.testing.assert_close(shuffled.top1, whole.top1[moved])
    assert torch.equal(shuffled.predicted, whole.predicted[moved])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 4}, "k is 4 for 3 training images"),
        ({"k": 0}, "k is 0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"num_classes": 2}, "train_labels name classes outside the list: 2"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, float], message: str) -> None:
    arguments = {"num_classes": 3, "k": 1} | changes
    with pytest.raises(UserError, match=message):
        classify_by_neighbours(
            torch.eye(3), torch.arange(3), torch.eye(3), torch.zeros(3).long(), **arguments
        )


@pytest.mark.parametrize("side", ["training", "test"])
def test_embeddings_that_are_not_finite_are_refused(side: str) -> None:
    train, test = torch.eye(3), torch.eye(3)
    {"training": train, "test": test}[side][1] = torch.nan
    with pytest.raises(UserError, match=f"1 of 3 rows of the {side} embeddings"):
        classify_by_neighbours(train, torch.arange(3), test, torch.arange(3), num_classes=3, k=1)


def test_quantised_images_that_say_nothing_score_chance() -> None:
    # Four different images in all; the right class always stands first among those tied.
    levels = torch.eye(4).repeat(30, 1)
    labels = torch.arange(120) // 4 % 6
    found = classify_by_neighbours(
        levels, labels, levels[:4].repeat(6, 1), torch.arange(24) // 4, num_classes=6, k=20
    )
    assert found.tied.all()
    assert float(found.top1.mean()) == pytest.approx(1 / 6)
