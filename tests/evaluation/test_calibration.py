import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from clipkit.errors import UserError
from clipkit.evaluation import CalibrationOutcomes, calibrate, calibration_metrics, reliability


def outcomes_of(confidence: Tensor, correct: Tensor) -> CalibrationOutcomes:
    return CalibrationOutcomes(confidence=confidence.double(), correct=correct.double())


def naive_error(confidence: list[float], correct: list[float], num_bins: int) -> float:
    total = 0.0
    for which in range(num_bins):
        rows = [
            (sure, right)
            for sure, right in zip(confidence, correct, strict=True)
            if which / num_bins < sure <= (which + 1) / num_bins
        ]
        total += abs(sum(sure - right for sure, right in rows))
    return total / len(confidence)


@pytest.mark.parametrize(("num_bins", "scale"), [(15, 8.0), (10, 2.0)])
def test_the_plug_in_value_is_that_of_torchmetrics(num_bins: int, scale: float) -> None:
    classes, labels = torch.randn(7, 16), torch.randint(7, (500,))
    images = classes[labels] + 2 * torch.randn(500, 16)
    outcomes = calibrate(images, classes, labels, scale, block_size=33)
    cosines = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(classes).T
    probabilities = (scale * cosines).softmax(dim=1)
    expected = multiclass_calibration_error(probabilities, labels, 7, n_bins=num_bins, norm="l1")
    found = calibration_metrics(outcomes, num_bins=num_bins)["ece_plugin"].value
    assert found == pytest.approx(float(expected), abs=1e-6)
    assert outcomes.confidence.tolist() == pytest.approx(probabilities.amax(dim=1).tolist())


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.sampled_from([0.0, 0.5, 1.0])), min_size=1),
    st.sampled_from([1, 4, 16]),  # edges that are exact
)
def test_errors_stand_where_they_should(rows: list[tuple[float, float]], num_bins: int) -> None:
    confidence, correct = (list(side) for side in zip(*rows, strict=True))
    outcomes = outcomes_of(torch.tensor(confidence).double(), torch.tensor(correct))
    metrics = calibration_metrics(outcomes, num_bins=num_bins)
    plugin, metric = metrics["ece_plugin"], metrics["ece"]
    expected = naive_error(outcomes.confidence.tolist(), correct, num_bins)
    assert plugin.value == pytest.approx(expected, abs=1e-9)
    assert metric.interval is not None
    assert 0 <= metric.interval.low <= metric.value <= metric.interval.high <= 1
    assert metric.n == len(rows)
    curve = reliability(outcomes, num_bins=num_bins)
    assert int(curve.count.sum()) == len(rows)
    filled = curve.count > 0
    gaps = (curve.accuracy - curve.confidence).abs() * curve.count / len(rows)
    assert float(gaps[filled].sum()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("num_classes", [2, 5, 50])
def test_a_constant_model_is_as_sure_as_it_is_right(num_classes: int) -> None:
    labels = torch.randint(num_classes, (99,))
    # In float32 the cosines of one row differ by its last digit on some processors.
    ones = torch.ones(99, 7, dtype=torch.float64)
    outcomes = calibrate(ones, ones[:num_classes], labels, 30.0)
    for metric in calibration_metrics(outcomes).values():
        assert metric.value == pytest.approx(0.0, abs=1e-12)
        assert metric.chance == 0
        assert metric.normalised is None


def test_a_model_that_is_always_sure_and_wrong_has_the_greatest_error() -> None:
    metrics = calibration_metrics(outcomes_of(torch.ones(200), torch.zeros(200)))
    assert metrics["ece_plugin"].value == 1.0
    assert metrics["ece"].value == pytest.approx(1.0)


def test_the_two_values_agree_as_images_grow_many() -> None:
    sure = 0.5 + 0.5 * torch.rand(200_000)
    right = torch.rand(200_000) < sure - 0.1
    metrics = calibration_metrics(outcomes_of(sure, right))
    assert metrics["ece"].value == pytest.approx(metrics["ece_plugin"].value, abs=1e-3)
    assert metrics["ece"].value == pytest.approx(0.1, abs=5e-3)


def test_few_images_do_not_make_a_calibrated_model_look_wrong() -> None:
    found = []
    for _ in range(50):
        sure = 0.2 + 0.8 * torch.rand(200)
        found.append(calibration_metrics(outcomes_of(sure, torch.rand(200) < sure)))
    plugin = sum(metrics["ece_plugin"].value for metrics in found) / 50
    assert plugin > 0.06
    assert sum(metrics["ece"].value for metrics in found) / 50 < plugin / 2


@pytest.mark.parametrize("kind", ["overconfident", "everywhere", "perfect"])
def test_the_interval_holds_the_true_error(kind: str) -> None:
    def accuracy(sure: Tensor) -> Tensor:
        return {"overconfident": 0.7 * sure, "everywhere": sure - 0.04, "perfect": sure}[kind]

    # All gaps have one sign, so the bins of the truth do not matter.
    truth = {"overconfident": 0.3 * 0.6, "everywhere": 0.04, "perfect": 0.0}[kind]
    held = 0
    for _ in range(400):
        sure = 0.2 + 0.8 * torch.rand(200).double()
        outcomes = outcomes_of(sure, torch.rand(200) < accuracy(sure))
        interval = calibration_metrics(outcomes)["ece"].interval
        assert interval is not None
        held += interval.low <= truth <= interval.high
    assert 0.92 <= held / 400 <= 0.99


def test_empty_bins_have_no_mean() -> None:
    curve = reliability(
        outcomes_of(torch.tensor([0.15, 0.95]), torch.tensor([0.0, 1.0])), num_bins=5
    )
    assert curve.low.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert curve.count.tolist() == [1, 0, 0, 0, 1]
    assert curve.accuracy[[0, 4]].tolist() == [0, 1]
    assert bool(curve.confidence[1:4].isnan().all())


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_is_finite_and_above_zero(scale: float) -> None:
    with pytest.raises(ValueError, match="scale is"):
        calibrate(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0, 1]), scale)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(UserError, match="outside the list"):
        calibrate(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0, 2]), 10.0)
    with pytest.raises(ValueError, match="no row"):
        calibration_metrics(outcomes_of(torch.ones(0), torch.ones(0)))
