"""A comparison as text: the terminal's tables, csv and strict JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any, NamedTuple

from clipkit.tracking.compare import (
    Claim,
    Claims,
    Comparison,
    Configuration,
    Entry,
    Refusal,
    about,
)
from clipkit.tracking.metric_names import arrow, evaluation_of, higher_is_better, is_share, number
from clipkit.tracking.metric_names import short as measure_name
from clipkit.tracking.runs import Run, Score

WIDTH = 100
KIND = "clipkit-comparison"
SCHEMA = 1
CHECKPOINT = "This checkpoint beats that one"
CONFIGURATION = "This configuration beats that one"
HOW = {
    CHECKPOINT: "these weights on the same rows: a paired bootstrap over whole groups",
    CONFIGURATION: "training again, with other seeds: Welch's t on the means of the seeds",
}
_LONGEST_VALUE = 26
_LONGEST_NAME = 44


class Column(NamedTuple):
    """A column of a terminal table: its heads, line by line, and its cells."""

    head: tuple[str, ...]
    cells: list[str]
    right: bool = False

    @property
    def width(self) -> int:
        """Characters of its widest line."""
        return max(map(len, (*self.head, *self.cells)))


# --- The terminal --------------------------------------------------------------------------------


def terminal(comparison: Comparison, *, width: int = WIDTH) -> str:
    """Return a comparison as tables that are no wider than the terminal."""
    count = len(comparison.entries)
    several = len(comparison.configurations)
    of = f" of {several} configurations" if 1 < several < count else ""
    same = " of one configuration" if several == 1 < count else ""
    head = f"{comparison.title}: {count} run{'s' if count != 1 else ''}{of}{same}"
    sections = [f"{head}\n{wrapped([comparison.taken + '; [95 % interval]'], width)}"]
    sections.append(
        _section("What differs" if several > 1 else "Runs", _params_table(comparison, width))
    )
    sections.append(_section("What they scored", _score_table(comparison, width)))
    if several > 1 or count > 1:
        sections.append(
            _claims_section(CHECKPOINT, comparison, comparison.checkpoint_claims, width)
        )
    if several > 1:
        sections.append(
            _claims_section(CONFIGURATION, comparison, comparison.configuration_claims, width)
        )
    if comparison.notes:
        sections.append(_section("Mind", wrapped(comparison.notes, width)))
    return "\n\n".join(sections)


def layout(columns: Sequence[Column], width: int) -> str:
    """Return columns side by side, in blocks below each other where the width does not hold them.

    The first column names the rows and heads every block.
    """
    first, rest = columns[0], list(columns[1:])
    blocks: list[list[Column]] = []
    while rest or not blocks:
        block, used = [first], first.width
        while rest and (len(block) == 1 or used + 2 + rest[0].width <= width):
            used += 2 + rest[0].width
            block.append(rest.pop(0))
        blocks.append(block)
    return "\n\n".join(_block(block) for block in blocks)


def wrapped(lines: Iterable[str], width: int, indent: str = "  ") -> str:
    """Return lines, each broken at blanks and hung below its first word."""
    import textwrap

    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)
        for line in lines
    )


def short_params(keys: Sequence[str]) -> dict[str, str]:
    """Return for each dotted parameter its shortest end that no other one shares."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        taken = [other for other in keys if other != key]
        free = (end for end in ends if not any(_ends(other, end) for other in taken))
        short[key] = next(free, key)
    return short


def clipped(text: str, longest: int) -> str:
    """Return a text with its middle left out where it is too long."""
    if len(text) <= longest:
        return text
    head = (longest - 1) // 3
    return f"{text[:head]}…{text[head + 1 - longest :]}"


def with_interval(metric: str, score: Score) -> str:
    """Return ``58.1 [55.2, 61.0]``."""
    value = number(metric, score.value)
    if score.low is None or score.high is None:
        return value
    return f"{value} [{number(metric, score.low)}, {number(metric, score.high)}]"


