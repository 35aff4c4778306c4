"""Runs read from their own folders: config.yaml, metrics.jsonl, outcomes/."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from clipkit.errors import UserError
from clipkit.tracking.runs import Point, Run, Which, as_params


class FolderRun(Run):
    """A run as ``runs/<experiment>/<run>`` holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.name = self.folder.name
        self.where = str(folder)
        self.params = read_params(self.folder / "config.yaml")
        self.experiment = self.params.get("experiment") or self.folder.parent.name
        self.environment = {}
        self.status = read_status(self.folder)
        self._points = _read_journal(self.folder / "metrics.jsonl")
        self.latest = {name: points[-1].value for name, points in self._points.items()}

    def history(self, metric: str) -> list[Point]:
        return self._points.get(metric, [])

    def outcome_file(self, evaluation: str, which: Which) -> Path | None:
        return outcome_file(self.folder, evaluation, which)

    def outcome_step(self) -> int | None:
        return max((points[-1].step for points in self._points.values()), default=None)


def read_status(folder: Path) -> str:
    """Return how a run ended; one that was killed has not said so."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return "unfinished"
    return str(status)


def is_run_folder(path: Path) -> bool:
    """Return whether a folder holds a run."""
    return (path / "metrics.jsonl").is_file() or (
        (path / "config.yaml").is_file() and (path / "checkpoints").is_dir()
    )


def outcome_file(folder: Path, evaluation: str, which: Which) -> Path | None:
    """Return where a run folder keeps the outcomes of an evaluation, None where it has none."""
    file = folder / "outcomes" / f"{evaluation.replace('/', '-')}-{which}.parquet"
    return file if file.is_file() else None


def read_params(path: Path) -> dict[str, str]:
    """Return a config.yaml as flat parameters; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        configuration = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or "no text"
        raise UserError(f"{path}{where}: the configuration cannot be read ({reason})") from error
    if not isinstance(configuration, dict):
        raise UserError(f"{path}: holds no configuration")
    return as_params(configuration)


def _read_journal(path: Path) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = defaultdict(list)
    if not path.is_file():
        return points
    began: float | None = None
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for index, text in enumerate(lines):
        try:
            line: dict[str, Any] = json.loads(text)
            moment, step = float(line.pop("time")), int(line.pop("step"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if index == len(lines) - 1:
                break  # a run that was killed while it wrote
            raise UserError(f"{path}, line {index + 1}: not a line of metrics") from error
        began = moment if began is None else began
        line.pop("epoch", None)
        for name, value in line.items():
            points[name].append(Point(step, moment - began, float(value)))
    return points
