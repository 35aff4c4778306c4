import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import (
    Labelled,
    Probe,
    few_shot_metrics,
    few_shot_probe,
    fit_probe,
    linear_probe,
    per_seed,
    probe_metrics,
    probes,
)


def draw(num_rows: int, *, noise: float = 3.0, num_classes: int = 6, dim: int = 24) -> Labelled:
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(num_classes, (num_rows,))
    return Labelled(2 + centres[labels] + noise * torch.randn(num_rows, dim), labels)


def loss_of(weight: Tensor, bias: Tensor, rows: Labelled, penalty: float) -> float:
    scores = F.normalize(rows.embeddings.double(), dim=1) @ weight.T + bias
    total = F.cross_entropy(scores, rows.labels, reduction="sum")
    return float(total + penalty / 2 * weight.square().sum())


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_probe_is_that_of_scikit_learn(penalty: float, dtype: torch.dtype) -> None:
    train, test = draw(300), draw(200)
    probe = fit_probe(
        Labelled(train.embeddings.to(dtype), train.labels), num_classes=6, penalty=penalty
    )
    peer = LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=20_000)
    peer.fit(F.normalize(train.embeddings.double(), dim=1).numpy(), train.labels.numpy())
    expected = loss_of(*map(torch.tensor, (peer.coef_, peer.intercept_)), train, penalty)
    found = loss_of(probe.weight, probe.bias, train, penalty)
    assert found == pytest.approx(expected, rel=1e-5)
    assert probe.objective == pytest.approx(found / 300, rel=1e-5)
    predicted = peer.predict(F.normalize(test.embeddings.double(), dim=1).numpy())
    assert torch.equal(probe(test.embeddings).argmax(dim=1), torch.as_tensor(predicted))
    assert 0 < probe.iterations < 1000


def test_neither_the_norm_nor_the_order_nor_the_grad_mode_changes_a_probe() -> None:
    train = draw(120)
    order = torch.randperm(120)
    probe = fit_probe(train, num_classes=6, penalty=0.1)
    norms = torch.rand(120, 1) + 0.5
    moved = Labelled((norms * train.embeddings)[order], train.labels[order])
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        other = fit_probe(moved, num_classes=6, penalty=0.1)
    torch.testing.assert_close(other.weight, probe.weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.bias, probe.bias, atol=1e-4, rtol=1e-4)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train = draw(120)
    probe = fit_probe(train, num_classes=6, penalty=0.1)
    monkeypatch.setattr(probes, "_block_rows", lambda num_classes: 7)
    blocks = fit_probe(train, num_classes=6, penalty=0.1)
    torch.testing.assert_close(blocks.weight, probe.weight, atol=1e-5, rtol=1e-5)


def test_a_class_without_a_training_image_is_never_named() -> None:
    train = draw(60, num_classes=4)
    probe = fit_probe(train, num_classes=7, penalty=1.0)
    assert torch.isneginf(probe(train.embeddings)[:, 4:]).all()
    outcomes = linear_probe(
        train, None, Labelled(torch.randn(70, 24), torch.arange(7).repeat(10)), num_classes=7
    )
    assert outcomes.test.predicted.max() < 4
    assert outcomes.test.top1[outcomes.test.labels > 3].sum() == 0


def test_the_sweep_finds_the_best_of_all_penalties_near_its_peak() -> None:
    train, validation, test = draw(80), draw(200), draw(300)
    outcomes = linear_probe(train, validation, test, num_classes=6)
    tried = [one.penalty for one in outcomes.sweep]
    assert tried == sorted(tried)
    assert {probes.PENALTIES[at] for at in range(0, 97, 16)} <= set(tried)
    assert len(tried) <= 7 + 2 * 4
    best = max(outcomes.sweep, key=lambda one: (one.top1, -one.loss))
    assert outcomes.penalty == best.penalty
    # Its neighbours were tried, and are no better.
    at = probes.PENALTIES.index(outcomes.penalty)
    assert {probes.PENALTIES[at - 1], probes.PENALTIES[at + 1]} <= set(tried)
    alone = fit_probe(train, num_classes=6, penalty=best.penalty)
    right = alone(validation.embeddings).argmax(dim=1) == validation.labels
    assert best.top1 == pytest.approx(float(right.double().mean()))


