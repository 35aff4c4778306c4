"""What an evaluation found, sample by sample, and the file that two runs are paired by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from clipkit.evaluation.metric import Metric
from clipkit.suite.whole_file import whole_file
from clipkit.tracking.outcomes import SCHEMA

if TYPE_CHECKING:
    from clipkit.suite.examples import Example


class Outcome(NamedTuple):
    """One metric sample by sample; the metric is the mean of its outcomes."""

    metric: str
    row: Tensor  # (N,) int64
    group: Tensor  # (N,) int64, rows of one group are not independent
    outcome: Tensor  # (N,) float64
    label: Tensor | None = None  # (N,) int64, the right class
    predicted: Tensor | None = None  # (N,) int64, the class that scored highest


class Measured(NamedTuple):
    """What an evaluation found on one data set."""

    metrics: dict[str, Metric]
    outcomes: list[Outcome]
    class_names: list[str] | None = None
    examples: Sequence[Example] = ()


def write_outcomes(
    path: Path,
    measured: Measured,
    *,
    task: str,
    set_name: str,
    data: str,
    settings: str,
    step: int | None = None,
) -> None:
    """Write the outcomes as parquet, whole or not at all.

    Args:
        path: the file.
        measured: what was found.
        task: kind of the evaluation, as in metric names.
        set_name: name of the data set, as in metric names.
        data: digest of the rows that were scored.
        settings: digest of what else decided the score: see `Task.settings`.
        step: optimiser steps of the weights that were scored, where a run knows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [
        pa.table(
            {
                "metric": pa.array([one.metric] * len(one.row), pa.string()),
                "row": one.row.numpy(),
                "group": one.group.numpy(),
                "outcome": one.outcome.double().numpy(),
                "label": _column(one.label, len(one.row)),
                "predicted": _column(one.predicted, len(one.row)),
            }
        )
        for one in measured.outcomes
    ]
    if not tables:
        return
    about = {
        "schema": SCHEMA,
        "task": task,
        "set": set_name,
        "data": data,
        "settings": settings,
        "step": step,
        "class_names": measured.class_names,
    }
    table = pa.concat_tables(tables).replace_schema_metadata({"clipkit": json.dumps(about)})
    with whole_file(path) as file:
        pq.write_table(table, file)


def _column(values: Tensor | None, length: int) -> object:
    import pyarrow as pa

    return pa.nulls(length, pa.int64()) if values is None else values.numpy()
