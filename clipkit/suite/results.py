"""Result files: what was measured, on what, with what; strict JSON that says so by itself."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.errors import UserError
from clipkit.evaluation.metric import Metric
from clipkit.suite.whole_file import whole_file
from clipkit.tracking.config import commit, device_name, versions
from clipkit.tracking.result_runs import KIND, SCHEMA

if TYPE_CHECKING:
    from clipkit.interop import OpenedModel


def new(opened: OpenedModel, *, suite: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return a result file without tasks yet."""
    return {
        "schema": SCHEMA,
        "kind": KIND,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "spec": opened.spec,
            "name": opened.name,
            "weights": opened.weights,
            "tokenizer": opened.tokenizer,
            "preprocess": opened.preprocess,
            "embed_dim": opened.embed_dim,
            "dtype": opened.dtype,
            "scale": opened.scale,
            "configuration": opened.configuration,
        },
        "suite": suite,
        "settings": settings,
        "environment": {
            **{name.removeprefix("version."): value for name, value in versions().items()},
            "device": device_name(),
            "commit": commit(),
        },
        "tasks": [],
        "failed": [],
    }


def as_json(metrics: dict[str, Metric]) -> dict[str, dict[str, float | int | None]]:
    """Return metrics as a result file keeps them."""
    return {
        name: {
            "value": _finite(metric.value),
            "low": None if metric.interval is None else _finite(metric.interval.low),
            "high": None if metric.interval is None else _finite(metric.interval.high),
            "n": metric.n,
            "chance": metric.chance,
            "normalised": metric.normalised,
        }
        for name, metric in metrics.items()
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    text = json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        with whole_file(path) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror})") from error


def outcomes_file(output: Path, task: str, set_name: str) -> Path:
    """Return where the outcomes of a task lie."""
    return output.with_name(f"{output.stem}.outcomes") / f"{task}-{set_name}.parquet"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
