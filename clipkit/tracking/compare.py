"""Runs side by side: what differs, what they scored, and which differences are no accident.

Two claims, never mixed. *This checkpoint beats that one* pairs the outcomes of two models on the
same rows: it says nothing of training again. *This configuration beats that one* compares the means
over seeds: training noise is what it measures. Holm's correction is over the comparisons shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from clipkit.errors import UserError, did_you_mean
from clipkit.tracking import outcomes
from clipkit.tracking.metric_names import (
    evaluation_of,
    higher_is_better,
    is_bound,
    is_evaluation,
    main_metrics,
)
from clipkit.tracking.result_runs import ResultRun
from clipkit.tracking.runs import Run, Score, Which

if TYPE_CHECKING:
    from torch import Tensor

    from clipkit.evaluation.comparison import Difference

ALPHA = 0.05
_SEED = re.compile(r"-?seed(_everything)?=\d+")
How = Literal["last", "chosen", "best"]
TAKEN = {
    "last": "the value of a run is its last evaluation",
    "chosen": "the value of a run is that of its chosen checkpoint",
    "best": "BEST OVER EPOCHS: each value was chosen on the split it is measured on, and flatters",
}


class Claim(NamedTuple):
    """One comparison: second against first, with p before and after Holm's correction."""

    metric: str
    first: str
    second: str
    value: float
    low: float
    high: float
    p: float
    adjusted: float
    n: str

    @property
    def verdict(self) -> str:
        """``better``, ``worse`` or ``undecided``."""
        if not self.adjusted < ALPHA or self.value == 0:
            return "undecided"
        up = higher_is_better(self.metric)
        if up is None:
            return "differs"
        return "better" if (self.value > 0) == up else "worse"


class Refusal(NamedTuple):
    """A comparison that is not offered, and why."""

    first: str
    second: str
    metrics: str
    reason: str


@dataclass(frozen=True)
class Claims:
    """The comparisons of one kind."""

    made: list[Claim] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def of(self, metric: str, first: str, second: str) -> Claim | None:
        """Return the comparison of two in a metric, whichever way round it was made."""
        for claim in self.made:
            if claim.metric == metric and {claim.first, claim.second} == {first, second}:
                return claim
        return None


@dataclass(frozen=True)
class Entry:
    """A run in a comparison.

    Attributes:
        label: ``A``, or ``A2`` for the second run of configuration A.
        name: what the run is called, unlike any other.
        scores: its value in each metric.
    """

    label: str
    name: str
    run: Run
    scores: dict[str, Score]


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seeds only."""

    label: str
    entries: list[Entry]

    @property
    def name(self) -> str:
        """The name of its first run, without the seed where that is part of it."""
        name = self.entries[0].name
        return (_SEED.sub("", name) or name) if len(self.entries) > 1 else name

    @property
    def finished(self) -> list[Entry]:
        """The runs that came to their end: the others count as no seed."""
        return [entry for entry in self.entries if entry.run.status == "finished"]

    @property
    def seeds(self) -> list[str]:
        """The different seeds of finished runs, in order."""
        return list(dict.fromkeys(entry.run.seed or "?" for entry in self.finished))

    def values(self, metric: str) -> list[float]:
        """Return one value a seed: of a seed that was run twice, the later; finished runs only."""
        found: dict[str, float] = {}
        for entry in sorted(self.finished, key=lambda entry: entry.run.began):
            score = entry.scores.get(metric)
            if score is not None and math.isfinite(score.value):
                found[entry.run.seed or entry.label] = score.value
        return list(found.values())


@dataclass(frozen=True)
class Comparison:
    """What ``clipkit compare`` found."""

    title: str
    how: How
    configurations: list[Configuration]
    metrics: list[str]
    baseline: Entry
    baseline_named: bool
    notes: list[str]

    @cached_property
    def entries(self) -> list[Entry]:
        """All runs, configuration by configuration."""
        return [entry for one in self.configurations for entry in one.entries]

    @cached_property
    def params(self) -> list[str]:
        """The parameters that differ between configurations.

        A result file may know no configuration, and a run no suite: what one does not say does not
        differ.
        """
        runs = [one.entries[0].run for one in self.configurations]
        found: dict[str, None] = {}
        for said in (_configuration, _about):
            saying = [params for run in runs if (params := said(run))]
            keys = dict.fromkeys(key for one in saying for key in one)
            found.update({key: None for key in keys if len({p.get(key) for p in saying}) > 1})
        return list(found)

    @property
    def taken(self) -> str:
        """How the value of a run was taken, in a sentence."""
        if all(isinstance(entry.run, ResultRun) for entry in self.entries):
            return "the value of a run is what its result file says"
        if self.how != "chosen":
            return TAKEN[self.how]
        splits = dict.fromkeys(e.run.chosen_split for e in self.entries if e.run.chosen_split)
        return f"{TAKEN['chosen']} (chosen on {'; on '.join(splits)})"

    @cached_property
    def baseline_configuration(self) -> Configuration:
        """The configuration that the others are compared with."""
        return next(one for one in self.configurations if self.baseline in one.entries)

    @cached_property
    def checkpoint_claims(self) -> Claims:
        """Every other run against the baseline, on the same rows."""
        others = [entry for entry in self.entries if entry is not self.baseline]
        return paired_claims([(self.baseline, one) for one in others], self.metrics, self.how)

    @cached_property
    def configuration_claims(self) -> Claims:
        """Every other configuration against the baseline's, over the seeds."""
        first = self.baseline_configuration
        others = [one for one in self.configurations if one is not first]
        return seed_claims([(first, one) for one in others], self.metrics, self.how)

    def chose_itself(self, metric: str) -> bool:
        """Return whether a metric is measured on what chose the checkpoint."""
        monitors = {e.run.chooser.monitor for e in self.entries if e.run.chooser}
        return self.how == "chosen" and _data_of(metric) in map(_data_of, monitors)


