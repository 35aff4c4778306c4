"""Going on exactly where a run stood: its position, said in one way, and the randomness of a step.

Lightning saves its loops as they stand in whatever hook saves, and guesses from the counters what
is left to do. Here a position is always *between* two batches, and the counters of a checkpoint are
brought to it, so that all checkpoints are gone on with alike.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch


class Position(NamedTuple):
    """Where a run stands: epochs that are done, and batches of the present one."""

    epoch: int
    batches: int


BEGINNING = Position(0, 0)


def position(trainer: L.Trainer) -> Position:
    """Return where training stands, in whatever hook it is asked.

    Batches whose gradients wait for others (``accumulate_grad_batches``) are not done yet: a
    checkpoint holds no gradients.
    """
    epochs: Any = trainer.fit_loop.epoch_progress.current
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed
    if epochs.processed == epochs.started:
        if done == 0 or progress.is_last_batch:
            return Position(epochs.processed, 0)
        # Lightning counts an epoch as done that a number of steps has ended.
        return Position(epochs.processed - 1, done - done % trainer.accumulate_grad_batches)
    if progress.is_last_batch and done == progress.current.ready:
        over = not _awaits_validation(trainer)
        return Position(epochs.processed + 1, 0) if over else Position(epochs.processed, done)
    return Position(epochs.processed, done - done % trainer.accumulate_grad_batches)


def epochs_done(trainer: L.Trainer) -> int:
    """Return the number of epochs whose batches are all done: the present one's, from 0."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return int(epochs.processed)


def _awaits_validation(trainer: L.Trainer) -> bool:
    """Whether the batches that are done are still to be validated, or are just being so."""
    loop: Any = trainer.fit_loop.epoch_loop
    if trainer.validating:
        return not loop.val_loop.batch_progress.is_last_batch or _is_in_hand(loop.val_loop)
    counts = loop.batch_progress.current
    # A batch that was not trained yet may be the last one; its validation is not due.
    trained = counts.processed == counts.ready
    due = trained and _is_in_hand(loop)
    return due and bool(loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def _is_in_hand(loop: Any) -> bool:
    """Whether a batch of a loop has begun and is not done with."""
    counts = loop.batch_progress.current
    return bool(counts.completed < counts.ready)


def settle(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Bring the counters of a checkpoint that is being written to the position of the run."""
    loops = checkpoint["loops"]["fit_loop"]
    at = position(trainer)
    within = at.batches > 0
    to_be_validated = within and _awaits_validation(trainer)
    _set(loops["epoch_progress"], done=at.epoch, begun=at.epoch + within)
    batches = loops["epoch_loop.batch_progress"]
    waiting = batches["current"]["processed"] - at.batches if within else 0
    total = batches["total"]["processed"] - waiting
    _set(batches, done=at.batches, begun=at.batches)
    batches["total"] |= dict.fromkeys(batches["total"], total)
    batches["is_last_batch"] = to_be_validated and batches["is_last_batch"]
    # Lightning validates first when it goes on, where it finds that it was doing so.
    _set(loops["epoch_loop.val_loop.batch_progress"], done=0, begun=int(to_be_validated))
    # The number under which metrics are logged. Lightning counts it after a validation, and where
    # it goes on at one, it counts again.
    again = within and _is_validated_after(trainer, at.batches, total)
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - again


def _is_validated_after(trainer: L.Trainer, batches: int, total: int) -> bool:
    """Whether a validation belongs to these batches of an epoch; so many have there been in all."""
    if not trainer.fit_loop.epoch_loop._should_check_val_epoch():
        return False
    interval = trainer.val_check_batch
    counted = total if trainer.check_val_every_n_epoch is None else batches
    return bool(interval and interval != float("inf") and counted % interval == 0)


def _set(progress: dict[str, Any], *, done: int, begun: int) -> None:
    for counts in (progress["total"], progress["current"]):
        counts |= {"ready": begun, "started": begun, "processed": done, "completed": done}


def seed_step(seed: int, at: Position, rank: int) -> None:
    """Make all randomness of a step (dropout, masks) a function of seed, position and rank."""
    drawn = np.random.SeedSequence((seed, at.epoch, at.batches, rank)).generate_state(4)
    number = int(drawn[0]) << 32 | int(drawn[1])
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:
        # The same, but that torch takes down its caller's stack for a GPU that is not there.
        torch.default_generator.manual_seed(number)
    random.seed(int(drawn[2]))
    np.random.seed(int(drawn[3]))