def test_the_chosen_penalty_is_fitted_on_train_and_validation() -> None:
    train, validation, test = draw(60), draw(60), draw(80)
    outcomes = linear_probe(train, validation, test, num_classes=6)
    both = Labelled(*map(torch.cat, zip(train, validation, strict=True)))
    probe = fit_probe(both, num_classes=6, penalty=outcomes.penalty)
    predicted = probe(test.embeddings).argmax(dim=1)
    assert torch.equal(outcomes.test.predicted, predicted)
    metrics = probe_metrics(outcomes)
    assert metrics["top1"].value == float((predicted == test.labels).double().mean())
    assert metrics["top1"].n == 80
    # The most frequent class of the training images.
    common = both.labels.bincount().argmax()
    assert metrics["top1"].chance == float((test.labels == common).double().mean())
    assert metrics["mean_class_top1"].chance == pytest.approx(1 / 6)


def test_one_penalty_needs_no_choice() -> None:
    train, test = draw(60), draw(40)
    outcomes = linear_probe(train, None, test, num_classes=6, penalties=[0.5])
    assert outcomes.sweep == ()
    expected = fit_probe(train, num_classes=6, penalty=0.5)(test.embeddings).argmax(dim=1)
    assert torch.equal(outcomes.test.predicted, expected)


def test_a_fifth_of_each_class_is_held_out() -> None:
    train = Labelled(torch.arange(65.0).unsqueeze(1), torch.tensor([0] * 30 + [1] * 20 + [2] * 15))
    left, held = probes.hold_out(train, 0.2, num_classes=3)
    assert held.labels.bincount().tolist() == [6, 4, 3]
    assert sorted(torch.cat([left.embeddings, held.embeddings]).flatten().tolist()) == list(
        range(65)
    )
    again = probes.hold_out(train, 0.2, num_classes=3)[1]
    other = probes.hold_out(train, 0.2, num_classes=3, seed=1)[1]
    assert torch.equal(again.embeddings, held.embeddings)
    assert not torch.equal(other.embeddings, held.embeddings)
    with pytest.raises(UserError, match="give a validation split"):
        probes.hold_out(draw(6), 0.01, num_classes=6)


@pytest.mark.parametrize("counts", [[10, 10, 10, 10, 10, 0], [4, 9, 20, 20, 5, 6]])
def test_a_constant_model_scores_chance(counts: list[int]) -> None:
    labels = torch.arange(6).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels))]
    test = Labelled(torch.full((90, 5), 0.3), torch.randint(6, (90,)))
    metrics = probe_metrics(
        linear_probe(Labelled(torch.full((len(labels), 5), 0.3), labels), None, test, num_classes=6)
    )
    most = torch.tensor(counts) == max(counts)
    expected = float((most[test.labels].double() / most.sum()).mean())
    assert metrics["top1"].value == pytest.approx(expected)
    for name, metric in metrics.items():
        assert metric.chance is None if name == "tie_rate" else metric.value == metric.chance


def test_images_alike_up_to_rounding_score_chance_too() -> None:
    labels = torch.arange(5).repeat(20)
    embeddings = torch.ones(100, 8) + 1e-7 * torch.randn(100, 8)
    outcomes = linear_probe(
        Labelled(embeddings, labels), None, Labelled(torch.ones(50, 8), labels[:50]), num_classes=5,
        penalties=[1.0],
    )  # fmt: skip
    assert probe_metrics(outcomes)["top1"].value == pytest.approx(0.2)


def test_quantised_images_that_say_nothing_score_chance() -> None:
    # Four different images in all, each as often in every class.
    levels, labels = torch.eye(4).repeat(30, 1), torch.arange(120) // 4 % 6
    outcomes = linear_probe(
        Labelled(levels, labels), None, Labelled(levels, labels), num_classes=6, penalties=[0.1]
    )
    metrics = probe_metrics(outcomes)
    assert metrics["top1"].value == pytest.approx(metrics["top1"].chance)
    assert metrics["tie_rate"].value == 1.0


def test_few_shots_are_drawn_reproducibly() -> None:
    labels = torch.randint(4, (200,))
    rows = Labelled(torch.arange(200.0).unsqueeze(1), labels)

    def drawn(shots: int, seed: int) -> set[float]:
        few = probes.draw_shots(rows, shots, num_classes=4, seed=seed)
        assert few.labels.bincount().tolist() == [shots] * 4
        assert torch.equal(labels[few.embeddings.flatten().long()], few.labels)
        return set(few.embeddings.flatten().tolist())

    assert drawn(5, 0) == drawn(5, 0)
    assert drawn(5, 0) != drawn(5, 1)
    assert drawn(2, 0) < drawn(5, 0)
    with pytest.raises(
        UserError, match="1 of 5 classes have fewer than 3 training images, class 4"
    ):
        probes.draw_shots(rows, 3, num_classes=5, seed=0)


