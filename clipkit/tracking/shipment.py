"""A run folder sent to MLflow: what is new in it, as often as wanted, none of it twice.

How far that has come stands in shipped.json, written after MLflow has taken a batch. If the process
ends in between, the batch is sent again; MLflow takes a point once, since time, step and value come
from the journal and are the same again.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.tracking.folder_runs import read_params
from clipkit.tracking.journal_file import JOURNAL_FILE, Line, lines_after
from clipkit.tracking.locks import is_held
from clipkit.tracking.mlflow_errors import MissingError, RefusedError, told_apart
from clipkit.tracking.run_record import RunRecord, read_record, read_status, write_json
from clipkit.tracking.shipped import (
    ENDS,
    EVERYTHING,
    SHIPPED_FILE,
    WRITTEN_ONCE,
    Shipped,
    description_of,
    files_of,
    read_shipped,
)
from clipkit.tracking.tracking_uri import quieten

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, Run, RunTag
    from mlflow.tracking import MlflowClient

LOCK_FILE = ".shipping"
MOST_METRICS = 1000  # MLflow's bounds on a batch
MOST_PARAMS = 100
LARGEST_FILE = 64 * 2**20  # bytes; what is larger stays in the folder
# MLflow's own four minutes of patience with a server are not for whoever is waited for.
PATIENCE = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class Shipment:
    """The run of a folder on its way to a store.

    Args:
        folder: the run folder.
        uri: of the store.
        record: who the run is.
    """

    def __init__(self, folder: Path, uri: str, record: RunRecord) -> None:
        self.folder = folder
        self.uri = uri
        self.record = record
        self.shipped = read_shipped(folder, uri)
        # Not what run.json says when it is read again: only the caller knows whose word it is.
        self._artifact_location = record.artifact_location
        self.sent = 0
        self.refused: list[str] = []
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """MLflow's, which waits no longer than seconds for an answer."""
        if self._client is None:
            for name, value in PATIENCE.items():
                os.environ.setdefault(name, value)
            quieten()
            with told_apart():
                from mlflow.tracking import MlflowClient

                self._client = MlflowClient(self.uri)
        return self._client

    @property
    def run_id(self) -> str:
        """MLflow's, once the run is there."""
        assert self.shipped.run_id is not None
        return self.shipped.run_id

    def send(self, *, ended: bool) -> None:
        """Send what is new; of a run that has ended, also its outcomes and how it ended.

        Raises:
            UnreachableError: the store did not answer; what it has taken is known.
            RefusedError: the run was deleted there.
        """
        try:
            self._send(ended)
        except MissingError:
            # Another database under the same address, or a run that was deleted for good.
            self.shipped = Shipped(self.shipped.store)
            try:
                self._send(ended)
            except MissingError as error:
                raise RefusedError(str(error)) from error

    def _send(self, ended: bool) -> None:
        if self.shipped.run_id is None:
            self._find_or_make()
        if not ended and self.shipped.status != "RUNNING":
            with told_apart():
                self.client.update_run(self.run_id, status="RUNNING")
            self._note(status="RUNNING")
        self._describe()
        self._send_points()
        self._send_files(EVERYTHING if ended else WRITTEN_ONCE)
        if ended:
            self._end()

    def _note(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self.shipped, name, value)
        write_json(self.folder / SHIPPED_FILE, {"schema": 1, **asdict(self.shipped)})

    # --- The run ---------------------------------------------------------------------------------

    def _find_or_make(self) -> None:
        experiment_id = self._experiment()
        # The answer to an earlier call may have been lost: the run may be there.
        found = self._of_this_id(experiment_id)
        if found:
            run = found[0]
        else:
            with told_apart():
                run = self.client.create_run(
                    experiment_id,
                    start_time=_milliseconds(self.record.began),
                    tags=self._tags(),
                    run_name=self.record.run_name,
                )
        self._note(run_id=run.info.run_id, experiment_id=experiment_id, status=str(run.info.status))

    def _of_this_id(self, experiment_id: str | None) -> list[Run]:
        with told_apart():
            where = f"tags.`clipkit.id` = '{self.record.id}'"
            return list(self.client.search_runs([str(experiment_id)], where))

    def _delete_twins(self) -> None:
        """Delete what a call has made whose answer was waited for no longer: a run of this id."""
        for run in self._of_this_id(self.shipped.experiment_id):
            if run.info.run_id != self.run_id:
                with told_apart():
                    self.client.delete_run(run.info.run_id)

    def _experiment(self) -> str:
        name, at = self.record.experiment, self._artifact_location
        with told_apart():
            found = self.client.get_experiment_by_name(name)
            if found is None:
                return str(self.client.create_experiment(name, artifact_location=at))
        return str(found.experiment_id)

    def _tags(self) -> dict[str, str]:
        chosen = read_status(self.folder).get("chosen")
        step = chosen.get("step") if isinstance(chosen, dict) else None
        return {
            **self.record.tags,
            "clipkit.id": self.record.id,
            "clipkit.run_folder": str(self.folder),
            "clipkit.host": self.record.host,
            **({} if step is None else {"clipkit.chosen_step": str(step)}),
        }

    def _describe(self) -> None:
        """Send parameters and tags, where run.json or status.json has changed."""
        version = description_of(self.folder)
        if self.shipped.described == version:
            return
        from mlflow.entities import Param, RunTag

        self.record = read_record(self.folder) or self.record
        params = read_params(self.folder / "config.yaml")
        if not self.shipped.described:
            for some in _batches([Param(*param) for param in params.items()], MOST_PARAMS):
                self._log(params=some)
        for some in _batches([RunTag(*tag) for tag in self._tags().items()], MOST_PARAMS):
            self._log(tags=some)
        self._note(described=version)

    def _end(self) -> None:
        said = read_status(self.folder)
        status = ENDS.get(str(said.get("status")))
        if status is None:
            if is_held(self.folder / JOURNAL_FILE):
                return  # it goes on, as a job that was put back into the queue
            status = "KILLED"
        if status == self.shipped.status:
            return
        self._delete_twins()
        ended = said.get("ended", (self.folder / JOURNAL_FILE).stat().st_mtime)
        with told_apart():
            self.client.set_terminated(self.run_id, status, _milliseconds(ended))
        self._note(status=status)

    # --- Points ----------------------------------------------------------------------------------

    def _send_points(self) -> None:
        journal = self.folder / JOURNAL_FILE
        if self.shipped.offset > journal.stat().st_size:
            self._note(offset=0)  # not the journal that it was
        epoch = self.shipped.epoch
        for lines in _of_about(MOST_METRICS, lines_after(journal, self.shipped.offset)):
            metrics: list[Metric] = []
            tags: list[RunTag] = []
            for line in lines:
                values = {_clean(name): value for name, value in line.values.items()}
                if line.epoch is not None and epoch != [line.step, line.epoch]:
                    epoch = [line.step, line.epoch]
                    values["epoch"] = float(line.epoch)
                metrics += _metrics(line, values)
                tags += [] if self.shipped.has_non_finite or tags else _non_finite(line)
            for some in _batches(metrics, MOST_METRICS):
                self._log(metrics=some)
            if tags:
                self._log(tags=tags)
            self.sent += sum(len(line.values) for line in lines)
            self._note(
                offset=lines[-1].end,
                epoch=epoch,
                has_non_finite=self.shipped.has_non_finite or bool(tags),
            )

    def _log(
        self,
        *,
        metrics: Sequence[Metric] = (),
        params: Sequence[Param] = (),
        tags: Sequence[RunTag] = (),
    ) -> None:
        """Send a batch; where MLflow refuses it, find what it refuses and send the rest."""
        try:
            with told_apart():
                self.client.log_batch(self.run_id, metrics, params, tags)
        except RefusedError as error:
            everything: list[Any] = [*metrics, *params, *tags]
            if len(everything) == 1:
                self.refused.append(f"{everything[0].key} ({error})")
                return
            self._refuse_deleted()
            for half in (slice(0, len(everything) // 2), slice(len(everything) // 2, None)):
                self._log(metrics=metrics[half], params=params[half], tags=tags[half])

    def _refuse_deleted(self) -> None:
        with told_apart():
            run = self.client.get_run(self.run_id)
        if run.info.lifecycle_stage == "deleted":
            raise RefusedError("the run was deleted there")

    # --- Files -----------------------------------------------------------------------------------

    def _send_files(self, patterns: Sequence[str]) -> None:
        for name, version in files_of(self.folder, patterns):
            if self.shipped.files.get(name) == version:
                continue
            path = self.folder / name
            if path.stat().st_size <= LARGEST_FILE:
                with told_apart():
                    self.client.log_artifact(self.run_id, str(path), os.path.dirname(name) or None)
            self._note(files={**self.shipped.files, name: version})


def _metrics(line: Line, values: dict[str, float]) -> list[Metric]:
    from mlflow.entities import Metric

    moment = _milliseconds(line.time)
    return [Metric(name, value, moment, line.step) for name, value in values.items() if name]


def _non_finite(line: Line) -> list[RunTag]:
    """Return a tag that names what is no finite number: SQL holds the largest in its place."""
    from mlflow.entities import RunTag

    for name, value in line.values.items():
        if not math.isfinite(value):
            return [RunTag("clipkit.first_non_finite", f"{name} {value} at step {line.step}")]
    return []


def _clean(name: str) -> str:
    # What MLflow's databases all take.
    return re.sub(r"[^\w/. -]+", "", name, flags=re.ASCII)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _of_about(number: int, lines: Iterator[Line]) -> Iterator[list[Line]]:
    """Yield lines in lists of at least so many points; the last list has what is left."""
    some: list[Line] = []
    points = 0
    for line in lines:
        some.append(line)
        points += len(line.values)
        if points >= number:
            yield some
            some, points = [], 0
    if some:
        yield some


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
