"""Runs that MLflow believes to be running, since nobody was left to say that they are not."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.tracking.journal_file import JOURNAL_FILE
from clipkit.tracking.locks import is_held
from clipkit.tracking.mlflow_errors import told_apart
from clipkit.tracking.run_record import read_status
from clipkit.tracking.shipped import ENDS

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


def end_those(client: MlflowClient, experiment_id: str) -> list[str]:
    """Give the runs of this machine that no process writes their status; return their names.

    Of another machine nothing is known.
    """
    with told_apart():
        running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'")
    ended = []
    for run in running:
        status = _ended(run)
        if status is not None:
            with told_apart():
                client.set_terminated(run.info.run_id, status)
            ended.append(str(run.info.run_name))
    return ended


def _ended(run: Run) -> str | None:
    """Return how a run has ended, None where it may be running."""
    tags = run.data.tags
    folder = tags.get("clipkit.run_folder")
    if folder is None or tags.get("clipkit.host") != platform.node():
        return None
    said = read_status(Path(folder))
    if said.get("id") != tags.get("clipkit.id"):
        return "KILLED"  # its folder is gone
    if is_held(Path(folder) / JOURNAL_FILE):
        return None
    return ENDS.get(str(said.get("status")), "KILLED")
