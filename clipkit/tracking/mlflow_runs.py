"""Runs read from MLflow: sqlite in the working folder unless told otherwise."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipkit.errors import UserError
from clipkit.tracking.folder_runs import outcome_file
from clipkit.tracking.run_record import read_status
from clipkit.tracking.runs import Point, Run, Which
from clipkit.tracking.tracking_uri import (
    DEFAULT_URI,
    quieten,
    refuse_unreachable,
    refuse_unusable,
)

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.entities import Run as Recorded
    from mlflow.tracking import MlflowClient

_PAGE = 1000
_LARGEST = 1.797e308
_NOT_ENVIRONMENT = tuple(
    f"clipkit.{n}" for n in ("run_folder", "recipe", "id", "chosen_step", "host")
)


class Store:
    """An MLflow tracking store, asked only where something has to be found in it.

    Args:
        uri: ``sqlite:///FILE`` or ``http(s)://HOST``; left out, MLFLOW_TRACKING_URI, else
            ``sqlite:///mlflow.db``.

    As a context manager it takes what it downloaded away again.
    """

    def __init__(self, uri: str | None = None) -> None:
        self._given = uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.option = "--tracking_uri" if uri or not self._given else "MLFLOW_TRACKING_URI"

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    @cached_property
    def uri(self) -> str:
        return self._given or DEFAULT_URI

    @cached_property
    def is_there(self) -> bool:
        """Whether there is a store at all: a missing sqlite file is not made by asking."""
        file = self.uri.removeprefix("sqlite:///")
        return file == self.uri or Path(file).is_file()

    @property
    def folder(self) -> Path:
        """Where artifacts are downloaded to."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="clipkit-compare-")
        return Path(self._folder.name)

    @cached_property
    def client(self) -> MlflowClient:
        refuse_unusable(self.uri, self.option)
        refuse_unreachable(self.uri, self.option)
        quieten()
        from mlflow.tracking import MlflowClient

        with self._one_line():
            return MlflowClient(self.uri)

    @cached_property
    def experiments(self) -> dict[str, Experiment]:
        """The experiments that are not deleted, by their names."""
        if not self.is_there:
            return {}
        client = self.client
        with self._one_line():
            found = _pages(
                lambda token: client.search_experiments(max_results=_PAGE, page_token=token)
            )
        return {experiment.name: experiment for experiment in found}

    def runs(self, experiment: str) -> list[Run]:
        """Return the runs of an experiment, oldest first."""
        found = self._search([self.experiments[experiment].experiment_id])
        found.sort(key=lambda run: (run.info.start_time, run.info.run_name or ""))
        return [MLflowRun(self, run, experiment) for run in found]

    def find(self, what: str) -> list[Run]:
        """Return the runs of this id or name, in any experiment."""
        names = {experiment.experiment_id: name for name, experiment in self.experiments.items()}
        found: list[Recorded] = []
        if names and "'" not in what:
            found = self._search([*names], f"attributes.run_name = '{what}'")
        if not found and names and len(what) == 32 and what.isalnum():
            found = self._search([*names], f"attributes.run_id = '{what}'")
        return [MLflowRun(self, run, names[run.info.experiment_id]) for run in found]

    def _search(self, ids: list[str], where: str = "") -> list[Recorded]:
        client = self.client
        with self._one_line():
            return _pages(
                lambda token: client.search_runs(ids, where, max_results=_PAGE, page_token=token)
            )

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            sentence = str(error).partition("\n")[0].strip().rstrip(".")
            raise UserError(f"{self.option}: {self.uri}: MLflow says: {sentence}") from error


class MLflowRun(Run):
    """A run as MLflow holds it."""

    def __init__(self, store: Store, run: Recorded, experiment: str) -> None:
        self._store = store
        self.id: str = run.info.run_id
        self.began = (run.info.start_time or 0) / 1000
        self.name = run.info.run_name or self.id
        self.experiment = experiment
        self.where = f"{experiment}/{self.name}"
        self.status = str(run.info.status).lower()
        self.params = dict(run.data.params)
        self.latest = {name: _value(value) for name, value in run.data.metrics.items()}
        tags = run.data.tags
        self.identity = tags.get("clipkit.id", self.id)
        folder = Path(tags.get("clipkit.run_folder", ""))
        # Another run may have taken the name since.
        self.folder = folder if read_status(folder).get("id") == self.identity else None
        step = tags.get("clipkit.chosen_step", "")
        self._chosen_step = int(step) if step.isdecimal() else None
        self.environment = {
            key.removeprefix("clipkit.").removeprefix("version."): value
            for key, value in tags.items()
            if key.startswith("clipkit.") and key not in _NOT_ENVIRONMENT
        }
        if "mlflow.source.git.commit" in tags:
            self.environment["commit"] = tags["mlflow.source.git.commit"]
        self._histories: dict[str, list[Point]] = {}

    def history(self, metric: str) -> list[Point]:
        if metric not in self.latest:
            return []
        if metric not in self._histories:
            with self._store._one_line():
                points = self._store.client.get_metric_history(self.id, metric)
            points = sorted(points, key=lambda point: (point.timestamp, point.step))
            self._histories[metric] = [
                Point(
                    point.step, max(0.0, point.timestamp / 1000 - self.began), _value(point.value)
                )
                for point in points
            ]
        return self._histories[metric]

    @property
    def chosen_step(self) -> int | None:
        return self._chosen_step if self.status == "finished" else self._step_of_best()

    def outcome_file(self, evaluation: str, which: Which) -> Path | None:
        # The run's own folder is the same and nearer.
        beside = outcome_file(self.folder, evaluation, which) if self.folder else None
        if beside is not None:
            return beside
        name = f"{evaluation.replace('/', '-')}-{which}.parquet"
        for path in self._artifacts:
            if path.rpartition("/")[2] == name:
                return self._download(path)
        return None

    def examples_file(self, evaluation: str, which: Which) -> Path | None:
        beside = super().examples_file(evaluation, which)
        name = f"{evaluation.replace('/', '-')}-{which}-examples.json"
        paths = [path for path in self._artifacts if path.rpartition("/")[2] == name]
        return beside or (self._download(paths[0]) if paths else None)

    @cached_property
    def _artifacts(self) -> list[str]:
        client = self._store.client
        with self._store._one_line():
            top = client.list_artifacts(self.id)
            paths = [item.path for item in top if not item.is_dir]
            if any(item.is_dir and item.path == "outcomes" for item in top):
                paths += [item.path for item in client.list_artifacts(self.id, "outcomes")]
        return paths

    def _download(self, path: str) -> Path:
        folder = self._store.folder / self.id
        if (folder / path).is_file():
            return folder / path
        folder.mkdir(exist_ok=True)
        with self._store._one_line():
            return Path(self._store.client.download_artifacts(self.id, path, str(folder)))


def _value(stored: float) -> float:
    """Return a metric as it was logged: MLflow keeps the largest number in place of infinity."""
    return math.copysign(math.inf, stored) if abs(stored) >= _LARGEST else stored


def _pages(ask: Any) -> list[Any]:
    found: list[Any] = []
    token: str | None = None
    while True:
        page = ask(token)
        found += page
        token = page.token
        if not token:
            return found
