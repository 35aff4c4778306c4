"""Ctrl-C, SIGTERM and SLURM's signal: ends after the step at hand, saves, says how to go on."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from clipkit.callbacks.last_checkpoint import LastCheckpoint
from clipkit.callbacks.quarantine import TooManyBrokenError
from clipkit.distributed import any_rank
from clipkit.errors import UserError
from clipkit.tracking import callbacks_of, folder_of_run

log = logging.getLogger(__name__)


class Stopped(SystemExit):
    """Training was asked to end by a signal, and did so between two steps."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)  # what a shell expects of a process that a signal ended
        self.signum = signum


class Interruption(Callback):
    """Ends a fit where nothing is lost: all ranks after the same step, and saved.

    A second Ctrl-C ends it at once; then the last checkpoint is what there is to go on from.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning's handler stood until now.
        self._signum = signal.SIGTERM if trainer.received_sigterm else None
        self._process = os.getpid()
        # Lightning asks the same of rank zero alone, and waits for the GPU in doing so.
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = _nothing
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (signal.SIGINT, signal.SIGTERM, _signal_of_slurm(trainer)):
            if signum is not None:
                self._before[signum] = signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _as_a_loaders_process(signum)
            return
        if self._signum is not None:
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._signum = signum
        at_once = "; ctrl-C again stops at once" if signum == signal.SIGINT else ""
        name = "ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
        # Not through the logger: the signal may have come while it was writing.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            os.write(1, f"\n{name}: stopping after this step or evaluation{at_once}\n".encode())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
    ) -> None:
        self._stop_if_asked()

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
    ) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if any_rank(self._signum is not None):
            raise Stopped(self._signum or signal.SIGTERM)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._give_back_signals()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._give_back_signals()
        if not isinstance(exception, Stopped | KeyboardInterrupt | TooManyBrokenError):
            return
        if folder_of_run(trainer) is None:
            return
        saver = next((c for c in callbacks_of(trainer) if isinstance(c, LastCheckpoint)), None)
        if saver is None:
            log.info("stopped; without LastCheckpoint among trainer.callbacks nothing is saved")
        elif not isinstance(exception, KeyboardInterrupt) and trainer.global_step > 0:
            _save(saver, trainer)
            if isinstance(exception, Stopped) and exception.signum == _signal_of_slurm(trainer):
                _requeue(trainer)
        elif saver.path is None:
            log.info("stopped; there is nothing to go on from yet")
        else:
            log.info("stopped at once; what was trained since the last checkpoint is lost")
            _say_how_to_go_on(saver)

    def _give_back_signals(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


def _nothing() -> None:
    pass


def _as_a_loaders_process(signum: int) -> None:
    """Heed a signal in a process that was forked while these handlers stood.

    Ctrl-C reaches it too, and is the training's to answer; what ends a process ends it.
    """
    if signum != signal.SIGINT:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


def _save(saver: LastCheckpoint, trainer: L.Trainer) -> None:
    try:
        saver.save(trainer)
    except UserError as error:
        log.warning("warning: %s", error.sentence)
        return
    log.info("stopped after step %d, and saved", trainer.global_step)
    _say_how_to_go_on(saver)


def _say_how_to_go_on(saver: LastCheckpoint) -> None:
    if saver.path is not None:
        log.info("go on with: clipkit fit --ckpt_path %s", os.path.relpath(saver.path))
        log.info("        or: the same command and --ckpt_path last")


def _slurm(trainer: L.Trainer) -> SLURMEnvironment | None:
    connector: Any = trainer._accelerator_connector  # a strategy of one device knows no cluster
    environment = connector.cluster_environment
    return environment if isinstance(environment, SLURMEnvironment) else None


def _signal_of_slurm(trainer: L.Trainer) -> int | None:
    """Return the signal that SLURM sends before the time is up (``--signal=USR1@90``)."""
    environment = _slurm(trainer)
    if environment is None:
        return None
    return int(environment.requeue_signal or signal.SIGUSR1)


def _requeue(trainer: L.Trainer) -> None:
    environment = _slurm(trainer)
    if environment is None or not environment.auto_requeue or not trainer.is_global_zero:
        return
    job = os.environ.get("SLURM_JOB_ID", "")
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    command = ["scontrol", "requeue", f"{array}_{task}" if array and task else job]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("warning: the job was not put back into the queue (%s)", error)
    else:
        log.info("the job is back in the queue")
