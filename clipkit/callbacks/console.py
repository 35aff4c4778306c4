"""What the person sees: what runs, a table after each epoch, and where everything is at the end."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, TQDMProgressBar

from clipkit.callbacks.evaluation import Evaluation
from clipkit.callbacks.last_checkpoint import LastCheckpoint
from clipkit.callbacks.quarantine import Quarantine
from clipkit.module import CLIPModule
from clipkit.tracking import MLflowLogger, callbacks_of, folder_of_run
from clipkit.tracking.chosen import chosen_checkpoint
from clipkit.tracking.metric_names import short

log = logging.getLogger(__name__)

SHOWN = {
    "zeroshot": ("top1", "top5", "mean_class_top1"),
    "retrieval": (
        "text_to_image_r1", "text_to_image_r5", "text_to_image_r10",
        "image_to_text_r1", "image_to_text_r5", "image_to_text_r10",
    ),
    "probe": ("top1", "mean_class_top1"),
    "knn": ("top1", "mean_class_top1"),
}  # fmt: skip


class Bar(TQDMProgressBar):
    """Lightning's bar, counting epochs from one as the lines do."""

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(_epoch(trainer))

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num"}


class Console(Callback):
    """Prints, on rank zero, what belongs to the person and not to a file.

    Args:
        plain: lines instead of a progress bar, for logs and pipes.
        every_n_seconds: at most one line of training progress in this time, when plain.
    """

    def __init__(self, *, plain: bool, every_n_seconds: float = 20.0) -> None:
        self.plain = plain
        self.every_n_seconds = every_n_seconds
        self._began = 0.0
        self._said = 0.0
        self._said_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = self._said = time.monotonic()
        assert isinstance(pl_module, CLIPModule)
        for line in _beginning(trainer, pl_module):
            log.info(line)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for table in _tables(_latest(trainer)):
            log.info(f"before the first step\n{table}")

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        now = time.monotonic()
        if not self.plain or now - self._said < self.every_n_seconds:
            return
        loss = trainer.callback_metrics.get("train/loss")
        if loss is None:
            return
        self._said = now
        total = trainer.num_training_batches
        batch = trainer.fit_loop.batch_idx + 1
        log.info(f"{_epoch(trainer)}  batch {_of(batch, total)}  loss {float(loss):.3f}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.state.fn != "fit":
            _say_evaluated(metrics)
            return
        self._say_losses(_epoch(trainer), metrics, ("train/loss", "val/loss"))
        self._say_measured(trainer)

    def _say_losses(self, where: str, metrics: dict[str, float], names: tuple[str, ...]) -> None:
        minutes, seconds = divmod(round(time.monotonic() - self._began), 60)
        losses = [f"{name} {metrics[name]:.3f}" for name in names if name in metrics]
        log.info("  ".join([f"{where}  {minutes}:{seconds:02d}", *losses]))

    def _say_measured(self, trainer: L.Trainer) -> None:
        """Print what was measured after this very step, once."""
        if self._said_step == trainer.global_step:
            return
        self._said_step = trainer.global_step
        for table in _tables(_latest(trainer, at=trainer.global_step)):
            log.info(table)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        _say_evaluated({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        within = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if self._said_step != trainer.global_step and within < trainer.num_training_batches:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            # Lightning has begun to count the next epoch.
            epoch = _epoch(trainer, trainer.fit_loop.epoch_progress.current.ready)
            where = f"{epoch}, ended at batch {_of(within, trainer.num_training_batches)}"
            self._say_losses(where, metrics, ("train/loss",))
        self._say_measured(trainer)
        for table in _tables(_latest(trainer, when="end")):
            log.info(f"at the end\n{table}")
        for line in _summary(trainer, time.monotonic() - self._began):
            log.info(line)


def _of(batch: int, total: float) -> str:
    """The number of a batch, and how many there are; of a stream nobody knows."""
    return f"{batch}" if math.isinf(total) else f"{batch}/{total}"


def _beginning(trainer: L.Trainer, module: CLIPModule) -> Iterator[str]:
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    share = "" if trained > 0.99 * total else f", {trained / 1e6:.1f} M of them trained"
    device = torch.cuda.get_device_name() if module.device.type == "cuda" else "CPU"
    ranks = f", {trainer.world_size} ranks" if trainer.world_size > 1 else ""
    folder = folder_of_run(trainer)
    if folder is not None:
        yield f"run: {os.path.relpath(folder)}{_going_on(trainer)}"
    yield (
        f"model: {type(module.image_encoder).__name__} + {type(module.text_encoder).__name__}, "
        f"{total / 1e6:.1f} M parameters{share}"
    )
    yield f"tokenizer: {module.tokenizer.name}, {module.tokenizer.vocab_size:,} ids"
    yield f"precision: {trainer.precision} on {device}{ranks}"


def _going_on(trainer: L.Trainer) -> str:
    path = trainer.ckpt_path
    if path is None:
        return ""
    return f", going on from {os.path.basename(str(path))}"


def _summary(trainer: L.Trainer, seconds: float) -> Iterator[str]:
    folder = folder_of_run(trainer)
    if folder is None:
        return
    checkpoint = _checkpoint(trainer)
    where = [logger.where for logger in trainer.loggers if isinstance(logger, MLflowLogger)]
    minutes, rest = divmod(round(seconds), 60)
    yield f"\ndone in {minutes}:{rest:02d} after {trainer.global_step} steps"
    yield f"  run         {os.path.relpath(folder)}"
    if checkpoint:
        yield f"  checkpoint  {os.path.relpath(checkpoint)}"
    for callback in callbacks_of(trainer):
        if isinstance(callback, Quarantine) and (replaced := callback.describe()):
            yield f"  broken      {replaced}"
    for line in where:
        yield f"  compare     {line}"
    if checkpoint:
        yield f"  next        clipkit validate --ckpt_path {os.path.relpath(checkpoint)}"


def _checkpoint(trainer: L.Trainer) -> str:
    """Return the checkpoint chosen on validation, else the last."""
    last = [
        str(c.path or "") if isinstance(c, LastCheckpoint) else getattr(c, "last_model_path", "")
        for c in trainer.checkpoint_callbacks
    ]
    return chosen_checkpoint(trainer) or next(filter(None, last), "")


def _latest(trainer: L.Trainer, when: str = "epoch", *, at: int | None = None) -> dict[str, float]:
    """Return what the evaluations measured last, or at this step."""
    found: dict[str, float] = {}
    for callback in callbacks_of(trainer):
        if isinstance(callback, Evaluation) and at in (None, callback.evaluated_at(when)):
            found |= callback.latest(when)
    return found


def _tables(metrics: dict[str, float]) -> Iterator[str]:
    """Yield one table a kind of evaluation: a row a data set, values in per cent."""
    for kind, measures in SHOWN.items():
        sets = sorted({name.split("/")[1] for name in metrics if name.startswith(f"{kind}/")})
        shown = [m for m in measures if any(f"{kind}/{s}/{m}" in metrics for s in sets)]
        if not shown:
            continue
        header = [kind, *map(short, shown)]
        rows = [
            [name, *(_cell(metrics, f"{kind}/{name}/{measure}") for measure in shown)]
            for name in sets
        ]
        yield _aligned([header, *rows])


def _cell(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return "-"
    text = f"{100 * metrics[name]:.1f}"
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    # The 95 % interval; near 0 and 100 it is not symmetric.
    return text if low is None or high is None else f"{text} ({100 * low:.1f}-{100 * high:.1f})"


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: list[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join(["", row[0].ljust(widths[0]), *numbers])

    return "\n".join(map(line, rows))


def _say_evaluated(metrics: dict[str, float]) -> None:
    """Print the tables, then every metric with all its digits."""
    for table in _tables(metrics):
        log.info(f"{table}\n")
    width = max(map(len, metrics), default=0)
    log.info("\n".join(f"{name:{width}}  {metrics[name]!r}" for name in sorted(metrics)))


def _epoch(trainer: L.Trainer, number: int | None = None) -> str:
    """Name an epoch, counted from one; the present one, if none is given."""
    total = f"/{trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
    return f"epoch {number or trainer.current_epoch + 1}{total}"
