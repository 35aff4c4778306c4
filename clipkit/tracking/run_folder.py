"""The folder of a run, chosen once by rank zero.

config.yaml, metrics.jsonl, checkpoints/, outcomes/, and status.json, which says whether the run
has come to its end and what it chose.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from clipkit.errors import UserError
from clipkit.tracking.chosen import chosen
from clipkit.tracking.config import commit, flatten, versions
from clipkit.tracking.folder_runs import STATUS_FILE
from clipkit.tracking.journal import Journal
from clipkit.tracking.logger import MLflowLogger


class RunFolder(Callback):
    """Chooses ``<root>/<experiment>/<run>`` when fit begins, and tells the loggers of the run.

    Args:
        experiment: name of the experiment.
        run_name: name of the run; where it is taken, -2, -3 and so on are appended.
        configuration: what built the run.
        config_yaml: the same as the text that is kept.
        group: tag that runs of one sweep share.
        root: where experiments are kept.
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
    ) -> None:
        self.experiment = experiment
        self.run_name = run_name
        self.configuration = configuration
        self.config_yaml = config_yaml
        self.group = group
        self.root = Path(root)
        self.path: Path | None = None
        # The folder may be deleted and its name be taken anew: this tells the two runs apart.
        self.id = uuid4().hex

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.path is not None:
            return
        made: str | UserError | None = None
        if trainer.is_global_zero:
            try:
                made = str(self._make())
            except UserError as error:
                made = error
        # The error travels too: a rank left waiting for a name would hang.
        made = trainer.strategy.broadcast(made)
        if isinstance(made, UserError):
            raise made
        self.path = Path(str(made))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.path / "checkpoints")
        if trainer.is_global_zero:
            self._say(status="unfinished")
            self._tell_loggers(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # An interrupted or failed fit does not come here.
        if self.path is not None and trainer.is_global_zero:
            taken = chosen(trainer)
            self._say(status="finished", steps=trainer.global_step, chosen=taken)
            if taken is not None and taken["step"] is not None:
                for logger in trainer.loggers:
                    if isinstance(logger, MLflowLogger):
                        logger.tag("clipkit.chosen_step", str(taken["step"]))

    def _say(self, **status: Any) -> None:
        assert self.path is not None
        text = json.dumps({"id": self.id, **status}, indent=2) + "\n"
        (self.path / STATUS_FILE).write_text(text, encoding="utf-8")

    def _make(self) -> Path:
        parent = self.root / self.experiment
        number = 1
        while True:
            name = self.run_name if number == 1 else f"{self.run_name}-{number}"
            path = parent / name
            try:
                path.mkdir(parents=True, exist_ok=False)
                (path / "config.yaml").write_text(self.config_yaml, encoding="utf-8")
                return path.resolve()
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

    def _tell_loggers(self, trainer: L.Trainer) -> None:
        assert self.path is not None
        params = flatten(self.configuration)
        tags = {
            "clipkit.recipe": self.experiment,
            "clipkit.run_folder": str(self.path),
            "clipkit.id": self.id,
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
        for logger in trainer.loggers:
            if isinstance(logger, Journal):
                logger.open(self.path)
            elif isinstance(logger, MLflowLogger):
                logger.begin(
                    experiment=self.experiment, run_name=self.path.name, params=params, tags=tags
                )
                logger.keep(self.path / "config.yaml")
            else:
                logger.log_hyperparams(params)


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
