"""A comparison as one self-contained HTML file that asks nothing of any server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from clipkit.errors import UserError
from clipkit.tracking import outcomes
from clipkit.tracking.compare import Comparison, Entry, which_outcomes
from clipkit.tracking.metric_names import (
    evaluation_of,
    higher_is_better,
    is_bound,
    is_evaluation,
    is_share,
    short,
)
from clipkit.tracking.runs import Point, Run
from clipkit.tracking.tables import as_dict, finite, refusals, short_params

_MOST_POINTS = 400
_MOST_CLASSES = 8
_MOST_CONFUSIONS = 10
_MOST_EXAMPLES = 16
_SAMPLES = "train/samples_seen"


def write_report(comparison: Comparison, path: Path) -> None:
    """Write the report of a comparison."""
    text = report(comparison)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror})") from error


def report(comparison: Comparison) -> str:
    """Return the page: a template, its style, its script and the data they draw."""
    data = json.dumps(report_data(comparison), allow_nan=False, separators=(",", ":"))
    parts = {
        "STYLE": _asset("report.css"),
        "SCRIPT": _asset("report.js"),
        # Inside a script element only a "<" could end it.
        "DATA": data.replace("<", "\\u003c"),
    }
    page = _asset("report.html")
    for name, text in parts.items():
        page = page.replace(f"/*{name}*/", text)
    return page


def report_data(comparison: Comparison) -> dict[str, Any]:
    """Return what the page shows, as plain values."""
    data = as_dict(comparison)
    for claims, found in (
        ("checkpoint_claims", comparison.checkpoint_claims),
        ("configuration_claims", comparison.configuration_claims),
    ):
        data[claims]["not_offered"] = refusals(found.refused)
    entries = comparison.entries
    return {
        **data,
        "short_params": short_params(comparison.params),
        "curves": _curves(comparison),
        "classes": [found for entry in entries for found in _classes(entry, comparison)],
        "examples": [found for entry in entries for found in _examples(entry, comparison)],
        "params": {entry.label: {**entry.run.params} for entry in entries},
        "environment": {entry.label: {**entry.run.environment} for entry in entries},
    }


def _asset(name: str) -> str:
    return (resources.files("clipkit.tracking") / "assets" / name).read_text(encoding="utf-8")


# --- Curves -------------------------------------------------------------------------------------


def _curves(comparison: Comparison) -> list[dict[str, Any]]:
    """Return each metric's history: those shown first, then other evaluations, then training."""
    names = dict.fromkeys(
        name for entry in comparison.entries for name in entry.run.latest if not is_bound(name)
    )
    rest = sorted(names, key=lambda name: (not is_evaluation(name), not name.startswith("val/")))
    axes = {entry.label: _Axes(entry.run) for entry in comparison.entries}
    curves = []
    for metric in dict.fromkeys([*comparison.metrics, *rest]):
        having = [entry for entry in comparison.entries if len(entry.run.history(metric)) > 1]
        for which, entries in _by_scale(metric, having).items():
            curves.append(
                {
                    "metric": metric,
                    "group": evaluation_of(metric),
                    "short": f"{short(metric)}{which}",
                    "share": is_share(metric),
                    "higher_is_better": higher_is_better(metric),
                    "series": {e.label: axes[e.label].series(metric) for e in entries},
                }
            )
    return curves


