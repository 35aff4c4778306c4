import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from clipkit.evaluation import (
    Interval,
    class_mean_interval,
    interval,
    mean_interval,
    median_interval,
    wilson,
)
from clipkit.evaluation.statistics import spread_interval, student_quantile, student_tail


@pytest.mark.parametrize(
    ("mean", "n", "low", "high"),
    [(0.25, 20, 0.111862, 0.468701), (0.0, 10, 0.0, 0.277533), (1.0, 10, 0.722467, 1.0)],
)
def test_wilson_against_tables(mean: float, n: float, low: float, high: float) -> None:
    assert wilson(mean, n) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize("proportion", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_wilson_covers(proportion: float) -> None:
    n, covered = 200, 0.0
    for hits in range(n + 1):
        found = wilson(hits / n, n)
        if found.low <= proportion <= found.high:
            covered += math.comb(n, hits) * proportion**hits * (1 - proportion) ** (n - hits)
    assert 0.93 < covered < 0.98


@pytest.mark.parametrize(("mean", "n"), [(1.5, 10), (0.5, 0), (math.nan, 10)])
def test_what_is_no_proportion_is_refused(mean: float, n: float) -> None:
    with pytest.raises(ValueError, match=r"proportion|at least one row"):
        wilson(mean, n)


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 2.7, 5, 9, 49.5, 200, 1e4, 1e6])
def test_students_distribution_is_that_of_scipy(freedom: float) -> None:
    for t in (-30.0, -2.0, -0.1, 0.0, 1e-3, 0.5, 1.0, 3.0, 12.0, 100.0):
        expected = float(stats.t.sf(t, freedom))
        assert student_tail(t, freedom) == pytest.approx(expected, rel=1e-8, abs=1e-300)
    for probability in (0.5, 0.6, 0.95, 0.975, 0.9999):
        expected = float(stats.t.ppf(probability, freedom))
        found = student_quantile(freedom, probability)
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("freedom", "probability"), [(0, 0.975), (3, 1.0), (3, 0.3)])
def test_quantiles_that_do_not_exist_are_refused(freedom: float, probability: float) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        student_quantile(freedom, probability)


@pytest.mark.parametrize("rows", [2, 7, 400])
def test_plain_outcomes_have_wilsons_interval(rows: int) -> None:
    outcomes = (torch.rand(rows) < 0.7).float()
    expected = wilson(float(outcomes.mean()), rows, critical=student_quantile(rows - 1))
    assert interval(outcomes) == pytest.approx(expected)
    assert interval(outcomes, torch.randperm(rows)) == pytest.approx(expected)


def test_copies_of_a_row_say_no_more_than_the_row() -> None:
    outcomes = (torch.rand(200) < 0.4).double()
    once, copied = interval(outcomes), interval(outcomes.repeat(5), torch.arange(200).repeat(5))
    assert copied == pytest.approx(once)
    assert interval(torch.ones(10), torch.zeros(10)) == (0.0, 1.0)


