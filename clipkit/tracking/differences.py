"""Two runs' configurations and surroundings, key by key where they differ."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from clipkit.errors import UserError
from clipkit.tracking.runs import Run
from clipkit.tracking.sources import unique
from clipkit.tracking.tables import WIDTH, Column, clipped, layout


class Line(NamedTuple):
    """A key and its two values, None where a run has none."""

    key: str
    first: str | None
    second: str | None


class Difference(NamedTuple):
    """What differs between two runs."""

    first: Run
    second: Run
    params: list[Line]
    environment: list[Line]


def two(runs: Sequence[Run], baseline: Sequence[Run] = ()) -> Difference:
    """Return what differs between exactly two runs; the baseline is the first of them."""
    runs = unique([*baseline, *runs])
    if len(runs) != 2:
        names = ", ".join(run.name for run in runs[:6])
        raise UserError(f"compare --diff: takes two runs, and {len(runs)} are named ({names})")
    first, second = runs
    for run in runs:
        if not run.params:
            raise UserError(f"compare --diff: {run.where}: its configuration is not known")
    return Difference(
        first, second, _lines(first.params, second.params),
        _lines(first.environment, second.environment),
    )  # fmt: skip


def write(difference: Difference, form: str) -> str:
    """Return the differences as ``table``, ``csv`` or ``json``."""
    lines = [*difference.params, *difference.environment]
    if form == "json":
        sections = {
            section: {line.key: [line.first, line.second] for line in found}
            for section, found in (
                ("params", difference.params), ("environment", difference.environment)
            )
        }  # fmt: skip
        names = [difference.first.where, difference.second.where]
        return json.dumps({"runs": names, **sections}, indent=2, ensure_ascii=False)
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["key", difference.first.where, difference.second.where])
        writer.writerows([(line.key, line.first or "", line.second or "") for line in lines])
        return text.getvalue().rstrip("\n")
    if form == "latex":
        raise UserError("compare --diff --format latex: accepted are table, csv and json")
    return _table(difference)


def _table(difference: Difference) -> str:
    lines = [*difference.params, *difference.environment]
    if not lines:
        return f"{difference.first.where} and {difference.second.where}: nothing differs"
    keys = [line.key for line in lines]
    left = max(20, (WIDTH - max(map(len, keys)) - 4) // 2)
    columns = [
        Column(("",), keys),
        Column((clipped(difference.first.name, left),), _values((x.first for x in lines), left)),
        Column((clipped(difference.second.name, left),), _values((x.second for x in lines), left)),
    ]
    return layout(columns, max(WIDTH, sum(column.width + 2 for column in columns)))


def _values(values: Iterable[str | None], longest: int) -> list[str]:
    return ["-" if value is None else clipped(value, longest) for value in values]


def _lines(first: Mapping[str, str], second: Mapping[str, str]) -> list[Line]:
    keys = dict.fromkeys([*first, *second])
    return [
        Line(key, first.get(key), second.get(key))
        for key in keys
        if first.get(key) != second.get(key)
    ]