def over_seeds(configuration: Configuration, metric: str) -> str:
    """Return ``58.1 ± 0.4``: mean and standard deviation over the seeds."""
    values = configuration.values(metric)
    if len(values) < 2:
        return ""
    return f"{number(metric, fmean(values))} ± {number(metric, stdev(values))}"


def metric_head(metric: str) -> tuple[str, str]:
    """Return the two lines above a metric's column: the evaluation, then measure and unit."""
    unit = " %" if is_share(metric) else ""
    return evaluation_of(metric), f"{measure_name(metric)}{unit} {arrow(metric)}".rstrip()


def probability(p: float) -> str:
    """Return a p value with the digits that mean something."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def signed_interval(claim: Claim) -> str:
    """Return ``+2.1 [+0.4, +3.8]``."""
    value, low, high = (
        number(claim.metric, x, signed=True) for x in (claim.value, claim.low, claim.high)
    )
    return f"{value} [{low}, {high}]"


def _params_table(comparison: Comparison, width: int) -> str:
    params = short_params(comparison.params)
    ones = comparison.configurations
    names = [clipped(one.name, _LONGEST_NAME) for one in ones]
    columns = [
        Column(("",), [one.label for one in ones]),
        Column(("run",), names),
    ]
    if any(one.entries[0].run.seed for one in ones):
        columns.append(Column(("seed",), [clipped(" ".join(_seeds(one)), 20) for one in ones]))
    for key, name in params.items():
        cells = [_param(one.entries[0].run, key) for one in ones]
        columns.append(Column((clipped(name, _LONGEST_VALUE),), cells))
    table = layout(columns, width)
    if not params and len(comparison.entries) > 1:
        what = "nothing but the seed" if len(ones) == 1 else "no parameter that is known"
        table += f"\n{what} differs"
    if any(len(one.entries) > 1 for one in ones):
        # The names of single runs stand above; those of seeds only here.
        lines = [
            f"{one.label}: " + ", ".join(f"{e.label} {e.name}" for e in one.entries)
            for one in ones if len(one.entries) > 1
        ]  # fmt: skip
        table += "\n\n" + wrapped(lines, width, indent="   ")
    return table


def _score_table(comparison: Comparison, width: int) -> str:
    rows: list[tuple[str, Entry | Configuration]] = []
    for one in comparison.configurations:
        rows += [(entry.label, entry) for entry in one.entries]
        if len(one.entries) > 1:
            rows.append((f"{one.label} mean ± sd", one))
    if len(comparison.entries) > 1:
        rows = [(label + " *" if row is comparison.baseline else label, row) for label, row in rows]
    cells = {metric: [_cell(row, metric) for _, row in rows] for metric in comparison.metrics}
    labels = [label for label, _ in rows]
    if len(comparison.metrics) > 4 and len(rows) <= 4:
        names = ["  ".join(metric_head(metric)) for metric in comparison.metrics]
        columns = [Column(("",), names)]
        columns += [
            Column((label,), [cells[metric][at] for metric in comparison.metrics])
            for at, label in enumerate(labels)
        ]
    else:
        columns = [Column(("", ""), labels)]
        steps = [_step(row) for _, row in rows]
        if any(steps):
            columns.append(Column(("", "step"), steps, right=True))
        columns += [Column(metric_head(metric), cells[metric]) for metric in comparison.metrics]
    table = layout(columns, width)
    flattering = [m for m in comparison.metrics if comparison.chose_itself(m)]
    if flattering:
        table += "\n" + wrapped(
            [f"{', '.join(flattering)}: measured on what chose the checkpoint, and flatters"], width
        )
    if len(comparison.entries) > 1:
        table += "\n* the baseline" + (
            "" if comparison.baseline_named else ": the first, since --baseline names none"
        )
    return table


def _claims_section(title: str, comparison: Comparison, claims: Claims, width: int) -> str:
    count = len(claims.made)
    holm = f"; p after Holm over {count} comparisons" if count > 1 else ""
    parts = [wrapped([f"{HOW[title]}{holm}"], width)]
    if claims.made:
        parts.append(_claims_table(claims.made, "rows" if title == CHECKPOINT else "seeds", width))
    refused = [f"not offered: {sentence}" for sentence in refusals(claims.refused)]
    if not claims.made and not refused:
        refused = ["not offered: no metric in common"]
    if refused:
        parts.append(wrapped(refused, width))
    return _section(title, "\n".join(parts))


def _claims_table(made: Sequence[Claim], unit: str, width: int) -> str:
    """Return the comparisons, gathered below their metrics."""
    labels, rows = [], []
    for metric in dict.fromkeys(claim.metric for claim in made):
        evaluation, measure = metric_head(metric)
        labels.append(f"{evaluation}  {measure}")
        rows.append(("", "", "", ""))
        for claim in made:
            if claim.metric == metric:
                labels.append(f"  {claim.second} against {claim.first}")
                p = probability(claim.adjusted)
                rows.append((signed_interval(claim), claim.n, p, claim.verdict))
    differences, numbers, ps, verdicts = ([*cells] for cells in zip(*rows, strict=True))
    columns = [
        Column(("",), labels),
        Column(("difference",), differences),
        Column((unit,), numbers),
        Column(("p",), ps, right=True),
        Column(("",), verdicts),
    ]
    return layout(columns, width)


def refusals(refused: Sequence[Refusal]) -> list[str]:
    """Return what is not offered, those of the same reason in one sentence."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in refused:
        pair = f"{one.second} against {one.first}"
        found.setdefault((one.metrics, one.reason), []).append(pair)
    sentences = []
    for (metrics, reason), pairs in found.items():
        listed = ", ".join(pairs)
        if len(pairs) > 4:
            listed = f"{pairs[0]} and {len(pairs) - 1} more"
        sentences.append(f"{listed} in {metrics}: {reason}" if metrics else f"{listed}: {reason}")
    return sentences


