"""95 % intervals beside each number.

Proportions take Wilson's interval, which stays inside [0, 1] and covers near its ends; what makes
rows alike or uneven (captions of one image, outcomes that are shares, small classes) enters as the
effective number of rows. Groups are independent of each other; within one anything may hold. How
often the intervals hold the truth is measured by `benchmarks/intervals.py`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

SEED = 0
"""Of all that an evaluation draws (resamples, rows held out), unless it is told another."""

_NORMAL = NormalDist().inv_cdf(0.975)


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


def wilson(mean: float, n: float, *, critical: float = _NORMAL) -> Interval:
    """Wilson's score interval for a proportion.

    Args:
        mean: the observed proportion, in [0, 1]; k successes are k / n
        n: the number of rows, which need not be whole
        critical: quantile of the normal distribution, 1.96 by default.
    """
    if not 0.0 <= mean <= 1.0:
        raise ValueError(f"a proportion is in [0, 1], not {mean}")
    if not n > 0:
        raise ValueError(f"n is {n}; an interval needs at least one row")
    shrink = critical**2 / n
    centre = (mean + shrink / 2) / (1 + shrink)
    half = critical * math.sqrt(mean * (1 - mean) / n + shrink / (4 * n)) / (1 + shrink)
    # The interval holds the mean: rounding would leave a perfect score just outside.
    return Interval(max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def interval(outcomes: Tensor, groups: Tensor | None = None) -> Interval:
    """Interval for the mean of outcomes (R,) in [0, 1]; groups (R,) are drawn whole.

    Outcomes of 0 and 1, each a group of its own, have Wilson's interval with Student's quantile:
    with the normal's it falls to 91.7 % at 50 rows. See `spread_interval` for any others.
    """
    values = _rows(outcomes)
    if values.min() < 0 or values.max() > 1:
        raise ValueError("outcomes of a proportion are in [0, 1]; mean_interval takes any others")
    mean = min(1.0, float(values.mean()))
    sums = _group_sums(values - mean, groups)
    return spread_interval(mean, float(sums.square().sum()) / len(values) ** 2, len(sums))


def spread_interval(mean: float, variance: float, num_groups: int) -> Interval:
    """Interval for a value in [0, 1] that was measured on so many groups with this variance.

    Wilson's, at the number of rows of a plain proportion that varies as much.

    Args:
        mean: the value
        variance: of the value, not of the groups; without the correction by G / (G - 1)
        num_groups: G, of which it is a mean, or nearly one.
    """
    if num_groups < 2:
        return Interval(0.0, 1.0)
    spread = mean * (1 - mean)
    # One group of average size that is all alike is mixed in, in place of the correction by
    # G / (G - 1): it keeps equal outcomes from having no width, and is Wilson's for 0 and 1.
    variance = (num_groups - 1) / num_groups * variance + spread / num_groups**2
    n = spread / variance if spread > 0 else num_groups
    return wilson(mean, n, critical=student_quantile(num_groups - 1))


def class_mean_interval(outcomes: Tensor, classes: Tensor) -> Interval:
    """Interval for the mean over classes (R,) of the mean of their outcomes (R,) in [0, 1]."""
    values = _rows(outcomes)
    _, which, counts = torch.unique(classes.cpu(), return_inverse=True, return_counts=True)
    means = torch.bincount(which, values) / counts
    mean = min(1.0, max(0.0, float(means.mean())))
    squares = torch.bincount(which, (values - means[which]).square())
    spread = mean * (1 - mean)
    # Within a class, with one row of the spread over all: a class of one row says nothing itself.
    variance = float(((squares + spread) / counts.square()).sum()) / len(counts) ** 2
    alike = len(counts) ** 2 / float((1.0 / counts).sum())
    return wilson(mean, spread / variance if spread > 0 else alike)


def mean_interval(
    values: Tensor,
    groups: Tensor | None = None,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Interval for the mean of values (R,), cut to bounds; groups are drawn whole.

    Student's, with the skewness of the groups taken out: Hall, "On the removal of skewness by
    transformation", 1992. Ranks, most of them 1 and a few in the hundreds, need that. Equal values
    leave no width: nothing says by how much another row might differ.
    """
    values = _rows(values)
    mean = float(values.mean())
    sums = _group_sums(values - mean, groups)
    num_groups = len(sums)
    if num_groups == 1:
        return Interval(*bounds)
    error = math.sqrt(num_groups / (num_groups - 1) * float(sums.square().sum())) / len(values)
    if error == 0:
        return Interval(mean, mean)
    skewness = float(sums.pow(3).mean() / sums.square().mean() ** 1.5) / math.sqrt(num_groups)
    quantile = student_quantile(num_groups - 1)
    low = mean - error * _skewed(quantile, skewness)
    high = mean - error * _skewed(-quantile, skewness)
    # Extreme skewness may move both ends to one side of the mean.
    return Interval(max(bounds[0], min(mean, low)), min(bounds[1], max(mean, high)))


def median_interval(
    values: Tensor,
    groups: Tensor | None = None,
    *,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Interval:
    """Interval for the median of values (R,): those that stand where the share one half may lie.

    Woodruff, "Confidence intervals for medians and other position measures", 1952. An end that the
    rows leave open is the bound.
    """
    values = _rows(values)
    ascending = values.sort().values
    n = len(values)
    median = ascending[[(n - 1) // 2, n // 2]].mean()
    # Rows equal to the median stand below it in part, such that half of all rows do.
    equal = values == median
    part = (n / 2 - (values < median).sum()) / equal.sum().clamp(min=1)
    below = torch.where(equal, part, (values < median).double())
    low, high = interval(below, groups)
    first, last = math.floor(low * n) - 1, math.ceil(high * n)
    return Interval(
        bounds[0] if first < 0 else float(ascending[first]),
        bounds[1] if last >= n else float(ascending[last]),
    )


def student_tail(t: float, freedom: float) -> float:
    """Chance that Student's t with so many degrees of freedom is at or above t."""
    tail = 0.5 * _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)
    return tail if t >= 0 else 1.0 - tail


@lru_cache(maxsize=4096)
def student_quantile(freedom: float, probability: float = 0.975) -> float:
    """The value that Student's t stays below with this probability, at least a half."""
    if not (freedom > 0 and 0.5 <= probability < 1):
        raise ValueError(f"no quantile at {probability} with {freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > 1 - probability:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        if student_tail(middle, freedom) > 1 - probability:
            low = middle
        else:
            high = middle
    return high


def _rows(values: Tensor) -> Tensor:
    if values.ndim != 1 or not len(values):
        raise ValueError(f"an interval needs rows (R,), not {tuple(values.shape)}")
    values = values.detach().cpu().double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("an interval needs finite values")
    return values


def _group_sums(values: Tensor, groups: Tensor | None) -> Tensor:
    if groups is None:
        return values
    if groups.shape != values.shape:
        raise ValueError(f"groups are {tuple(groups.shape)} for {len(values)} rows")
    _, which = torch.unique(groups.cpu(), return_inverse=True)
    return torch.bincount(which, values)


def _skewed(quantile: float, skewness: float) -> float:
    # The inverse of Hall's t + s t^2 / 3 + s^2 t^3 / 27 + s / 6, which is nearly symmetric; s is
    # the skewness of the mean.
    if abs(skewness) < 1e-6:
        return quantile
    return 3 / skewness * (math.cbrt(1 + skewness * (quantile - skewness / 6)) - 1)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised, by its continued fraction (Lentz's method; Numerical Recipes, section 6.4)."""
    if x <= 0 or x >= 1:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(1 - x, b, a)
    front = a * math.log(x) + b * math.log1p(-x) - math.log(a)
    front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    value = d
    for m in range(1, 10_000):
        for part in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            c = 1 + part / c or tiny
            d = 1 / (1 + part * d or tiny)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return math.exp(front) * value