def test_a_perfect_score_is_not_certain() -> None:
    critical = student_quantile(49)
    assert interval(torch.ones(50)) == pytest.approx(wilson(1.0, 50, critical=critical))
    assert class_mean_interval(torch.ones(50), torch.arange(50) % 5) == pytest.approx(
        wilson(1.0, 50)
    )
    grouped = interval(torch.ones(50), torch.arange(50) // 5)
    assert grouped.high == 1.0
    assert grouped.low < wilson(1.0, 10).low


@pytest.mark.parametrize("n", [50, 100, 500])
def test_the_interval_of_a_proportion_covers(n: int) -> None:
    ends = [interval((torch.arange(n) < hits).double()) for hits in range(n + 1)]
    low, high = (torch.tensor(side).double() for side in zip(*ends, strict=True))
    truths = torch.linspace(0.02, 0.98, 193).double().unsqueeze(1)
    chances = torch.tensor(stats.binom.pmf(range(n + 1), n, truths.numpy()))
    held = (chances * ((low <= truths) & (truths <= high))).sum(dim=1)
    assert 0.94 <= float(held.mean()) <= 0.96
    assert float(held.min()) >= 0.92


def coverage(truth: float, draw: Callable[[torch.Generator], Interval]) -> float:
    generator = torch.Generator().manual_seed(0)
    found = [draw(generator) for _ in range(1000)]
    return sum(low <= truth <= high for low, high in found) / len(found)


def test_the_interval_of_grouped_outcomes_covers() -> None:
    def draw(generator: torch.Generator) -> Interval:
        ease = torch.rand(80, generator=generator).square().repeat_interleave(5)
        outcomes = (torch.rand(400, generator=generator) < ease).double()
        return interval(outcomes, torch.arange(400) // 5)

    assert 0.93 < coverage(1 / 3, draw) < 0.975


def test_the_interval_of_shares_covers() -> None:
    def draw(generator: torch.Generator) -> Interval:
        return interval((torch.rand(60, 5, generator=generator) < 0.2).double().mean(dim=1))

    assert 0.93 < coverage(0.2, draw) < 0.975


def test_the_interval_of_a_mean_over_classes_covers() -> None:
    accuracy = torch.tensor([0.05, 0.3, 0.6, 0.9, 0.99])
    weights = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])

    def draw(generator: torch.Generator) -> Interval:
        classes = torch.cat(
            [torch.arange(5), torch.multinomial(weights, 295, True, generator=generator)]
        )
        outcomes = (torch.rand(300, generator=generator) < accuracy[classes]).double()
        return class_mean_interval(outcomes, classes)

    assert 0.93 < coverage(float(accuracy.mean()), draw) < 0.975


@pytest.mark.parametrize("statistic", [mean_interval, median_interval])
def test_the_interval_of_grouped_values_covers(statistic: Callable[..., Interval]) -> None:
    def draw(generator: torch.Generator) -> Interval:
        common = torch.randn(50, 1, generator=generator)
        values = 3 + common + torch.randn(50, 4, generator=generator)
        return statistic(values.flatten(), torch.arange(200) // 4)

    assert 0.93 < coverage(3.0, draw) < 0.975


def test_the_interval_of_skewed_means_covers() -> None:
    def draw(generator: torch.Generator) -> Interval:
        return mean_interval(torch.randn(200, generator=generator).mul(1.3).exp(), bounds=(0, 1e9))

    assert 0.92 < coverage(math.exp(1.3**2 / 2), draw) < 0.975


def test_the_interval_of_a_mean_is_students_where_nothing_is_skewed() -> None:
    values = torch.randn(30)
    values = torch.cat([values, -values]) + 2
    expected = stats.t.interval(0.95, 59, values.mean(), stats.sem(values))
    assert mean_interval(values) == pytest.approx(expected)
    skewed = values.exp()
    found, mean = mean_interval(skewed), float(skewed.mean())
    assert found.high - mean > mean - found.low
    turned = mean_interval(-skewed)
    assert turned == pytest.approx((-found.high, -found.low))


def test_the_interval_of_any_spread_is_wilsons_for_a_proportion() -> None:
    found = spread_interval(0.3, 0.3 * 0.7 / 80, 80)
    assert found == pytest.approx(wilson(0.3, 80, critical=student_quantile(79)))
    assert spread_interval(0.3, 0.1, 1) == (0.0, 1.0)
    assert spread_interval(0.3, 0.0, 80).low < 0.3


def test_the_median_of_plain_rows_has_the_order_statistics_of_the_binomial() -> None:
    assert median_interval(torch.arange(1.0, 101.0)[torch.randperm(100)]) == (40.0, 61.0)
    assert median_interval(torch.arange(1.0, 11.0)) == (2.0, 9.0)
    assert median_interval(torch.tensor([1.0] * 80 + [9.0] * 20)) == (1.0, 1.0)


def test_what_rows_leave_open_is_the_bounds() -> None:
    bounds = (1.0, 50.0)
    assert median_interval(torch.tensor([3.0, 4.0]), bounds=bounds) == bounds
    assert mean_interval(torch.tensor([3.0, 4.0]), torch.zeros(2), bounds=bounds) == bounds
    assert mean_interval(torch.tensor([1.0, 2.0]), bounds=bounds).low == 1.0


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        (torch.tensor([]), "needs rows"),
        (torch.tensor([0.0, 2.0]), r"in \[0, 1\]"),
        (torch.tensor([0.0, math.nan]), "finite"),
    ],
)
def test_rows_that_have_no_interval_are_refused(outcomes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interval(outcomes)
