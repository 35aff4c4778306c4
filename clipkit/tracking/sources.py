"""What a user wants compared, in a word: an experiment, a run, a folder or a file; mixed freely."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from clipkit.errors import UserError
from clipkit.tracking.folder_runs import FolderRun, is_run_folder
from clipkit.tracking.mlflow_runs import MLflowRun, Store
from clipkit.tracking.result_runs import ResultRun
from clipkit.tracking.runs import Run

ACCEPTED = (
    "an MLflow experiment's name, a run's name or id, a run folder (runs/<experiment>/<run>) or "
    "a result file (*.json)"
)
_MOST = 8


def collect(whats: Sequence[str], store: Store) -> list[Run]:
    """Return the runs behind the words, in their order, each once."""
    return unique([run for what in whats for run in resolve(what, store)])


def unique(runs: Sequence[Run]) -> list[Run]:
    """Return the runs without repetitions: MLflow and a run's folder are one run."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(run.identity, run)
    return list(found.values())


def resolve(what: str, store: Store) -> list[Run]:
    """Return the runs that one word stands for."""
    path = Path(what).expanduser()
    if path.is_file():
        if path.suffix == ".json":
            return [ResultRun(path)]
        raise UserError(f"compare {what}: a file, but no result file; accepted is {ACCEPTED}")
    if path.suffix == ".json":
        raise UserError(f"compare {what}: no such file{_hint(what, _files_beside(path))}")
    if path.is_dir():
        runs = _in_folder(path)
        if runs:
            return runs
    if what in store.experiments:
        return _of_experiment(what, store)
    if not path.is_absolute():
        runs = _named(what, store) or _in_folder(Path("runs") / what)
        if runs:
            return runs
    raise UserError(_unknown(what, path, store))


def _in_folder(path: Path) -> list[Run]:
    """Return the run of a run folder, or the runs of a folder of run folders."""
    if is_run_folder(path):
        return [FolderRun(path)]
    if not path.is_dir():
        return []
    runs: list[Run] = [FolderRun(inner) for inner in sorted(path.iterdir()) if is_run_folder(inner)]
    return sorted(runs, key=lambda run: run.began)  # as MLflow lists them


def _of_experiment(name: str, store: Store) -> list[Run]:
    runs = store.runs(name)
    if runs:
        return runs
    raise UserError(f"compare {name}: the experiment has no run; `clipkit fit` records one")


def _named(what: str, store: Store) -> list[Run]:
    """Return the run of this name or id, or of ``experiment/run``."""
    experiment, _, name = what.rpartition("/")
    if experiment and experiment not in store.experiments:
        return []
    runs = [run for run in store.find(name) if not experiment or run.experiment == experiment]
    if len(runs) > 1:
        listed = sorted({f"{run.experiment}/{run.name}" for run in runs})
        if len(listed) == len(runs):
            raise UserError(
                f"compare {what}: {len(runs)} runs have this name; say {' or '.join(listed[:4])}"
            )
        ids = [run.id for run in runs if isinstance(run, MLflowRun)]
        raise UserError(
            f"compare {what}: {len(runs)} runs have this name; say which by id: "
            f"{', '.join(ids[:4])}"
        )
    return runs


def _unknown(what: str, path: Path, store: Store) -> str:
    if path.is_dir():
        return (
            f"compare {what}: the folder holds no run (config.yaml, metrics.jsonl); accepted is "
            f"{ACCEPTED}"
        )
    names = [name for name in store.experiments if name != "Default"]
    runs = [run.name for name in names[:50] for run in store.runs(name)]
    folders = [str(found) for found in Path("runs").glob("*/*") if is_run_folder(found)]
    known = [*names, *runs, *folders, *_files_beside(Path("any.json"))]
    if not names:
        there = f"{store.uri} holds no experiment"
    else:
        more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
        there = f"{store.uri} holds the experiments {', '.join(names[:_MOST])}{more}"
    return f"compare {what}: not found{_hint(what, known)}; accepted is {ACCEPTED}; {there}"


def _hint(what: str, known: Sequence[str]) -> str:
    close = get_close_matches(what, known, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _files_beside(path: Path) -> list[str]:
    folder = path.parent
    return [str(file) for file in sorted(folder.glob("*.json"))] if folder.is_dir() else []
