"""Result files of ``clipkit benchmark``, read as runs that were evaluated once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipkit.errors import UserError
from clipkit.tracking.digests import digest_of_values
from clipkit.tracking.runs import Point, Run, Score, Which, as_params

KIND = "clipkit-benchmark"
SCHEMA = 1


class ResultRun(Run):
    """One model as a result file describes it.

    A checkpoint of clipkit has the configuration that trained it; of other models none is known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity = str(path.resolve())
        self.where = str(path)
        result = read_result(path)
        self.name = path.stem
        try:
            self._take(result)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            what = f"lacks {error.args[0]!r}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{path}: a broken result file ({what})") from error

    def _take(self, result: Mapping[str, Any]) -> None:
        model = result["model"]
        settings = {f"settings.{key}": value for key, value in result["settings"].items()}
        self.about = {
            "model": model["spec"],
            "embed_dim": str(model["embed_dim"]),
            "suite": result["suite"],
            **{key: str(value) for key, value in settings.items()},
        }
        surroundings = {**result["environment"], "weights": model["weights"]}
        self.environment = {k: str(value) for k, value in surroundings.items() if value is not None}
        self.params = as_params(model["configuration"]) if model.get("configuration") else {}
        self._tasks = {f"{task['task']}/{task['set']}": task for task in result["tasks"]}
        self._scores: dict[str, Score] = {}
        for evaluation, task in self._tasks.items():
            for measure, metric in task["metrics"].items():
                low, high = metric.get("low"), metric.get("high")
                value = float("nan") if metric["value"] is None else float(metric["value"])
                self._scores[f"{evaluation}/{measure}"] = Score(
                    value, low, high, n=metric.get("n"), chance=metric.get("chance")
                )
        self.latest = {name: score.value for name, score in self._scores.items()}
        self.failed = [
            f"{one['task']}/{one['set']} failed: {one['error']}" for one in result.get("failed", [])
        ]

    def last(self, metric: str) -> Score | None:
        return self._scores.get(metric)

    def chosen(self, metric: str) -> Score | None:
        return self.last(metric)

    def best(self, metric: str) -> Score | None:
        return self.last(metric)

    def history(self, metric: str) -> list[Point]:
        return []

    def outcome_file(self, evaluation: str, which: Which) -> Path | None:
        task = self._tasks.get(evaluation)
        if task is None or not task.get("outcomes"):
            return None
        file = self.path.parent / str(task["outcomes"])
        beside = file.resolve().is_relative_to(self.path.parent.resolve())
        return file if beside else None  # a stranger's file may name any

    # Both are known also where the outcomes were left behind.

    def digest(self, evaluation: str) -> str | None:
        task = self._tasks.get(evaluation)
        return None if task is None else task["data"].get("digest")

    def settings(self, evaluation: str) -> str | None:
        settings = self._tasks.get(evaluation, {}).get("settings")
        return None if settings is None else digest_of_values(settings)


def read_result(path: Path) -> dict[str, Any]:
    """Return a result file's content; anything else is one sentence."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no result file (not UTF-8 text)") from error
    except RecursionError as error:
        raise UserError(f"{path}: no result file (nested too deeply)") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}, column {error.colno}: no JSON ({error.msg})"
        ) from error
    if not isinstance(result, dict) or result.get("kind") != KIND:
        raise UserError(f"{path}: no result file; `clipkit benchmark X --output {path}` writes one")
    schema = result.get("schema")
    if not isinstance(schema, int) or schema < SCHEMA:
        raise UserError(
            f"{path}: a result file of the older schema {schema}; this clipkit reads {SCHEMA}, so "
            "run `clipkit benchmark` again"
        )
    if schema > SCHEMA:
        raise UserError(
            f"{path}: a result file of the newer schema {schema}; this clipkit reads {SCHEMA}, so "
            "install a newer one"
        )
    return result
