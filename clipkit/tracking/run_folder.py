"""The folder of a run, chosen once by rank zero.

config.yaml, metrics.jsonl, checkpoints/, outcomes/, run.json, which says who the run is, and
status.json, which says whether it has come to its end and what it chose.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from clipkit.errors import UserError
from clipkit.tracking import recording
from clipkit.tracking.chosen import chosen
from clipkit.tracking.config import commit, flatten, origin, versions
from clipkit.tracking.journal import Journal
from clipkit.tracking.logger import MLflowLogger
from clipkit.tracking.recording import Recording


class RunFolder(Callback):
    """Chooses ``<root>/<experiment>/<run>`` when fit begins, and tells the loggers of the run.

    An evaluation has a folder where an MLflowLogger was asked for: ``<experiment>-validate`` or
    ``<experiment>-test``, so that it is not taken for another run of the experiment.

    Args:
        experiment: name of the experiment.
        run_name: name of the run; where it is taken, -2, -3 and so on are appended.
        configuration: what built the run.
        config_yaml: the same as the text that is kept.
        group: tag that runs of one sweep share.
        root: where experiments are kept.
        continued: the folder of a run that a fit goes on with, in place of a new one.
    """

    def __init__(
        self,
        *,
        experiment: str,
        run_name: str,
        configuration: dict[str, Any],
        config_yaml: str,
        group: str | None = None,
        root: str = "runs",
        continued: str | Path | None = None,
    ) -> None:
        self.experiment = experiment
        self.run_name = run_name
        self.configuration = configuration
        self.config_yaml = config_yaml
        self.group = group
        self.root = Path(root)
        self.continued = None if continued is None else Path(continued)
        self.path: Path | None = None
        self._recording: Recording | None = None  # on rank zero
        self._stage = "fit"

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        sent = [logger for logger in trainer.loggers if isinstance(logger, MLflowLogger)]
        if self._recording is not None and stage == self._stage:
            self._recording.is_going_on()  # once more by the same trainer
        if self.path is not None or (stage != "fit" and not sent):
            return
        self._stage = TrainerFn(stage).value
        made: str | UserError | None = None
        if trainer.is_global_zero:
            try:
                _refuse_two(sent)
                self._recording = self._record()
                made = str(self._recording.path)
                self._recording.describe(tags=self._tags(trainer))
            except UserError as error:
                made = error
            except OSError as error:
                made = UserError(f"the run folder cannot be written ({error.strerror})")
        # The error travels too: a rank left waiting for a name would hang.
        made = trainer.strategy.broadcast(made)
        if isinstance(made, UserError):
            raise made
        self.path = Path(str(made))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.path / "checkpoints")
        if self._recording is not None:
            self._tell_loggers(trainer, self._recording)

    def on_save_checkpoint(self, *_: Any) -> None:
        # A run that goes on from this checkpoint logs nothing of before.
        if self._recording is not None:
            self._recording.journal.sync()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # An interrupted or failed fit does not come here.
        if self._recording is not None:
            self._recording.end("finished", steps=trainer.global_step, chosen=chosen(trainer))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._recording is not None and stage == self._stage != "fit":
            self._recording.end("finished")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._recording is not None and trainer.state.fn == self._stage:
            stopped = isinstance(exception, KeyboardInterrupt | SystemExit)  # or a signal
            self._recording.end("interrupted" if stopped else "failed")

    def _record(self) -> Recording:
        if self._stage == "fit" and self.continued is not None:
            warnings.filterwarnings("ignore", message="Checkpoint directory .* is not empty")
            return recording.go_on(self.continued, self.config_yaml)
        evaluated = "" if self._stage == "fit" else f"-{self._stage}"
        experiment = self.experiment + evaluated
        return recording.begin(self.root, experiment, self.run_name, self.config_yaml)

    def _tags(self, trainer: L.Trainer) -> dict[str, str]:
        tags = {
            **origin(),
            "clipkit.recipe": self.experiment,
            "clipkit.world_size": str(trainer.world_size),
            **{f"clipkit.{name}": value for name, value in versions().items()},
        }
        if self.group is not None:
            tags["clipkit.group"] = self.group
        revision = commit()
        if revision:
            tags["mlflow.source.git.commit"] = revision
        fingerprint = getattr(trainer.datamodule, "fingerprint", None)  # type: ignore[attr-defined]
        if fingerprint is not None:
            tags["clipkit.data_fingerprint"] = fingerprint()
        return tags

    def _tell_loggers(self, trainer: L.Trainer, run: Recording) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, Journal):
                logger.open(run.journal)
            elif isinstance(logger, MLflowLogger):
                logger.begin(run)
            else:
                logger.log_hyperparams(flatten(self.configuration))


def _refuse_two(loggers: list[MLflowLogger]) -> None:
    if len(loggers) > 1:
        raise UserError(
            f"trainer.logger: {len(loggers)} MLflowLogger, and a run is sent to one place while it "
            "is written; `clipkit sync RUN --tracking_uri URI` copies it to another"
        )


def folder_of_run(trainer: L.Trainer) -> Path | None:
    """Return the folder of the run, None where there is none (validate, hand-made trainers)."""
    for callback in callbacks_of(trainer):
        if isinstance(callback, RunFolder):
            return callback.path
    return None


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, which makes the list where no type is declared."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks
