"""95 % intervals beside each number.

Proportions take Wilson's interval, which stays inside [0, 1] and covers near its ends; what makes
rows alike or uneven (captions of one image, outcomes that are shares, small classes) enters as the
effective number of rows. Groups are independent of each other; within one anything may hold.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

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

    Without groups and with outcomes of 0 and 1 it is Wilson's. Otherwise Wilson's at the number of
    rows of a plain proportion with the same variance, and Student's quantile for the groups.
    """
    values = _rows(outcomes)
    if values.min() < 0 or values.max() > 1:
        raise ValueError("outcomes of a proportion are in [0, 1]; mean_interval takes any others")
    mean = min(1.0, float(values.mean()))
    sums = _group_sums(values - mean, groups)
    num_groups, spread = len(sums), mean * (1 - mean)
    if num_groups == 1 and len(values) > 1:
        return Interval(0.0, 1.0)
    # One group of average size that is all alike is mixed in, in place of the correction by
    # G / (G - 1): it keeps equal outcomes from having no width, and is Wilson's for 0 and 1.
    variance = float((num_groups - 1) / num_groups * sums.square().sum()) / len(values) ** 2
    variance += spread / num_groups**2
    n = spread / variance if spread > 0 else num_groups
    plain = num_groups == len(values)
    return wilson(mean, n, critical=_NORMAL if plain else _student(num_groups - 1))


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
    """Student's interval for the mean of values (R,), cut to bounds; groups are drawn whole."""
    values = _rows(values)
    mean = float(values.mean())
    sums = _group_sums(values - mean, groups)
    num_groups = len(sums)
    if num_groups == 1:
        return Interval(*bounds)
    variance = num_groups / (num_groups - 1) * float(sums.square().sum()) / len(values) ** 2
    half = _student(num_groups - 1) * math.sqrt(variance)
    return Interval(max(bounds[0], mean - half), min(bounds[1], mean + half))


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


def _student(freedom: int) -> float:
    """Returns the 97.5 % quantile of Student's t (exact for 1 and 2, else Cornish and Fisher's)."""
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = _NORMAL
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * freedom**4)
    )
