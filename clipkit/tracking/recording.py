"""A run folder while it is written: begun, or taken up again, by one process at a time."""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from clipkit.errors import UserError, named
from clipkit.tracking.folder_runs import CONFIG_FILE, read_params
from clipkit.tracking.journal_file import JournalFile
from clipkit.tracking.run_record import STATUS_FILE, RunRecord, read_record, write_json
from clipkit.tracking.runs import NAMING, begins_with
from clipkit.tracking.shipped import RECORDS, links_out_of
from clipkit.tracking.tracking_uri import absolute, holds_password

# Of tags that a run has for what it goes on with, where that is not what it began with.
RESUMED = "clipkit.resumed."
_SURROUNDINGS = (
    *("clipkit.version.", "clipkit.world_size", "clipkit.data_fingerprint"),
    "mlflow.source.git.commit",
)

log = logging.getLogger(__name__)


class Recording:
    """A run folder that this process writes.

    Attributes:
        path: the folder.
        record: who the run is.
        journal: its metrics.jsonl.
    """

    def __init__(self, path: Path, record: RunRecord, journal: JournalFile) -> None:
        self.path = path
        self.record = record
        self.journal = journal

    def describe(
        self,
        *,
        tags: dict[str, str],
        experiment: str | None = None,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        artifact_location: str | None = None,
    ) -> None:
        """Write run.json: what MLflow is told of the run, and where; None is what it was."""
        if tracking_uri is not None:
            tracking_uri = None if holds_password(tracking_uri) else absolute(tracking_uri)
        record = self.record
        self.record = replace(
            record,
            experiment=experiment or record.experiment,
            run_name=run_name or record.run_name,
            tags={**record.tags, **_beside(record.tags, tags)},
            tracking_uri=tracking_uri or record.tracking_uri,
            artifact_location=artifact_location or record.artifact_location,
        )
        self.record.write(self.path)

    def is_going_on(self) -> None:
        """Write status.json: what a run that is killed will have said of itself."""
        write_json(self.path / STATUS_FILE, {"id": self.record.id, "status": "unfinished"})

    def end(self, status: str, **more: Any) -> None:
        """Write status.json: finished, interrupted or failed; a full disk is no further failure."""
        said = {"id": self.record.id, "status": status, "ended": round(time.time(), 3), **more}
        try:
            write_json(self.path / STATUS_FILE, said)
        except OSError as error:
            log.warning(
                "warning: %s cannot say that the run is %s (%s)", self.path, status, error.strerror
            )

    def close(self) -> None:
        """Let the folder go."""
        self.journal.close()


def begin(root: Path, experiment: str, name: str, config_yaml: str) -> Recording:
    """Make ``<root>/<experiment>/<name>``, with -2, -3 and so on where that is taken."""
    number = 1
    while True:
        path = root / experiment / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True, exist_ok=False)
            path = path.resolve()
            (path / CONFIG_FILE).write_text(config_yaml, encoding="utf-8")
            record = RunRecord(uuid4().hex, experiment, path.name, round(time.time(), 3))
            recording = Recording(path, record, JournalFile(path))
            recording.is_going_on()
            return recording
        except FileExistsError as error:
            if not path.is_dir():
                raise UserError(
                    f"the run folder {path} cannot be made: a file stands in its way"
                ) from error
            number += 1
        except OSError as error:
            raise UserError(
                f"the run folder {path} cannot be written ({error.strerror}); work in a "
                "folder that you may write to"
            ) from error


def go_on(path: Path, config_yaml: str) -> Recording:
    """Take a run up again: its folder, its id, its journal.

    What MLflow holds as parameters cannot be changed, so those that differ become tags; the new
    configuration is kept beside the first as config-2.yaml and so on.
    """
    path = path.resolve()
    if outside := links_out_of(path, (*RECORDS, "config-*.yaml")):
        raise UserError(f"the run {path} cannot be continued: {outside[0]!r} is a link out of it")
    record = read_record(path)
    if record is None:
        raise UserError(
            f"the run {path} cannot be continued: it has no run.json, as an older clipkit left it; "
            "--weights starts a new run from its checkpoint"
        )
    try:
        journal = JournalFile(path, continued=True)
        changed = _changed(path, _keep_configuration(path, config_yaml), record.tags)
        record = replace(
            record,
            tags={**record.tags, **changed},
            continued=record.continued + 1,
            host=platform.node(),
        )
        recording = Recording(path, record, journal)
        recording.is_going_on()
        _say_what_changed(changed, journal)
    except OSError as error:
        raise UserError(f"the run folder {path} cannot be written ({error.strerror})") from error
    return recording


def configurations(folder: Path) -> list[Path]:
    """Return the configurations of a run, that which it began with first."""
    later = [path for path in folder.glob("config-*.yaml") if path.stem[7:].isdecimal()]
    return [folder / CONFIG_FILE, *sorted(later, key=lambda path: int(path.stem[7:]))]


def _keep_configuration(folder: Path, config_yaml: str) -> Path:
    """Keep a configuration, unless it is that of the last time; return its file."""
    kept = configurations(folder)
    if kept[-1].read_text(encoding="utf-8") == config_yaml:
        return kept[-1]
    newest = folder / f"config-{len(kept) + 1}.yaml"
    newest.write_text(config_yaml, encoding="utf-8")
    return newest


def _changed(folder: Path, newest: Path, tags: dict[str, str]) -> dict[str, str]:
    """Return as tags what the newest configuration has other than the run began with.

    What was changed before is told again, also where it is now what it was at first.
    """
    before, now = read_params(folder / CONFIG_FILE), read_params(newest)
    keys = [*before, *(key for key in now if key not in before)]
    return {
        f"{RESUMED}{key}": now.get(key, "")
        for key in keys
        if (before.get(key) != now.get(key) and not begins_with(key, NAMING))
        or f"{RESUMED}{key}" in tags
    }


def _say_what_changed(changed: dict[str, str], journal: JournalFile) -> None:
    if changed:
        names = named([key.removeprefix(RESUMED) for key in changed], 5)
        log.info(
            "run: other than at its beginning: %s; the metrics up to step %s stay as they are",
            names, journal.known_step,
        )  # fmt: skip


def _beside(before: dict[str, str], tags: dict[str, str]) -> dict[str, str]:
    """Return tags such that what a run was begun on is kept, and what it goes on on is beside."""
    return {
        key
        if before.get(key, value) == value or not key.startswith(_SURROUNDINGS)
        else f"{RESUMED}{key.removeprefix('clipkit.').removeprefix('mlflow.source.git.')}": value
        for key, value in tags.items()
    }
