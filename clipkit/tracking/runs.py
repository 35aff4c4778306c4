"""What a comparison knows of a run, wherever it was recorded."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clipkit.errors import UserError
from clipkit.tracking import outcomes
from clipkit.tracking.config import flatten
from clipkit.tracking.metric_names import evaluation_of, higher_is_better, is_evaluation
from clipkit.tracking.outcomes import Outcomes, examples_beside

Which = Literal["last", "chosen"]
SEEDS = ("seed_everything", "seed")
# What names a run or says where it is recorded, and so is no part of its configuration.
NAMING = ("experiment", "run_name", "group", "trainer.logger", "trainer.default_root_dir")
# Callbacks that look at a model in training and leave it as it is.
MEASURING = (
    *("ZeroShotClassification", "ZeroShotRetrieval", "LinearProbe", "NearestNeighbours"),
    *("EvaluationPictures", "Throughput"),
)
_CALLBACK = re.compile(r"(trainer\.callbacks\.)(\d+)")
_LONGEST = 250  # where MLflow's logger cuts a parameter


class Point(NamedTuple):
    """A metric once logged."""

    step: int
    seconds: float  # since the run began
    value: float


class Score(NamedTuple):
    """The value of a run in one metric."""

    value: float
    low: float | None = None
    high: float | None = None
    step: int | None = None
    n: int | None = None
    chance: float | None = None


class Chooser(NamedTuple):
    """The metric by which a run chose its checkpoint, and which way is better."""

    monitor: str
    mode: str


class Run(ABC):
    """One run: its parameters, what it logged last and before, its outcomes sample by sample.

    Attributes:
        identity: what makes two readings the same run.
        name: what the user calls it.
        where: experiment, folder or file that it was read from.
        experiment: its experiment, None where there is none.
        began: when, in seconds since 1970.
        params: the flat configuration as text; empty where it is unknown.
        environment: versions, device, commit.
        status: ``finished``, or what else is known.
        latest: every metric as it was last logged.
    """

    identity: str
    name: str
    where: str
    experiment: str | None = None
    began: float = 0.0
    status: str = "finished"
    params: Mapping[str, str]
    environment: Mapping[str, str]
    latest: Mapping[str, float]

    @abstractmethod
    def history(self, metric: str) -> list[Point]:
        """Return what was logged of a metric, in order."""

    @abstractmethod
    def outcome_file(self, evaluation: str, which: Which) -> Path | None:
        """Return the parquet file of an evaluation such as ``zeroshot/digits``."""

    def examples_file(self, evaluation: str, which: Which) -> Path | None:
        """Return the JSON file of examples of an evaluation."""
        file = self.outcome_file(evaluation, which)
        beside = None if file is None else examples_beside(file)
        return beside if beside is not None and beside.is_file() else None

    def last_step(self) -> int | None:
        """Return the step at which the last evaluation was logged."""
        names = [name for name in self.latest if is_evaluation(name)] or [*self.latest]
        points = self.history(names[0]) if names else []
        return points[-1].step if points else None

    @property
    def chosen_step(self) -> int | None:
        """How many steps had been made when the chosen checkpoint was; None where nothing chose."""
        return None

    def measured(self, evaluation: str, which: Which = "last") -> Outcomes | None:
        """Return the outcomes of an evaluation, None where there are none to be read."""
        file = self.outcome_file(evaluation, which)
        try:
            return None if file is None else outcomes.read(file)
        except UserError:
            return None  # said where the comparison is refused

    def digest(self, evaluation: str) -> str | None:
        """Return the digest of the data of an evaluation, None where it is unknown."""
        found = self.measured(evaluation)
        return None if found is None else found.digest

    def settings(self, evaluation: str) -> str | None:
        """Return the digest of what else decided its score, such as prompts; None likewise."""
        found = self.measured(evaluation)
        return None if found is None else found.settings

    # --- The value of a run --------------------------------------------------------------------

    def last(self, metric: str) -> Score | None:
        """Return the metric as the last evaluation found it."""
        if metric not in self.latest:
            return None
        low, high = (self.latest.get(f"{metric}_{end}") for end in ("low", "high"))
        return Score(self.latest[metric], low, high)

    def chosen(self, metric: str) -> Score | None:
        """Return the metric at the step whose checkpoint was chosen."""
        step = self.chosen_step
        return None if step is None else self._at(metric, step)

    def best(self, metric: str) -> Score | None:
        """Return the best value over all evaluations: chosen on what it is measured on."""
        points = [point for point in self.history(metric) if math.isfinite(point.value)]
        if not points:
            return None
        better = max if higher_is_better(metric) is not False else min
        step = better(points, key=lambda point: point.value).step
        return self._at(metric, step if is_evaluation(metric) else step + 1)

    def _step_of_best(self) -> int | None:
        """Return the steps made when the monitored metric was best, of those that were logged.

        Of a run that has not come to its end, and so has not said what it chose.
        """
        if self.chooser is None:
            return None
        points = [p for p in self.history(self.chooser.monitor) if math.isfinite(p.value)]
        if not points:
            return None
        better = max if self.chooser.mode == "max" else min
        step = better(points, key=lambda point: point.value).step
        return step if is_evaluation(self.chooser.monitor) else step + 1

    @cached_property
    def chooser(self) -> Chooser | None:
        """What the run's checkpoint callback chose by."""
        for key, value in self.params.items():
            if key.endswith(".monitor") and value not in ("None", ""):
                callback = key.removesuffix(".monitor")
                if self.params.get(callback) == "ModelCheckpoint":
                    return Chooser(value, self.params.get(f"{callback}.mode", "min"))
        return None

    @property
    def chosen_split(self) -> str | None:
        """The split on which the checkpoint was chosen, in words."""
        if self.chooser is None:
            return None
        monitor = self.chooser.monitor
        if monitor.startswith("val/"):
            return f"the validation split, by {monitor}"
        name = evaluation_of(monitor).partition("/")[2]
        for key, value in self.params.items():
            if key.endswith(f".datasets.{name}.split"):
                return f"{value} of {name}, by {monitor}"
        return f"what {monitor} is measured on"

    def _at(self, metric: str, step: int) -> Score | None:
        # Lightning numbers what it logs from 0: after n steps, val/loss stands at n - 1.
        logged = step if is_evaluation(metric) else step - 1

        def value(name: str) -> float | None:
            found = [point.value for point in self.history(name) if point.step == logged]
            return found[-1] if found else None

        found = value(metric)
        if found is None:
            return None
        return Score(found, value(f"{metric}_low"), value(f"{metric}_high"), step)

    # --- The configuration ---------------------------------------------------------------------

    @property
    def seed(self) -> str | None:
        """What the run's random numbers were drawn from."""
        return self.params.get("seed_everything")

    @cached_property
    def configuration(self) -> dict[str, str]:
        """The parameters without the seeds, what names the run and what only measures it."""
        measuring = [
            key
            for key, value in self.params.items()
            if key.startswith("trainer.callbacks.") and value in MEASURING
        ]
        kept = {
            key: value
            for key, value in self.params.items()
            if not _names_or_seeds(key) and not begins_with(key, measuring)
        }
        return _renumbered(kept)


def as_params(configuration: dict[str, Any]) -> dict[str, str]:
    """Return a configuration as MLflow holds it: flat names and text."""
    return {key: str(value)[:_LONGEST] for key, value in flatten(configuration).items()}


def _renumbered(params: dict[str, str]) -> dict[str, str]:
    """Return the parameters with callbacks numbered anew: some between them were left out."""
    numbers: dict[str, int] = {}

    def renumber(key: str) -> str:
        match = _CALLBACK.match(key)
        if match is None:
            return key
        return f"{match[1]}{numbers.setdefault(match[2], len(numbers))}{key[match.end() :]}"

    return {renumber(key): value for key, value in params.items()}


def _names_or_seeds(key: str) -> bool:
    return begins_with(key, NAMING) or key.rpartition(".")[2] in SEEDS


def begins_with(key: str, names: Iterable[str]) -> bool:
    """Whether a parameter is one of these, or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
