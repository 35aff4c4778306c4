"""Ctrl-C: saves where the run stands and says how to go on."""

from __future__ import annotations

import logging
import os

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from clipkit.tracking import folder_of_run

FILE = "interrupted.ckpt"

log = logging.getLogger(__name__)


class SaveOnInterrupt(Callback):
    """Writes ``checkpoints/interrupted.ckpt`` when the user stops a fit that has begun."""

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        folder = folder_of_run(trainer)
        begun = trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0
        if not isinstance(exception, KeyboardInterrupt) or folder is None:
            return
        if not begun:
            log.info("stopped before the first step; there is nothing to go on from")
            return
        path = os.path.relpath(folder / "checkpoints" / FILE)
        trainer.save_checkpoint(path)
        log.info("stopped at step %d; saved %s", trainer.global_step, path)
        log.info("go on with: clipkit fit --ckpt_path %s", path)
        log.info("(what is left of this epoch is then trained on the epoch's first rows again)")
