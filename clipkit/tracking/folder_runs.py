"""Runs read from their own folders: config.yaml, metrics.jsonl, outcomes/."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

import yaml

from clipkit import safe_yaml
from clipkit.errors import UserError
from clipkit.tracking.journal_file import JOURNAL_FILE, lines_after
from clipkit.tracking.run_record import read_status
from clipkit.tracking.runs import Point, Run, Which, as_params

CONFIG_FILE = "config.yaml"

log = logging.getLogger(__name__)


class FolderRun(Run):
    """A run as ``runs/<experiment>/<run>`` holds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.name = self.folder.name
        self.where = str(folder)
        self.params = read_params(self.folder / CONFIG_FILE)
        self.experiment = self.params.get("experiment") or self.folder.parent.name
        self.environment = {}
        self._said = read_status(self.folder)
        self.identity = str(self._said.get("id", self.folder))
        self.status = str(self._said.get("status", "unfinished"))
        self.began, self._points = _read_journal(self.folder / JOURNAL_FILE)
        self.latest = {name: points[-1].value for name, points in self._points.items()}

    def history(self, metric: str) -> list[Point]:
        return self._points.get(metric, [])

    def outcome_file(self, evaluation: str, which: Which) -> Path | None:
        return outcome_file(self.folder, evaluation, which)

    @property
    def chosen_step(self) -> int | None:
        if self.status != "finished":
            return self._step_of_best()
        chosen = self._said.get("chosen")
        step = chosen.get("step") if isinstance(chosen, dict) else None
        return step if isinstance(step, int) else None


def is_run_folder(path: Path) -> bool:
    """Return whether a folder holds a run."""
    return (path / JOURNAL_FILE).is_file() or (
        (path / CONFIG_FILE).is_file() and (path / "checkpoints").is_dir()
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
        configuration = safe_yaml.load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or getattr(error, "strerror", None) or "no text"
        raise UserError(f"{path}{where}: the configuration cannot be read ({reason})") from error
    if not isinstance(configuration, dict):
        raise UserError(f"{path}: holds no configuration")
    return as_params(configuration)


def _read_journal(path: Path) -> tuple[float, dict[str, list[Point]]]:
    """Return when the run began to log, and what it logged."""
    points: dict[str, list[Point]] = defaultdict(list)
    began: float | None = None
    if not path.is_file():
        return 0.0, points
    lines = list(lines_after(path))
    damaged = path.read_bytes().count(b"\n") - len(lines)
    if damaged:
        log.warning("warning: %s: %d damaged lines are left out", path, damaged)
    for line in lines:
        began = line.time if began is None else began
        for name, value in line.values.items():
            points[name].append(Point(line.step, line.time - began, value))
    return began or 0.0, points
