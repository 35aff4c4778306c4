"""Ctrl-C: saves where the run stands and says how to go on."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from clipkit.tracking import run_folder

FILE = "interrupted.ckpt"


class SaveOnInterrupt(Callback):
    """Writes ``checkpoints/interrupted.ckpt`` when the user stops a fit that has begun."""

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        folder = run_folder(trainer)
        begun = trainer.state.fn == TrainerFn.FITTING and trainer.global_step > 0
        if not isinstance(exception, KeyboardInterrupt) or folder is None or not begun:
            return
        path = folder / "checkpoints" / FILE
        trainer.save_checkpoint(path)
        _say(f"\nstopped at step {trainer.global_step}; saved {path}")
        _say(f"go on with: clipkit fit --ckpt_path {path}")


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)
