"""MLflow as clipkit uses it: sqlite in the working folder unless told otherwise."""

from __future__ import annotations

import logging
import os
import sqlite3
import urllib.error
import urllib.request
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only

from clipkit.errors import UserError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

DEFAULT_URI = "sqlite:///mlflow.db"
_SECONDS_TO_ANSWER = 5.0
_NEVER_ASKED = "http://127.0.0.1"


class MLflowLogger(MLFlowLogger):
    """Metrics, parameters, tags and config.yaml of a run in MLflow.

    Args:
        tracking_uri: where MLflow keeps its runs: ``sqlite:///FILE`` or ``http(s)://HOST``. Left
            out: the environment's MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``.
        experiment_name: left out, the name of the recipe.
        run_name: left out, what the command changed about the recipe.
        tags: further tags of the run.
        artifact_location: where a new experiment keeps its files; left out, what MLflow chooses.
    """

    def __init__(
        self,
        *,
        tracking_uri: str | None = None,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tags: dict[str, str] | None = None,
        artifact_location: str | None = None,
    ) -> None:
        # Read here and not in a default, which Python would fix when the module is imported.
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        refuse_unreachable(uri)
        for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        # Lightning announces "Experiment not found. Creating it." as a warning.
        logging.getLogger("lightning.pytorch.loggers.mlflow").setLevel(logging.ERROR)
        self._named = False
        self.interrupted = False
        # Lightning opens the store at once, on every rank. Ranks that begin together would all make
        # the tables of a new database, and fail; the client of a server opens nothing.
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        super().__init__(
            experiment_name=experiment_name or "",
            run_name=run_name,
            tracking_uri=uri if first else _NEVER_ASKED,
            tags=tags,
            artifact_location=artifact_location,
        )
        self._tracking_uri = uri

    @property
    def experiment(self) -> MlflowClient:
        # Lightning touches this before any callback could name the run: no run begins until then.
        return super().experiment if self._named else self._mlflow_client

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._name("clipkit", "run")
        super().log_metrics(metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        self._name("clipkit", "run")
        super().log_hyperparams(params)

    def finalize(self, status: str = "success") -> None:
        if not self.interrupted:
            super().finalize(status)
            return
        try:
            super().finalize("KILLED")
        except Exception as error:
            # Ctrl-C may have come in the midst of a write, which leaves sqlite locked.
            reason = str(error).strip().partition("\n")[0]
            log.warning("warning: MLflow was not told that the run has ended (%s)", reason)

    def begin(
        self, *, experiment: str, run_name: str, params: dict[str, Any], tags: dict[str, str]
    ) -> None:
        """Start the run under these names, unless the constructor was given others."""
        self._name(experiment, run_name)
        self.tags = {**tags, **(self.tags or {})}
        self.log_hyperparams(params)

    def _name(self, experiment: str, run_name: str) -> None:
        self._experiment_name = self._experiment_name or experiment
        self._run_name = self._run_name or run_name
        self._named = True

    @rank_zero_only
    def keep(self, file: Path, folder: str | None = None) -> None:
        """Store a file with the run, in a folder of its artifacts."""
        self.experiment.log_artifact(self.run_id, str(file), folder)

    @rank_zero_only
    def tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self.experiment.set_tag(str(self.run_id), name, value)

    @property
    def where(self) -> str:
        """Return the command or address that shows the run."""
        if self._tracking_uri.startswith("http"):
            return f"{self._tracking_uri}/#/experiments/{self.experiment_id}/runs/{self.run_id}"
        return f"mlflow ui --backend-store-uri {self._tracking_uri}"


def refuse_unreachable(uri: str, option: str = "trainer.logger.tracking_uri") -> None:
    """Fail within seconds, where MLflow itself would try for four minutes.

    Args:
        uri: as MLflow takes it.
        option: where it was given, for the message.
    """
    instead = f"leave it out for {DEFAULT_URI}"
    if uri == DEFAULT_URI:
        instead = "work in a folder that you may write to, or name a file elsewhere"
    scheme = uri.partition(":")[0]
    if scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SECONDS_TO_ANSWER):
                return
        except urllib.error.HTTPError:
            return  # it answers: a proxy may hide /health, and MLflow will say what it wants
        except (OSError, ValueError) as error:
            raise UserError(
                f"{option}: {uri} cannot be reached ({_reason(error)}); {instead}"
            ) from error
    elif scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        try:
            with sqlite3.connect(path, timeout=_SECONDS_TO_ANSWER) as connection:
                connection.execute("PRAGMA user_version")
            connection.close()
        except sqlite3.Error as error:
            raise UserError(f"{option}: {uri} cannot be opened ({error}); {instead}") from error
    elif scheme in ("file", uri):
        raise UserError(
            f"{option}: {uri} is a file store, which MLflow has given up; "
            f"use sqlite:///FILE, or {instead}"
        )


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", "") or error)
