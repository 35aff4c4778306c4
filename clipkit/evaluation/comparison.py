"""Claims about two models, or two configurations, and what they may rest on.

*This checkpoint beats that one* is a claim about two models on the samples of one data set: the
samples are drawn again. *This configuration beats that one* is a claim about trainings, of which
the seeds are the sample: more images do not help it. Neither says anything about the other.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.evaluation.statistics import SEED, Interval, student_quantile, student_tail

_NORMAL = NormalDist().inv_cdf(0.975)

# Groups drawn at a time, which stay in the cache of a CPU.
_BLOCK_WEIGHTS = 2**18


class Difference(NamedTuple):
    """Second minus first.

    Attributes:
        value: the difference of the means.
        interval: its 95 % confidence interval, which leaves out 0 where p is under 0.05.
        p: two-sided, never 0.
    """

    value: float
    interval: Interval
    p: float


def paired_difference(
    first: Tensor,
    second: Tensor,
    groups: Tensor | None = None,
    *,
    samples: int = 10_000,
    seed: int = SEED,
) -> Difference:
    """The difference of two models' means on the same rows, by the bootstrap of their groups.

    What both models find hard cancels out, which is why pairs tell more than two intervals.

    Args:
        first: (R,) outcomes of one model
        second: (R,) of the other, on the same rows in the same order
        groups: (R,) the rows drawn together, such as the captions of an image; each row alone
            by default
        samples: how often the groups are drawn again
        seed: of the draws; the same seed gives the same digits.
    """
    sums, sizes, counts = _groups_alike(first, second, groups)
    num_groups, value = int(counts.sum()), float(counts @ sums / (counts @ sizes))
    drawn = _resampled(sums, sizes, counts, samples, np.random.default_rng(seed))
    # Resamples of few groups vary too little, by as much as Student's interval is wider than the
    # normal's: Hesterberg, "What teachers should know about the bootstrap", 2014, section 5.3.
    narrow = math.sqrt((num_groups - 1) / num_groups) / student_quantile(num_groups - 1) * _NORMAL
    drawn = value + (drawn - value) / narrow
    low, high = (float(end) for end in np.quantile(drawn, [0.025, 0.975]))
    p = 2 * (min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1) / (samples + 1)
    # Where few groups differ, all to one side, resamples cannot know of the other. Signs can: so
    # many equal ones come up by chance at least as often as this.
    least = 2 * 0.5 ** int(counts[sums != 0].sum())
    if least >= 0.05:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(value, Interval(low, high), min(1.0, max(float(p), least)))


def configuration_difference(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """The difference of two configurations' means over their seeds: Welch's t.

    Returns None with fewer than two seeds a side, and where no seed makes any difference on either
    side: nothing then says how far another seed would be.
    """
    if len(first) < 2 or len(second) < 2:
        return None
    spreads = [variance(values) / len(values) for values in (first, second)]
    value, spread = fmean(second) - fmean(first), sum(spreads)
    if not spread > 0:
        return None
    # Welch and Satterthwaite's degrees of freedom.
    shares = [(part / spread) ** 2 for part in spreads]
    freedom = 1 / (shares[0] / (len(first) - 1) + shares[1] / (len(second) - 1))
    half = student_quantile(freedom) * math.sqrt(spread)
    p = 2 * student_tail(abs(value) / math.sqrt(spread), freedom)
    return Difference(value, Interval(value - half, value + half), max(p, sys.float_info.min))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusts p values, in their order, for there being several: Holm's step-down method.

    The chance that any true null hypothesis is rejected stays at the level.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for place, which in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, (len(p) - place) * p[which]))
        adjusted[which] = largest
    return adjusted


def _groups_alike(
    first: Tensor, second: Tensor, groups: Tensor | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the different groups (U, 3): summed difference, number of rows, how many are alike.

    Most pairs differ in one of few ways (both right, both wrong, one of the two), and groups that
    are alike may be drawn as one: 50,000 images cost no more than 50.
    """
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(
            f"outcomes are {tuple(first.shape)} and {tuple(second.shape)}; pairs of rows are needed"
        )
    differences = second.detach().cpu().double() - first.detach().cpu().double()
    if not bool(torch.isfinite(differences).all()):
        raise ValueError("a comparison needs finite outcomes")
    if groups is None:
        sums, sizes = differences, torch.ones_like(differences)
    elif groups.shape != first.shape:
        raise ValueError(f"groups are {tuple(groups.shape)} for {len(first)} rows")
    else:
        _, which = torch.unique(groups.cpu(), return_inverse=True)
        sums, sizes = torch.bincount(which, differences), torch.bincount(which).double()
    if len(sums) < 2:
        raise ValueError(f"{len(sums)} groups of rows; a comparison needs at least two")
    # Differences that rounding alone tells apart are alike.
    alike, counts = torch.unique(
        torch.stack([sums.mul(2**40).round().div(2**40), sizes]), dim=1, return_counts=True
    )
    return alike[0].numpy(), alike[1].numpy(), counts.numpy()


def _resampled(
    sums: np.ndarray,
    sizes: np.ndarray,
    counts: np.ndarray,
    samples: int,
    random: np.random.Generator,
) -> np.ndarray:
    num_groups = int(counts.sum())
    # A weight costs as much as fifty groups drawn one by one.
    alike = len(counts) * 50 < num_groups
    if not alike:
        sums, sizes = np.repeat(sums, counts), np.repeat(sizes, counts)
    equal = bool((sizes == sizes[0]).all())
    drawn = np.empty(samples)
    block = max(1, _BLOCK_WEIGHTS // len(sums))
    for start in range(0, samples, block):
        size = min(block, samples - start)
        if alike:
            weights = random.multinomial(num_groups, counts / num_groups, size=size)
            total, rows = weights @ sums, weights @ sizes
        else:
            which = random.integers(num_groups, size=(size, num_groups), dtype=np.int32)
            total = sums[which].sum(axis=1)
            rows = num_groups * sizes[0] if equal else sizes[which].sum(axis=1)
        drawn[start : start + size] = total / rows
    return drawn
