"""Which checkpoint a run goes on from: the newest that is whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from clipkit.errors import UserError, named
from clipkit.saving import BEFORE_LAST, LAST, damage
from clipkit.tracking.folder_runs import CONFIG_FILE, is_run_folder, read_params
from clipkit.tracking.run_record import read_status

CHECKPOINTS = "checkpoints"


class Resumable(NamedTuple):
    """A checkpoint to go on from, and its run."""

    checkpoint: Path
    run: Path
    damaged: list[str]  # newer checkpoints that were passed over, and why


def last_of(experiment: str, run_name: str, *, root: Path = Path("runs")) -> Resumable:
    """Return the newest whole checkpoint of the newest run of this experiment and name.

    A run whose name was taken has -2, -3 and so on behind it.

    Raises:
        UserError: no such run has a checkpoint that is whole.
    """
    folder = root / experiment
    runs = _runs_of(folder)
    wanted = [run for run in runs if _was_named(run, run_name)]
    passed_over: list[str] = []
    for run in sorted(wanted, key=_last_written, reverse=True):
        checkpoint, damaged = _newest_whole(run)
        if checkpoint is not None:
            return Resumable(checkpoint, run, damaged)
        passed_over += damaged
    why = f" ({passed_over[0]})" if passed_over else ""
    others = [run for run in runs or sorted(root.glob("*/*")) if run not in wanted]
    there = f"; with checkpoints there are: {named(others, 10)}" if others else ""
    raise UserError(
        f"--ckpt_path last: no run {folder / run_name} has a checkpoint that can be read{why}"
        f"{there}; leave --ckpt_path out to start, or give a checkpoint's path"
    )


def run_of(checkpoint: Path) -> Path | None:
    """Return the run that a checkpoint goes on with: an unfinished one whose newest whole it is."""
    run = checkpoint.resolve().parent.parent
    if checkpoint.parent.name != CHECKPOINTS or not is_run_folder(run):
        return None
    if read_status(run).get("status") == "finished":
        return None
    newest, _ = _newest_whole(run)
    return run if newest is not None and checkpoint.samefile(newest) else None


def _newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint of a run, and what is wrong with those that are newer."""
    damaged: list[str] = []
    for checkpoint in _checkpoints(run):
        found = damage(checkpoint)
        if found is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint} is damaged: {found}")
    return None, damaged


def _was_named(run: Path, name: str) -> bool:
    """Whether a run was to have this name; vit-2 may be the second vit, or the first vit-2."""
    if not re.fullmatch(re.escape(name) + r"(-\d+)?", run.name):
        return False
    with suppress(UserError):
        return read_params(run / CONFIG_FILE).get("run_name", name) == name
    return True


def _runs_of(folder: Path) -> Sequence[Path]:
    return [path for path in sorted(folder.glob("*")) if _checkpoints(path)]


def _last_written(run: Path) -> float:
    return _checkpoints(run)[0].stat().st_mtime


def _checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    files = [path for path in run.glob(f"{CHECKPOINTS}/*.ckpt") if not path.name.startswith(".")]
    written = {path: path.stat().st_mtime_ns for path in files}
    last, before = (run / CHECKPOINTS / name for name in (LAST, BEFORE_LAST))
    if last in written and before in written:  # whatever a clock that was set back says
        written[before] = min(written[before], written[last] - 1)
    return sorted(files, key=written.__getitem__, reverse=True)