def _section(title: str, body: str) -> str:
    return f"{title.upper()}\n{body}"


def _block(columns: Sequence[Column]) -> str:
    heads = max(len(column.head) for column in columns)
    lines = []
    for at in range(heads):
        cells = [("",) * (heads - len(c.head)) + c.head for c in columns]
        line = [cell[at] for cell in cells]
        if at == 0 and heads > 1:
            # An evaluation is named once above its metrics.
            line = [line[0], *("" if a == b else b for a, b in pairwise(line))]
        lines.append(_line(columns, line))
    lines.append("  ".join("─" * column.width for column in columns))
    lines += [
        _line(columns, [column.cells[row] for column in columns])
        for row in range(len(columns[0].cells))
    ]
    return "\n".join(line for line in lines if line.strip())


def _line(columns: Sequence[Column], cells: Sequence[str]) -> str:
    return "  ".join(
        cell.rjust(column.width) if column.right else cell.ljust(column.width)
        for column, cell in zip(columns, cells, strict=True)
    ).rstrip()


def _cell(row: Entry | Configuration, metric: str) -> str:
    if isinstance(row, Configuration):
        return over_seeds(row, metric)
    score = row.scores.get(metric)
    return "-" if score is None else with_interval(metric, score)


def _step(row: Entry | Configuration) -> str:
    if isinstance(row, Configuration):
        return ""
    steps = {score.step for score in row.scores.values() if score.step is not None}
    if len(steps) > 1:
        return "various"
    step = steps.pop() if steps else row.run.last_step()
    return "" if step is None else str(step)


def _seeds(configuration: Configuration) -> list[str]:
    return [seed for seed in configuration.seeds if seed != "?"]


def _param(run: Run, key: str) -> str:
    return clipped(about(run).get(key, "-"), _LONGEST_VALUE)


def _ends(key: str, end: str) -> bool:
    return key == end or key.endswith(f".{end}")


# --- csv -----------------------------------------------------------------------------------------


