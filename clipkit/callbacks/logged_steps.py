"""After which batches the loggers take metrics."""

from __future__ import annotations

import lightning as L


class LoggedSteps:
    """Tells, asked once after each batch, whether a step was made that is logged."""

    def __init__(self) -> None:
        self._step = 0

    def start(self, trainer: L.Trainer) -> None:
        """Begin where training begins, or goes on."""
        self._step = trainer.global_step

    def reached(self, trainer: L.Trainer) -> bool:
        """Whether the batch has brought about a step that is logged."""
        # While gradients are accumulated no step is made.
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        every = max(trainer.log_every_n_steps, 1)  # type: ignore[attr-defined]
        return bool(stepped and trainer.global_step % every == 0)