def _data_of(metric: str) -> str:
    """Return the set of ``zeroshot/digits/top1``, whichever the task; ``val`` of ``val/loss``."""
    evaluation = evaluation_of(metric)
    return evaluation.partition("/")[2] or evaluation


def compare(
    runs: Sequence[Run],
    *,
    title: str,
    baseline: Sequence[Run] = (),
    metrics: Sequence[str] = (),
    how: How = "last",
) -> Comparison:
    """Compare runs.

    Args:
        runs: what is shown, in order.
        title: what the user asked for.
        baseline: the runs that the baseline's name stands for; left out, the first one shown.
        metrics: names, ends of names or patterns; left out, the main ones of each task.
        how: how the value of a run is taken.
    """
    present = {run.identity for run in runs}
    shown = [*runs, *(run for run in baseline if run.identity not in present)]
    notes = [f"{run.name}: {failure}" for run in shown for failure in getattr(run, "failed", ())]
    empty = [run for run in shown if not run.latest]
    shown = [run for run in shown if run.latest]
    if not shown:
        raise UserError(f"compare {title}: none of the {len(empty)} runs has recorded a metric")
    if empty:
        names = ", ".join(run.name for run in empty)
        notes.append(f"left out, since nothing was recorded: {names}")
    chosen_metrics = choose_metrics(shown, metrics)
    configurations = _group(shown, chosen_metrics, how)
    first = _baseline(configurations, baseline)
    notes += _notes(configurations, chosen_metrics, how)
    return Comparison(
        title=title,
        how=how,
        configurations=configurations,
        metrics=chosen_metrics,
        baseline=first,
        baseline_named=bool(baseline),
        notes=notes,
    )


def about(run: Run) -> dict[str, str]:
    """Return what distinguishes a run: its configuration, and what its result file says."""
    return {**_configuration(run), **_about(run)}


def _configuration(run: Run) -> dict[str, str]:
    return {**run.configuration}


def _about(run: Run) -> dict[str, str]:
    return {**run.about} if isinstance(run, ResultRun) else {}


def choose_metrics(runs: Sequence[Run], asked: Sequence[str]) -> list[str]:
    """Return the metrics to show, in order; an unknown one is refused."""
    names = list(dict.fromkeys(name for run in runs for name in run.latest if not is_bound(name)))
    if not asked:
        mains = main_metrics(names)
        losses = {run.params.get("model.loss") for run in runs} - {None}
        # The values of different losses are of different scales.
        comparable = [name for name in mains if not name.endswith("/loss")]
        return comparable if comparable and len(losses) > 1 else mains
    found: dict[str, None] = {}
    for pattern in asked:
        hits = [
            name
            for name in names
            if name == pattern or name.endswith(f"/{pattern}") or fnmatchcase(name, pattern)
        ]
        if not hits:
            ends = [name.rpartition("/")[2] for name in names]
            hint = did_you_mean(pattern, [*names, *ends], cutoff=0.5)
            some = [name for name in names if not name.startswith("train/")] or names
            raise UserError(
                f"--metric {pattern}: no run has it; {hint}there are {', '.join(some[:12])}"
                + (", ..." if len(some) > 12 else "")
            )
        found.update(dict.fromkeys(hits))
    return list(found)


# --- The two claims ------------------------------------------------------------------------------