def as_csv(comparison: Comparison) -> str:
    """Return one row a run: where it is from, what differs, each metric with its interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    params = comparison.params
    ends = [f"{metric}{end}" for metric in comparison.metrics for end in ("", "_low", "_high")]
    fixed = ["label", "configuration", "run", "experiment", "where", "status", "seed", "value"]
    writer.writerow([*fixed, *params, *ends])
    for one in comparison.configurations:
        for entry in one.entries:
            run = entry.run
            row = [entry.label, one.label, entry.name, run.experiment or "", run.where, run.status,
                   run.seed or "", comparison.how]  # fmt: skip
            row += [about(run).get(key, "") for key in params]
            for metric in comparison.metrics:
                score = entry.scores.get(metric)
                values = (None, None, None) if score is None else score[:3]
                row += ["" if value is None else repr(float(value)) for value in values]
            writer.writerow(row)
    return text.getvalue().rstrip("\n")


# --- JSON ----------------------------------------------------------------------------------------


def as_json(comparison: Comparison) -> str:
    """Return all of it as strict JSON."""
    return json.dumps(as_dict(comparison), indent=2, allow_nan=False, ensure_ascii=False)


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return all of it as plain values; what is not finite is null."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "title": comparison.title,
        "value": comparison.how,
        "value_in_words": comparison.taken,
        "baseline": comparison.baseline.label,
        "baseline_named": comparison.baseline_named,
        "metrics": [
            {
                "name": metric,
                "short": measure_name(metric),
                "higher_is_better": higher_is_better(metric),
                "share": is_share(metric),
                "chose_the_checkpoint": comparison.chose_itself(metric),
            }
            for metric in comparison.metrics
        ],
        "differing_params": comparison.params,
        "configurations": [
            {
                "label": one.label,
                "name": one.name,
                "params": {key: about(one.entries[0].run).get(key) for key in comparison.params},
                "seeds": _seeds(one),
                "runs": [entry.label for entry in one.entries],
                "means": {
                    metric: {"mean": fmean(values), "sd": stdev(values), "n": len(values)}
                    for metric in comparison.metrics
                    if len(values := one.values(metric)) > 1
                },
            }
            for one in comparison.configurations
        ],
        "runs": [
            _run(entry, one.label) for one in comparison.configurations for entry in one.entries
        ],
        "checkpoint_claims": _claims(comparison.checkpoint_claims, HOW[CHECKPOINT]),
        "configuration_claims": _claims(comparison.configuration_claims, HOW[CONFIGURATION]),
        "notes": comparison.notes,
    }


def finite(value: float | None) -> float | None:
    """Return a number that JSON has, None for any other."""
    return value if value is not None and math.isfinite(value) else None


def _run(entry: Entry, configuration: str) -> dict[str, Any]:
    run = entry.run
    return {
        "label": entry.label,
        "configuration": configuration,
        "name": entry.name,
        "experiment": run.experiment,
        "where": run.where,
        "status": run.status,
        "seed": run.seed,
        "step": run.last_step(),
        "chosen_on": run.chosen_split,
        "scores": {
            metric: {
                "value": finite(score.value),
                "low": finite(score.low),
                "high": finite(score.high),
                "step": score.step,
                "n": score.n,
                "chance": finite(score.chance),
            }
            for metric, score in entry.scores.items()
        },
    }


def _claims(claims: Claims, how: str) -> dict[str, Any]:
    return {
        "how": how,
        "correction": "Holm",
        "comparisons": len(claims.made),
        "made": [
            {
                "metric": claim.metric,
                "first": claim.first,
                "second": claim.second,
                "difference": finite(claim.value),
                "low": finite(claim.low),
                "high": finite(claim.high),
                "p": finite(claim.p),
                "p_holm": finite(claim.adjusted),
                "n": claim.n,
                "verdict": claim.verdict,
            }
            for claim in claims.made
        ],
        "refused": [one._asdict() for one in claims.refused],
    }
