"""A number as it is reported: with its interval, what it is a mean of, and what chance scores."""

from __future__ import annotations

from typing import NamedTuple

from clipkit.evaluation.statistics import Interval


class Metric(NamedTuple):
    """One value of one evaluation.

    Attributes:
        value: the metric.
        interval: its 95 % confidence interval; None where none is defined.
        n: how many independent rows it was measured on: images, or groups of captions.
        chance: what a model scores that gives everything the same embedding; None where chance
            has no meaning.
        best: what a model scores that is never wrong.
    """

    value: float
    interval: Interval | None
    n: int
    chance: float | None
    best: float = 1.0

    @property
    def normalised(self) -> float | None:
        """The share of the way from chance to the best value."""
        if self.chance is None or self.best == self.chance:
            return None
        return (self.value - self.chance) / (self.best - self.chance)
