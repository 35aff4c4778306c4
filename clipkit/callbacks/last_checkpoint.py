"""Checkpoints to go on from: the last one and the one before it, each whole."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from clipkit.errors import UserError
from clipkit.resume import epochs_done
from clipkit.saving import BEFORE_LAST, LAST, NotSavedError, damage
from clipkit.tracking import folder_of_run

_NEXT = "next.ckpt"
_ASKED_EVERY = 10  # steps: all ranks have to agree on the time, which makes them wait

log = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Writes ``checkpoints/last.ckpt`` of the run folder and keeps the one before it.

    A step is saved once what it logged is written, so that a run that is killed and goes on from it
    has neither a gap nor a point twice. A disk that is full does not end a run that has a
    checkpoint: it is said, and tried again the next time.

    Args:
        every_n_epochs: after every n-th epoch; null for never.
        every_n_steps: after every n-th optimiser step.
        every_n_minutes: where so many minutes have passed since the last one.
    """

    def __init__(
        self,
        *,
        every_n_epochs: int | None = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = 15.0,
    ) -> None:
        given = {
            "every_n_epochs": every_n_epochs,
            "every_n_steps": every_n_steps,
            "every_n_minutes": every_n_minutes,
        }
        for name, value in given.items():
            if value is not None and value <= 0:
                raise UserError(f"LastCheckpoint.{name}: {value} is not above 0")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self._folder: Path | None = None
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._whole: Path | None = None

    @property
    def path(self) -> Path | None:
        """The newest checkpoint that is whole, where there is one."""
        return self._whole

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = folder_of_run(trainer) or Path(trainer.default_root_dir)
        self._folder = folder / "checkpoints"
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        there = (self._folder / name for name in (LAST, BEFORE_LAST))
        self._whole = next((path for path in there if damage(path) is None), None)

    # The start of a batch is the first moment at which all that the one before it brought about
    # (metrics, validation, the end of an epoch) is done and written.
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._saved_step and self._is_due(trainer, batch_idx):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > self._saved_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the last checkpoint now.

        Raises:
            NotSavedError: it cannot be written; the ones that are there stay.
        """
        assert self._folder is not None
        written = self._folder / _NEXT
        trainer.save_checkpoint(written)
        last = self._folder / LAST
        if trainer.is_global_zero:
            if self._whole == last:
                _keep(last, last.with_name(BEFORE_LAST))
            os.replace(written, last)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        self._whole = last

    def _save(self, trainer: L.Trainer) -> None:
        try:
            self.save(trainer)
        except NotSavedError as error:
            if self._whole is None:
                raise
            log.warning(
                "warning: %s; training goes on, and %s of step %d is kept",
                error.sentence, self._whole.name, self._saved_step,
            )  # fmt: skip
            self._saved_at = time.monotonic()

    def _is_due(self, trainer: L.Trainer, batch_idx: int) -> bool:
        step, epoch = trainer.global_step, epochs_done(trainer)
        if batch_idx == 0 and self.every_n_epochs is not None and epoch % self.every_n_epochs == 0:
            return True
        # Where gradients are added up, some batches begin between two steps.
        if batch_idx % trainer.accumulate_grad_batches:
            return False
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            return True
        if self.every_n_minutes is None or (trainer.world_size > 1 and step % _ASKED_EVERY):
            return False
        passed = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        return bool(trainer.strategy.broadcast(passed)) if trainer.world_size > 1 else passed


def _keep(checkpoint: Path, as_file: Path) -> None:
    """Give a file a second name, which another file had."""
    beside = as_file.with_name(f".{as_file.name}.part")
    with suppress(OSError):
        beside.unlink(missing_ok=True)
        try:
            os.link(checkpoint, beside)
        except OSError:  # a file system without second names
            beside = checkpoint
        os.replace(beside, as_file)