def test_few_shot_metrics_are_means_over_the_seeds() -> None:
    train, test = draw(300, noise=2.0), draw(150, noise=2.0)
    outcomes = few_shot_probe(train, test, num_classes=6, shots=4, seeds=range(3))
    values = per_seed(outcomes)
    for seed, run, value in zip(outcomes.seeds, outcomes.runs, values["top1"], strict=True):
        few = probes.draw_shots(train, 4, num_classes=6, seed=seed)
        probe = fit_probe(few, num_classes=6, penalty=probes.FEW_SHOT_PENALTY)
        assert isinstance(probe, Probe)
        assert torch.equal(run.predicted, probe(test.embeddings).argmax(dim=1))
        assert value == float(run.top1.mean())
    metrics = few_shot_metrics(outcomes)
    assert list(metrics) == ["top1", "top5", "mean_class_top1", "strict_top1", "tie_rate"]
    for name, metric in metrics.items():
        assert metric.value == pytest.approx(sum(values[name]) / 3)
        assert metric.interval is not None
        assert metric.interval.low <= metric.value <= metric.interval.high
        assert metric.n == 150
    assert metrics["top1"].value == pytest.approx(float(outcomes.top1.mean()))
    assert metrics["top1"].chance == pytest.approx(1 / 6)
    one = few_shot_metrics(few_shot_probe(train, test, num_classes=6, shots=4, seeds=[3]))
    assert one["top1"].interval is None


def test_few_shots_of_a_constant_model_score_chance() -> None:
    train = Labelled(torch.ones(60, 5), torch.arange(6).repeat(10))
    test = Labelled(torch.ones(33, 5), torch.randint(6, (33,)))
    for metric in few_shot_metrics(
        few_shot_probe(train, test, num_classes=6, shots=3, seeds=[0, 1])
    ).values():
        assert metric.chance is None or metric.value == metric.chance


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize(("of_seeds", "num_seeds"), [(0.1, 3), (0.3, 5)])
def test_the_interval_over_seeds_and_images_covers(
    of_seeds: float, num_seeds: int, by_class: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    # A probit model: seeds and images are both drawn, and have their say.
    truth = float(torch.special.ndtr(torch.tensor(0.3 / math.sqrt(2 + of_seeds**2))))
    strata = torch.arange(200) % 5 if by_class else torch.zeros(200, dtype=torch.int64)
    covered = 0
    for _ in range(400):
        seeds = of_seeds * torch.randn(num_seeds, 1, generator=generator)
        images = torch.randn(1, 200, generator=generator)
        rest = torch.randn(num_seeds, 200, generator=generator)
        values = (0.3 + seeds + images + rest > 0).double()
        found = probes._two_way_interval(values, strata)
        assert found is not None
        covered += found.low <= truth <= found.high
    assert 0.92 < covered / 400 < 0.99


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows: fit_probe(rows, num_classes=6, penalty=0.0), "penalty is 0.0"),
        (lambda rows: fit_probe(rows, num_classes=2, penalty=1.0), "outside the list: 2, 3, 4, 5"),
        (
            lambda rows: fit_probe(Labelled(rows[0] / 0, rows[1]), num_classes=6, penalty=1.0),
            "30 of 30 rows of the training embeddings are not finite",
        ),
        (
            lambda rows: linear_probe(rows, None, rows, num_classes=6, penalties=[]),
            "penalties is an empty list",
        ),
        (lambda rows: few_shot_probe(rows, rows, num_classes=6, shots=0), "shots is 0"),
        (
            lambda rows: few_shot_probe(rows, rows, num_classes=6, shots=1, seeds=[1, 1]),
            r"seeds are \[1, 1\]",
        ),
    ],
)
def test_what_cannot_be_is_refused(call, message: str) -> None:
    rows = Labelled(torch.randn(30, 4), torch.arange(6).repeat(5))
    with pytest.raises(UserError, match=message):
        call(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_fits_the_same_probe() -> None:
    train, test = draw(300), draw(100)
    onto = [Labelled(rows.embeddings.cuda(), rows.labels.cuda()) for rows in (train, test)]
    found = linear_probe(onto[0], None, onto[1], num_classes=6)
    expected = linear_probe(train, None, test, num_classes=6)
    assert found.penalty == expected.penalty
    assert torch.equal(found.test.predicted, expected.test.predicted)
