"""The command: builds what `fit` would run, twice, and trains a little of it."""

from __future__ import annotations

import logging
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from clipkit import building
from clipkit import checkpoint as checkpoints
from clipkit.building import ClipkitCLI
from clipkit.callbacks.evaluation import Evaluation
from clipkit.callbacks.monitors import CheckMonitors
from clipkit.check import page
from clipkit.check.gradients import Comparison, OneStep
from clipkit.check.speed import SECONDS, Stretch
from clipkit.data.sizes import SizeSchedule
from clipkit.errors import UserError
from clipkit.tracking import callbacks_of

# What writes, evaluates, or holds the end of a fit back.
_LEFT_OUT: dict[str, Any] = {
    "logger": False,
    "profiler": None,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
    "min_epochs": None,
    "min_steps": None,
}


FAILED = 70
"""Exit code of a check that could not be made, for no fault of the user's."""

_FOR_GRADIENTS: dict[str, Any] = {
    "precision": "64-true",
    "accumulate_grad_batches": 1,
    "accelerator": "cpu",
}


def run(words: Sequence[str], *, trust: Sequence[str] = ()) -> int:
    """Run the command; returns 0 where the gradients agree, 1 where they differ."""
    try:
        return building.run(["fit", *words], trust=trust, command=Check)
    except UserError:
        raise
    except Exception:
        # Python's own exit code, 1, would say that gradients differ.
        traceback.print_exc()
        return FAILED


class Check(ClipkitCLI):
    """Takes the words of `fit`; trains one step in float64, then a stretch of the run as it is."""

    steps_done = 0

    def before_instantiate_classes(self) -> None:
        trainer = self._section()["trainer"]
        for name, value in _LEFT_OUT.items():
            trainer[name] = value
        self._own = {name: trainer[name] for name in _FOR_GRADIENTS}
        for name, value in _FOR_GRADIENTS.items():
            trainer[name] = value
        # Apple's graphics know no float64.
        if not torch.backends.mps.is_available():
            trainer["accelerator"] = self._own["accelerator"]

    def instantiate_classes(self) -> None:
        super().instantiate_classes()
        source = self._section().get("ckpt_path")
        if source:
            checkpoint = checkpoints.read(source)
            checkpoints.load_weights(self.model, checkpoint["state_dict"], source)
            _, self.steps_done = checkpoints.trained(checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        trainer.loggers = []
        self._callbacks_of_fit = callbacks_of(trainer)
        trainer.callbacks = []  # type: ignore[attr-defined]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        _refuse_strategy(self.trainer)
        launcher = self.trainer.strategy.launcher
        try:
            self._check()
        except BaseException as error:
            if isinstance(error, SystemExit) and self.trainer.is_global_zero:
                print("\nstopped; nothing was written", flush=True)
            # The second fit's launcher knows nothing of the ranks that the first one started.
            if isinstance(launcher, _SubprocessScriptLauncher):
                launcher.kill(getattr(signal, "SIGKILL", signal.SIGTERM))
                for process in launcher.procs:
                    process.wait()
            raise

    def _check(self) -> None:
        first, data = self.trainer.is_global_zero, self.datamodule
        if first:
            caches = " but the caches that are asked for" if data.caches else ""
            print(
                f"checking: gradients, then {SECONDS:.0f} s of training; nothing is written{caches}"
            )
        step, stretch = OneStep(), Stretch()
        self._fit(AsFitRefuses(self._callbacks_of_fit), step)
        data.batch_size = step.own_batch_size
        self._build_as_it_is()
        self.datamodule = data
        self._only_the_largest_pictures()
        comparison = step.comparison
        if first:
            assert comparison is not None
            self._say_gradients(comparison)
        if not self.trainer.strategy.broadcast(comparison is None or comparison.agrees):
            return
        self._fit(stretch)
        if first:
            self._say_rest(stretch)

    def _only_the_largest_pictures(self) -> None:
        """Train the stretch on what takes most time and memory.

        Small pictures, which come first, would say nothing of the epochs after them.
        """
        data = self.datamodule
        if not data.image_sizes.sizes:
            return
        epochs = self.trainer.max_epochs
        largest = data.image_sizes.largest(
            full=self.model.image_encoder.image_size,
            epochs=epochs if epochs is not None and epochs > 0 else None,
        )
        data.image_sizes = SizeSchedule({0: largest})

    def _fit(self, *callbacks: Callback) -> None:
        self.trainer.callbacks = [*callbacks]  # type: ignore[attr-defined]
        self.before_fit()
        with _silent(logging.WARNING):
            self.trainer.fit(self.model, datamodule=self.datamodule)
        if self.trainer.global_step == 0:
            raise UserError(
                "trainer.limit_train_batches, trainer.max_steps or trainer.max_epochs: the run "
                "makes no step, and there is nothing to check"
            )

    def _build_as_it_is(self) -> None:
        """Build module and trainer once more, in the run's own precision."""
        trainer = self._section()["trainer"]
        for name, value in self._own.items():
            trainer[name] = value
        self._set_seed()
        with _silent(logging.ERROR):  # what there is to warn of was said
            self.instantiate_classes()

    def _say_gradients(self, found: Comparison) -> None:
        rows = page.run_rows(self.trainer, self.model, self.datamodule, self._own["precision"])
        page.say("run", rows)
        ranks = self.trainer.world_size
        page.say("gradients", page.gradient_rows(found, self.model, ranks))
        if not found.agrees:
            self.exit_code = 1
            print("\nnot to be trained as it is; speed and memory were not measured")

    def _say_rest(self, found: Stretch) -> None:
        assert found.speed is not None
        assert found.captions is not None
        rows = page.speed_rows(found.speed, self.datamodule, self.steps_done, found.largest)
        page.say("speed and memory", rows)
        page.say("captions", page.caption_rows(found.captions, self.model))
        print("\nall is well: the gradients agree")


class AsFitRefuses(Callback):
    """Asks the run's own callbacks whether they can do their work, and lets them do none."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self.callbacks = callbacks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        whole: Any = trainer
        own, whole.callbacks = whole.callbacks, self.callbacks
        try:
            for callback in self.callbacks:
                if isinstance(callback, Evaluation | CheckMonitors):
                    callback.setup(trainer, pl_module, stage)
        finally:
            whole.callbacks = own


def _refuse_strategy(trainer: L.Trainer) -> None:
    strategy = trainer.strategy
    script = strategy.launcher is None or isinstance(strategy.launcher, _SubprocessScriptLauncher)
    if not (isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and script):
        raise UserError(
            f"trainer.strategy: clipkit check compares gradients on one device or under ddp, not "
            f"under {type(strategy).__name__} as it was asked for"
        )


@contextmanager
def _silent(level: int) -> Iterator[None]:
    """Keep the kit's own news below a level to itself; the page says what matters."""
    logger = logging.getLogger("clipkit")
    before = logger.level
    logger.setLevel(max(before, level))
    try:
        yield
    finally:
        logger.setLevel(before)
