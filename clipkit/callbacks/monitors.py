"""Refuses, before training, a monitored metric that nothing produces or that was chosen on test."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.callbacks import Callback

from clipkit.callbacks.evaluation import Evaluation
from clipkit.errors import UserError, did_you_mean
from clipkit.module import CLIPModule
from clipkit.suite import EvalData
from clipkit.tracking import callbacks_of


class CheckMonitors(Callback):
    """Looks at every callback with a ``monitor`` when fit begins."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        assert isinstance(pl_module, CLIPModule)
        callbacks = callbacks_of(trainer)
        evaluated: dict[str, EvalData] = {}
        for callback in callbacks:
            if isinstance(callback, Evaluation):
                evaluated |= callback.metric_names()
        known = {*evaluated, *pl_module.metric_names(), "train/loss"}
        # A user's own callback may log whatever it likes: then nothing can be said here.
        foreign = any(
            not type(c).__module__.startswith(("clipkit", "lightning")) for c in callbacks
        )
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None)
            if monitor is None:
                continue
            if monitor not in known and not foreign:
                raise UserError(_unknown(type(callback).__name__, monitor, sorted(known)))
            _refuse_test(type(callback).__name__, monitor, evaluated)


def _unknown(callback: str, monitor: str, known: list[str]) -> str:
    hint = did_you_mean(monitor, known)
    return f"{callback}.monitor: nothing logs {monitor!r}; {hint}there are {', '.join(known)}"


def _refuse_test(callback: str, monitor: str, evaluated: dict[str, EvalData]) -> None:
    data = evaluated.get(monitor)
    if data is not None and (data.when == "end" or data.split == "test"):
        raise UserError(
            f"{callback}.monitor: {monitor} is measured on split {data.split!r} "
            f"(when: {data.when}); choose on validation, so that what is reported on test has "
            "chosen nothing"
        )
