"""The checkpoint that a run chose by a metric, as its checkpoint callback knows it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Container, Iterator
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


def chooses_by(trainer: L.Trainer, names: Container[str]) -> bool:
    """Whether a checkpoint callback chooses by one of these metrics."""
    return any(True for _ in _choosing_by(trainer, names))


def saves_after_step(trainer: L.Trainer, names: Container[str]) -> bool:
    """Whether a checkpoint callback will choose by one of these metrics after this very step."""
    step = trainer.global_step
    return any(
        callback._every_n_train_steps > 0 and step % callback._every_n_train_steps == 0
        for callback in _choosing_by(trainer, names)
    )


def _choosing_by(trainer: L.Trainer, names: Container[str]) -> Iterator[ModelCheckpoint]:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor in names:
            yield callback


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
    score = best_score(trainer)
    return {
        "monitor": callback.monitor,
        "score": score if score is not None and math.isfinite(score) else None,
        "checkpoint": Path(callback.best_model_path).name,
        "step": _step_of(callback.best_model_path),
    }


def _step_of(path: str) -> int | None:
    """Return the step at which a checkpoint was written, which nothing but the file says."""
    try:
        held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return int(held["global_step"])
    except Exception as error:  # a user's callback may have put anything into it
        reason = str(error).partition("\n")[0]
        warnings.warn(f"{path}: the step of this checkpoint is not known ({reason})", stacklevel=2)
        return None
