"""When an evaluation runs in training: by epochs, steps or pairs seen, in a share of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import lightning as L

from clipkit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often to evaluate; before the first step and at the end is always.

    Args:
        every_n_epochs: after every n-th epoch; left out, every epoch, but where one of the others
            is given.
        every_n_steps: after every n-th optimiser step.
        every_n_samples: each time so many further pairs were seen.
        max_time_ratio: leave an evaluation out where all of them together would take more than
            this share of the training's time.
    """

    every_n_epochs: int | None = None
    every_n_steps: int | None = None
    every_n_samples: int | None = None
    max_time_ratio: float | None = None

    def __post_init__(self) -> None:
        for name in ("every_n_epochs", "every_n_steps", "every_n_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} is less than 1")
        if self.max_time_ratio is not None and not 0 < self.max_time_ratio <= 1:
            raise UserError(f"max_time_ratio: {self.max_time_ratio} is not in (0, 1]")

    @property
    def within_epochs(self) -> bool:
        """Whether evaluations may fall inside an epoch."""
        return self.every_n_steps is not None or self.every_n_samples is not None


class Clock:
    """Decides when an evaluation is due, and keeps to the share of time."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.spent = 0.0
        self._began = time.monotonic()
        self._last = 0.0
        self._step = 0

    def start(self, step: int) -> None:
        """Begin to count, at the step a fit begins or is resumed at."""
        self.spent, self._last, self._step = 0.0, 0.0, step
        self._began = time.monotonic()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of an evaluation."""
        began = time.monotonic()
        yield
        self._last = time.monotonic() - began
        self.spent += self._last

    def due_after_epoch(self, trainer: L.Trainer) -> bool:
        """Whether to evaluate at the end of this epoch."""
        epoch = trainer.current_epoch + 1
        if epoch == trainer.max_epochs:
            return True
        every = self.schedule.every_n_epochs or (None if self.schedule.within_epochs else 1)
        return every is not None and epoch % every == 0 and self._affordable(trainer)

    def due_after_step(self, trainer: L.Trainer, batch_size: int) -> bool:
        """Whether to evaluate after this step; asked once a step."""
        before, now = self._step, trainer.global_step
        self._step = now
        due = any(
            every is not None and now * unit // every > before * unit // every
            for every, unit in (
                (self.schedule.every_n_steps, 1),
                (self.schedule.every_n_samples, batch_size),
            )
        )
        return due and self._affordable(trainer)

    def _affordable(self, trainer: L.Trainer) -> bool:
        ratio = self.schedule.max_time_ratio
        if ratio is None:
            return True
        passed = time.monotonic() - self._began
        # Clocks differ between ranks, and all of them have to evaluate together.
        return bool(trainer.strategy.broadcast(self.spent + self._last <= ratio * passed))
