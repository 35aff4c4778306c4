"""MLflow as a Lightning logger: the run folder is the run, and MLflow gets a copy of it."""

from __future__ import annotations

import logging
import os
import shlex
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from clipkit.errors import UserError
from clipkit.tracking import recording
from clipkit.tracking.config import flatten, origin, versions
from clipkit.tracking.recording import Recording
from clipkit.tracking.shipped import is_complete, left, read_shipped
from clipkit.tracking.shipper import Shipper
from clipkit.tracking.tracking_uri import (
    given_or_default,
    is_default,
    is_server,
    refuse_unusable,
    without_password,
)

log = logging.getLogger(__name__)


class MLflowLogger(Logger):
    """Metrics, parameters, tags and files of a run in MLflow, which training never waits for.

    What is logged goes to the run folder; a process beside the training sends it on. If MLflow
    cannot be reached, training goes on, and ``clipkit sync RUN`` sends what is left.

    Args:
        tracking_uri: where MLflow keeps its runs: ``sqlite:///FILE`` or ``http(s)://HOST``. Left
            out: the environment's MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.
        experiment_name: left out, the name of the recipe.
        run_name: left out, what the command changed about the recipe.
        tags: further tags of the run.
        artifact_location: where a new experiment keeps its files; left out, what MLflow chooses.
        wait_at_end: seconds to wait at the most, when all is done, for what is not sent yet.
    """

    def __init__(
        self,
        *,
        tracking_uri: str | None = None,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        artifact_location: str | None = None,
        wait_at_end: float = 30.0,
    ) -> None:
        super().__init__()
        if wait_at_end < 0:
            raise UserError(f"trainer.logger.wait_at_end: {wait_at_end} is less than 0 seconds")
        # Read here and not in a default, which Python would fix when the module is imported.
        self.tracking_uri = given_or_default(tracking_uri)
        refuse_unusable(self.tracking_uri)
        self.experiment_name = experiment_name
        self.run_name = run_name
        self.tags = tags or {}
        self.artifact_location = artifact_location
        self.wait_at_end = wait_at_end
        self._recording: Recording | None = None
        self._shipper: Shipper | None = None
        self._is_alone = False

    @property
    def name(self) -> str:
        return self.experiment_name or "clipkit"

    @property
    def version(self) -> str:
        return self.run_name or "run"

    @rank_zero_only
    def begin(self, run: Recording) -> None:
        """Send this run from now on, under the names it has unless the constructor had others."""
        self._recording = run
        run.describe(
            tags=self.tags,
            experiment=self.experiment_name,
            run_name=self.run_name,
            tracking_uri=self.tracking_uri,
            artifact_location=self.artifact_location,
        )
        self._shipper = Shipper(run.path, self.tracking_uri, self.wait_at_end)
        self._shipper.start()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        # What the run's journal is given too stands there once; what a callback of the user's logs
        # here alone stands there all the same.
        self._run().journal.append(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        if self._recording is None:
            plain = vars(params) if isinstance(params, Namespace) else params
            self._run({key: str(value) for key, value in flatten(plain).items()})

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._recording is None or self._shipper is None:
            return
        if self._is_alone:
            self._recording.end("finished" if status == "success" else "failed")
            self._recording.close()
        self._shipper.finish()
        self._say_left(self._recording.path)

    def _run(self, params: dict[str, str] | None = None) -> Recording:
        """Return the run; a trainer without a run folder gets one here."""
        if self._recording is None:
            text = yaml.safe_dump(params or {}, sort_keys=False, allow_unicode=True)
            self._is_alone = True
            run = recording.begin(Path("runs"), self.name, self.version, text)
            run.describe(tags={**origin(), **{f"clipkit.{k}": v for k, v in versions().items()}})
            self.begin(run)
        assert self._recording is not None
        return self._recording

    def _say_left(self, folder: Path) -> None:
        shipped = read_shipped(folder, self.tracking_uri)
        if is_complete(folder, shipped):
            return
        points = left(folder, shipped)
        where = os.path.relpath(folder) + "".join(
            f" {option} {shlex.quote(without_password(value))}"
            for option, value in (
                ("--tracking_uri", None if is_default(self.tracking_uri) else self.tracking_uri),
                ("--artifact_location", self.artifact_location),
            )
            if value is not None
        )
        log.warning(
            "warning: MLflow has not %s of the run; they are sent by: clipkit sync %s",
            f"the last {points:,} points" if points else "the last files", where,
        )  # fmt: skip

    @property
    def where(self) -> str:
        """Return the command or address that shows the run."""
        if not is_server(self.tracking_uri):
            return f"mlflow ui --backend-store-uri {without_password(self.tracking_uri)}"
        uri = without_password(self.tracking_uri).rstrip("/")
        if self._recording is None:
            return uri
        shipped = read_shipped(self._recording.path, self.tracking_uri)
        if shipped.run_id is None:  # it has not been made there yet
            return uri
        return f"{uri}/#/experiments/{shipped.experiment_id}/runs/{shipped.run_id}"
