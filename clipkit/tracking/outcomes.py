"""Outcomes sample by sample, read back: what two checkpoints are paired by."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clipkit.errors import UserError

if TYPE_CHECKING:
    import torch

SCHEMA = 1


class Rows(NamedTuple):
    """One metric sample by sample, in the order of the rows."""

    row: np.ndarray  # (R,) int64
    group: np.ndarray  # (R,) int64, rows of one group are not independent
    outcome: np.ndarray  # (R,) float64
    label: np.ndarray | None  # (R,) int64, classification only
    predicted: np.ndarray | None  # (R,) int64


class Outcomes(NamedTuple):
    """The outcomes of one evaluation."""

    path: Path
    digest: str | None
    settings: str | None
    step: int | None
    class_names: list[str] | None
    metrics: dict[str, Rows]


def examples_beside(path: Path) -> Path:
    """Return the file of examples that belongs to a file of outcomes."""
    return path.with_name(f"{path.stem}-examples.json")


def read(path: Path) -> Outcomes:
    """Read a parquet file of outcomes; what cannot be read is one sentence."""
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"{path}: no such file of outcomes")
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _read(path: Path, _changed: int) -> Outcomes:
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        about = _about(table.schema.metadata or {})
        columns = {name: table.column(name).to_numpy() for name in ("row", "group", "outcome")}
        names = table.column("metric").to_pylist()
    except KeyError as error:
        raise UserError(f"{path}: has no column {error.args[0]!r} and holds no outcomes") from error
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).partition("\n")[0].strip().rstrip(".")
        raise UserError(f"{path}: the outcomes cannot be read ({reason})") from error
    if int(about.get("schema", SCHEMA)) != SCHEMA:
        raise UserError(
            f"{path}: outcomes of schema {about['schema']}; this clipkit reads {SCHEMA}"
        )
    metric_of_row = np.array(names, dtype=object)
    labels = [
        table.column(name).to_numpy(zero_copy_only=False) if name in table.column_names else None
        for name in ("label", "predicted")
    ]
    metrics = {}
    for metric in dict.fromkeys(names):
        here = np.flatnonzero(metric_of_row == metric)
        here = here[np.argsort(columns["row"][here], kind="stable")]
        label, predicted = (_whole(column, here) for column in labels)
        row, group, outcome = (columns[name][here] for name in ("row", "group", "outcome"))
        metrics[metric] = Rows(row, group, outcome, label, predicted)
    return Outcomes(
        path,
        about.get("data"),
        about.get("settings"),
        about.get("step"),
        about.get("class_names"),
        metrics,
    )


def pair(
    first: Outcomes, second: Outcomes, metric: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the outcomes of both on the same rows, and the groups; refuses what is no pair."""
    import torch

    for one in (first, second):
        if one.digest is None:
            raise UserError("their outcomes do not say what data they were measured on")
        if metric not in one.metrics:
            raise UserError(f"no outcomes sample by sample of {metric}")
    if first.digest != second.digest:
        raise UserError(
            f"measured on different data (digests {str(first.digest)[:8]} and "
            f"{str(second.digest)[:8]})"
        )
    a, b = first.metrics[metric], second.metrics[metric]
    if not np.array_equal(a.row, b.row):
        raise UserError(
            f"measured on different rows ({len(a.row)} and {len(b.row)}, "
            f"{len(np.intersect1d(a.row, b.row))} of them shared)"
        )
    if not np.array_equal(a.group, b.group):
        raise UserError("their rows are grouped differently")
    return torch.tensor(a.outcome), torch.tensor(b.outcome), torch.tensor(a.group)


def _about(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    if b"clipkit" not in metadata:
        return {}
    about = json.loads(metadata[b"clipkit"])
    if not isinstance(about, dict):
        raise ValueError("its metadata is no object")
    return about


def _whole(column: np.ndarray | None, here: np.ndarray) -> np.ndarray | None:
    """Return integers, None where any of them is missing."""
    if column is None or not len(here):
        return None
    values = column[here].astype(float)
    return None if np.isnan(values).any() else values.astype(np.int64)