def paired_claims(pairs: Iterable[tuple[Entry, Entry]], metrics: Sequence[str], how: How) -> Claims:
    """Compare checkpoints on the rows that both were measured on."""
    from clipkit.evaluation.comparison import paired_difference

    found: list[Claim] = []
    refused: list[Refusal] = []
    for first, second in pairs:
        reasons: dict[str, list[str]] = {}
        for metric in metrics:
            if metric not in first.scores or metric not in second.scores:
                continue
            try:
                a, b, groups = _rows(first, second, metric, how)
            except UserError as error:
                reasons.setdefault(error.sentence, []).append(metric)
                continue
            difference = paired_difference(a, b, groups)
            number = len(set(groups.tolist()))
            n = f"{number}" if number == len(groups) else f"{len(groups)} in {number} groups"
            found.append(_claim(metric, first.label, second.label, difference, n))
        refused += _refusals(first, second, reasons)
    return Claims(_adjusted(found), refused)


def seed_claims(
    pairs: Iterable[tuple[Configuration, Configuration]], metrics: Sequence[str], how: How
) -> Claims:
    """Compare configurations by the means of their seeds."""
    from clipkit.evaluation.comparison import configuration_difference

    found: list[Claim] = []
    refused: list[Refusal] = []
    for first, second in pairs:
        reasons: dict[str, list[str]] = {}
        for metric in metrics:
            if higher_is_better(metric) is None:
                continue
            a, b = first.values(metric), second.values(metric)
            if not a or not b:
                continue
            reason = _no_claim(first, second, metric, how)
            difference = None if reason else configuration_difference(a, b)
            if difference is None or not math.isfinite(difference.p):
                reasons.setdefault(reason or "the seeds do not vary", []).append(metric)
                continue
            found.append(
                _claim(metric, first.label, second.label, difference, f"{len(a)} and {len(b)}")
            )
        refused += _refusals(first, second, reasons)
    return Claims(_adjusted(found), refused)


def _no_claim(first: Configuration, second: Configuration, metric: str, how: How) -> str | None:
    """Return why two configurations cannot be compared, None where they can."""
    if how == "best":
        return "a best over epochs was chosen on the split it is measured on"
    if min(len(first.values(metric)), len(second.values(metric))) < 2:
        return "fewer than two finished seeds on a side"
    runs = [entry.run for one in (first, second) for entry in one.finished]
    evaluation = evaluation_of(metric)
    digests = {run.digest(evaluation) for run in runs} - {None}
    if len(digests) > 1:
        return f"measured on different data ({len(digests)} digests)"
    settings = {run.settings(evaluation) for run in runs} - {None}
    return "evaluated with other class names, prompts or arguments" if len(settings) > 1 else None


def _rows(first: Entry, second: Entry, metric: str, how: How) -> tuple[Tensor, Tensor, Tensor]:
    if how == "best":
        raise UserError("the outcomes of the best epoch are not kept")
    if metric.count("/") < 2:
        raise UserError("kept as one number, not sample by sample")
    evaluation, measure = evaluation_of(metric), metric.rpartition("/")[2]
    read = []
    for entry in (first, second):
        file = entry.run.outcome_file(evaluation, which_outcomes(entry.run, how))
        if file is None:
            raise UserError(f"{entry.label} has no outcomes sample by sample")
        found = outcomes.read(file)
        if how == "chosen" and found.step is not None and found.step != entry.run.chosen_step:
            raise UserError(
                f"{entry.label} kept the outcomes of step {found.step} and chose that of step "
                f"{entry.run.chosen_step}"
            )
        read.append(found)
    return outcomes.pair(read[0], read[1], measure)


def which_outcomes(run: Run, how: How) -> Which:
    """Return which outcomes belong to the value that is shown of a run."""
    return "chosen" if how == "chosen" and not isinstance(run, ResultRun) else "last"


def _refusals(
    first: Entry | Configuration, second: Entry | Configuration, reasons: dict[str, list[str]]
) -> list[Refusal]:
    return [
        Refusal(first.label, second.label, ", ".join(metrics), reason)
        for reason, metrics in reasons.items()
    ]


def _claim(metric: str, first: str, second: str, found: Difference, n: str) -> Claim:
    low, high = found.interval
    return Claim(metric, first, second, found.value, low, high, found.p, found.p, n)


def _adjusted(claims: list[Claim]) -> list[Claim]:
    from clipkit.evaluation.comparison import holm

    adjusted = holm([claim.p for claim in claims]) if claims else []
    return [claim._replace(adjusted=p) for claim, p in zip(claims, adjusted, strict=True)]


# --- Runs to configurations ----------------------------------------------------------------------