def _by_scale(metric: str, entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """Return the runs that share an axis: the values of two losses are of two scales."""
    found: dict[str, list[Entry]] = {}
    losses = {entry.run.params.get("model.loss") for entry in entries}
    for entry in entries:
        loss = entry.run.params.get("model.loss")
        apart = metric.endswith("/loss") and len(losses) > 1
        found.setdefault(f", {loss}" if apart else "", []).append(entry)
    return found


class _Axes:
    """A run's steps as samples and hours."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._samples = run.history(_SAMPLES)

    def series(self, metric: str) -> dict[str, list[float | None]]:
        points = _thinned(self._run.history(metric))
        bounds = {
            end: {p.step: p.value for p in self._run.history(f"{metric}_{end}")}
            for end in ("low", "high")
        }
        # Lightning numbers what it logs from 0; evaluations say how many steps were made.
        before = 0 if is_evaluation(metric) else 1
        found: dict[str, list[float | None]] = {
            "step": [point.step for point in points],
            "samples": [self._samples_at(point.step + before) for point in points],
            "hours": [_rounded(point.seconds / 3600) for point in points],
            "value": [_rounded(point.value) for point in points],
        }
        if bounds["low"]:
            for end, values in bounds.items():
                found[end] = [_rounded(values.get(point.step)) for point in points]
        return found

    def _samples_at(self, made: int) -> float | None:
        """Return how many pairs had been seen when so many steps were made."""
        if not self._samples:
            return None
        steps = [0, *(sample.step + 1 for sample in self._samples)]
        values = [0.0, *(sample.value for sample in self._samples)]
        return _rounded(float(np.interp(made, steps, values)))


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= _MOST_POINTS:
        return [*points]
    kept = np.linspace(0, len(points) - 1, _MOST_POINTS).round().astype(int)
    return [points[at] for at in kept]


def _rounded(value: float | None) -> float | None:
    value = finite(value)
    return None if value is None else float(f"{value:.6g}")


# --- Classes ------------------------------------------------------------------------------------


def _classes(entry: Entry, comparison: Comparison) -> list[dict[str, Any]]:
    """Return, for each evaluation with labels, how each class did and what was mistaken."""
    found = []
    for evaluation in _evaluations(entry):
        rows = _labelled(entry, evaluation, comparison)
        if rows is None:
            continue
        names, digest, label, predicted, outcome = rows
        baseline = _labelled(comparison.baseline, evaluation, comparison)
        base: dict[int, float] = {}
        if entry is not comparison.baseline and baseline is not None and baseline[1] == digest:
            base = {c: float(baseline[4][baseline[2] == c].mean()) for c in np.unique(baseline[2])}
        classes: list[dict[str, Any]] = []
        for at in np.unique(label):
            here = outcome[label == at]
            low, high = _interval(here)
            classes.append(
                {
                    "name": _name(names, at), "n": len(here), "value": float(here.mean()),
                    "low": low, "high": high, "base": base.get(int(at)),
                }
            )  # fmt: skip
        classes.sort(key=lambda one: one["value"])
        few = len(classes) <= 2 * _MOST_CLASSES
        found.append(
            {
                "run": entry.label,
                "evaluation": evaluation,
                "count": len(classes),
                "worst": classes if few else classes[:_MOST_CLASSES],
                "best": [] if few else classes[: -_MOST_CLASSES - 1 : -1],
                "confusions": _confusions(names, label, predicted),
            }
        )
    return found


def _labelled(entry: Entry, evaluation: str, comparison: Comparison) -> tuple[Any, ...] | None:
    file = entry.run.outcome_file(evaluation, which_outcomes(entry.run, comparison.how))
    if file is None:
        return None
    try:
        read = outcomes.read(file)
    except UserError:
        return None  # said where the comparison is refused
    for rows in read.metrics.values():
        if rows.label is not None and rows.predicted is not None:
            return read.class_names, read.digest, rows.label, rows.predicted, rows.outcome
    return None


def _interval(values: np.ndarray) -> tuple[float, float]:
    import torch

    from clipkit.evaluation.statistics import interval

    low, high = interval(torch.tensor(values))
    return low, high


def _confusions(
    names: Sequence[str] | None, label: np.ndarray, predicted: np.ndarray
) -> list[dict[str, Any]]:
    wrong = label != predicted
    pairs, counts = np.unique(
        np.stack([label[wrong], predicted[wrong]]), axis=1, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")[:_MOST_CONFUSIONS]
    return [
        {
            "truth": _name(names, pairs[0, at]),
            "predicted": _name(names, pairs[1, at]),
            "count": int(counts[at]),
            "share": float(counts[at] / (label == pairs[0, at]).sum()),
        }
        for at in order
    ]


def _name(names: Sequence[str] | None, at: int) -> str:
    known = names is not None and 0 <= at < len(names)
    return str(names[at]) if names is not None and known else f"class {at}"


# --- Examples -----------------------------------------------------------------------------------


def _examples(entry: Entry, comparison: Comparison) -> list[dict[str, Any]]:
    found = []
    for evaluation in _evaluations(entry):
        file = entry.run.examples_file(evaluation, which_outcomes(entry.run, comparison.how))
        if file is None:
            continue
        try:
            items = json.loads(file.read_text(encoding="utf-8"))
            shown = [_example(item) for item in items[:_MOST_EXAMPLES]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: the examples cannot be read ({error})") from error
        found.append({"run": entry.label, "evaluation": evaluation, "items": shown})
    return found


def _example(item: dict[str, Any]) -> dict[str, Any]:
    image = str(item["image"])
    # Anything else would be a request to somewhere.
    if not image.startswith("data:image/"):
        raise ValueError("a picture that is no data: address")
    return {
        "right": bool(item["right"]), "image": image, "query": item.get("query"),
        "truth": item["truth"], "found": item["found"],
    }  # fmt: skip


def _evaluations(entry: Entry) -> list[str]:
    names = (name for name in entry.run.latest if is_evaluation(name))
    return list(dict.fromkeys(evaluation_of(name) for name in names))
