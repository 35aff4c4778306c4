"""The checkpoint that a run chose by a metric, as its checkpoint callback knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


def chooser(trainer: L.Trainer) -> ModelCheckpoint | None:
    """Return the checkpoint callback that chooses by a monitored metric, if there is one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback
    return None


def chosen_checkpoint(trainer: L.Trainer) -> str:
    """Return the file that holds the best weights so far, or ''."""
    callback = chooser(trainer)
    return "" if callback is None else callback.best_model_path


def best_score(trainer: L.Trainer) -> float | None:
    """Return the best value of the monitored metric so far."""
    callback = chooser(trainer)
    score = None if callback is None else callback.best_model_score
    return None if score is None else float(score)


def saved_step(trainer: L.Trainer) -> int | None:
    """Return the step whose weights the chooser saved last."""
    callback = chooser(trainer)
    return None if callback is None else callback._last_global_step_saved


def chosen(trainer: L.Trainer) -> dict[str, Any] | None:
    """Return what was chosen, by what: monitor, score, checkpoint and the steps made by then."""
    callback = chooser(trainer)
    if callback is None or not Path(callback.best_model_path).is_file():
        return None
    # Nothing but the file says at which step it was written; its tensors are not read.
    held = torch.load(callback.best_model_path, map_location="cpu", mmap=True, weights_only=True)
    return {
        "monitor": callback.monitor,
        "score": best_score(trainer),
        "checkpoint": Path(callback.best_model_path).name,
        "step": int(held["global_step"]),
    }