def _group(runs: Sequence[Run], metrics: Sequence[str], how: How) -> list[Configuration]:
    groups: dict[object, list[Run]] = {}
    for run in runs:
        # What has no known configuration is one of its own.
        key = tuple(sorted(run.configuration.items())) or id(run)
        groups.setdefault(key, []).append(run)
    names = _names(runs)
    configurations = []
    for number, members in enumerate(groups.values()):
        letter = _letter(number)
        entries = [
            Entry(
                letter if len(members) == 1 else f"{letter}{place}",
                names[id(run)],
                run,
                _scores(run, metrics, how),
            )
            for place, run in enumerate(members, start=1)
        ]
        configurations.append(Configuration(letter, entries))
    return configurations


def _scores(run: Run, metrics: Sequence[str], how: How) -> dict[str, Score]:
    take: Callable[[str], Score | None] = {
        "last": run.last, "chosen": run.chosen, "best": run.best
    }[how]  # fmt: skip
    scores = {metric: take(metric) for metric in metrics}
    return {metric: score for metric, score in scores.items() if score is not None}


def _names(runs: Sequence[Run]) -> dict[int, str]:
    """Return a name for each run: its own, with its experiment or source where that is taken."""
    names = {id(run): run.name for run in runs}
    for longer in (lambda run: f"{run.experiment}/{run.name}", lambda run: run.where):
        counts = [*names.values()]
        for run in runs:
            if counts.count(names[id(run)]) > 1:
                names[id(run)] = longer(run)
    return names


def _letter(number: int) -> str:
    """A to Z, then AA, AB and so on."""
    before, place = divmod(number, 26)
    return (_letter(before - 1) if before else "") + chr(ord("A") + place)


def _baseline(configurations: list[Configuration], baseline: Sequence[Run]) -> Entry:
    if not baseline:
        entries = [entry for one in configurations for entry in one.entries]
        return next((entry for entry in entries if entry.run.status == "finished"), entries[0])
    wanted = {run.identity for run in baseline}
    holding = [
        (one, entry)
        for one in configurations
        for entry in one.entries
        if entry.run.identity in wanted
    ]
    if len({one.label for one, _ in holding}) > 1:
        names = ", ".join(entry.name for _, entry in holding[:6])
        raise UserError(
            f"--baseline: stands for {len(holding)} runs of several configurations; name one of "
            f"{names}"
        )
    if not holding:
        raise UserError(f"--baseline {baseline[0].name}: the run has recorded no metric")
    return holding[0][1]


# --- What a reader should know -------------------------------------------------------------------


def _notes(configurations: list[Configuration], metrics: Sequence[str], how: How) -> list[str]:
    entries = [entry for one in configurations for entry in one.entries]
    notes = []
    for entry in entries:
        if entry.run.status != "finished":
            notes.append(f"{entry.label} has the status {entry.run.status} and counts as no seed")
    for one in configurations:
        seeds = [entry.run.seed for entry in one.entries]
        twice = sorted({str(seed) for seed in seeds if seed is not None and seeds.count(seed) > 1})
        if twice:
            notes.append(
                f"{one.label} was run more than once with seed {', '.join(twice)}: of the "
                "configuration only the later one counts"
            )
    if how == "chosen":
        without = [e.label for e in entries if not e.scores and not isinstance(e.run, ResultRun)]
        if without:
            notes.append(f"{', '.join(without)} chose no checkpoint by a metric: no value is shown")
    for evaluation in dict.fromkeys(evaluation_of(m) for m in metrics if is_evaluation(m)):
        having = [e for e in entries if any(evaluation_of(m) == evaluation for m in e.scores)]
        measured = _sharing({e.label: e.run.digest(evaluation) for e in having})
        if len(measured) > 1:
            notes.append(
                f"{evaluation} was measured on different data, which do not compare: "
                f"{_listed(measured)}"
            )
        settings = _sharing({e.label: e.run.settings(evaluation) for e in having})
        if len(settings) > 1:
            notes.append(
                f"{evaluation} was evaluated with other class names, prompts or arguments, so that "
                f"a difference may be theirs: {_listed(settings)}"
            )
    results = [entry for entry in entries if isinstance(entry.run, ResultRun)]
    for labels in _sharing({e.label: e.run.environment.get("weights") for e in results}).values():
        if len(labels) > 1:
            notes.append(f"{', '.join(labels)} have the same weights")
    if len(entries) > 1 and not any(sum(m in e.scores for e in entries) > 1 for m in metrics):
        notes.append("no two of them were measured by the same metric: there is nothing to compare")
    return notes


def _sharing(digests: dict[str, str | None]) -> dict[str, list[str]]:
    """Return the labels that share a digest; those whose digest is unknown not."""
    found: dict[str, list[str]] = {}
    for label, digest in digests.items():
        if digest is not None:
            found.setdefault(digest, []).append(label)
    return found


def _listed(labels: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)} on {digest[:8]}" for digest, names in labels.items())
