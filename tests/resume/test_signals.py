"""Ctrl-C, SIGTERM and SLURM's signal: the run ends between two steps, is saved, and goes on."""

import json
import os
import signal
import time

import pytest

from clipkit.callbacks.interruption import Interruption
from tests.resume.conftest import Run
from tests.resume.test_kill import RANKS, finish, steps_logged


def ask_to_stop(process, folder, signum, to=os.kill):
    deadline = time.monotonic() + 200
    while steps_logged(folder) < 7:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    to(process.pid, signum)
    output, _ = process.communicate(timeout=100)
    return output


@pytest.mark.parametrize(
    ("signum", "words", "to"),
    [
        (signal.SIGINT, [], os.kill),
        pytest.param(signal.SIGTERM, RANKS, os.kill, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, RANKS, os.killpg, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, ["--data.num_workers=2"], os.kill, marks=pytest.mark.slow),
    ],
)
def test_a_signal_loses_nothing(start, workdir, signum, words, to):
    long = ["--trainer.max_epochs=40"]
    finish(start("--run_name=whole", *words, *long))
    folder = workdir / "runs" / "again" / "stopped"
    process = start("--run_name=stopped", *words, *long)
    output = ask_to_stop(process, folder, signum, to)
    assert process.returncode == 128 + signum, output
    assert "Traceback" not in output
    assert "and saved" in output
    assert "--ckpt_path runs/again/stopped/checkpoints/last.ckpt" in output
    assert steps_logged(folder) < 200
    finish(start("--run_name=stopped", *words, *long, "--ckpt_path=last"))
    Run(folder).assert_same(Run(workdir / "runs" / "again" / "whole"))


SIGNAL = """\
import os
import signal

from lightning.pytorch.callbacks import Callback


class At(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
"""


@pytest.mark.parametrize(
    "hook",
    [
        "on_sanity_check_start",
        pytest.param("on_train_start", marks=pytest.mark.slow),
        pytest.param("on_train_epoch_end", marks=pytest.mark.slow),
    ],
)
def test_a_signal_around_the_steps_is_heeded_too(start, workdir, hook):
    (workdir / "my_code.py").write_text(SIGNAL)
    more = ["--trainer.num_sanity_val_steps=1", "--trainer.callbacks+=my_code.At"]
    process = start("--run_name=run", *more, f"--trainer.callbacks.hook={hook}")
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    status = json.loads((workdir / "runs/again/run/status.json").read_text())
    assert status["status"] == "interrupted"


def test_slurm_puts_the_job_back(start, workdir):
    """With a scontrol that writes down what it is asked."""
    scontrol = workdir / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/sh\necho "$@" > requeued\n')
    scontrol.chmod(0o755)
    process = start(
        "--run_name=stopped", "--trainer.max_epochs=1000",
        PATH=f"{scontrol.parent}:{os.environ['PATH']}",
        SLURM_NTASKS="1", SLURM_JOB_NAME="fit", SLURM_JOB_ID="41", SLURM_PROCID="0",
        SLURM_LOCALID="0", SLURM_NODEID="0", SLURM_NTASKS_PER_NODE="1",
    )  # fmt: skip
    folder = workdir / "runs" / "again" / "stopped"
    output = ask_to_stop(process, folder, signal.SIGUSR1)
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert (workdir / "requeued").read_text() == "requeue 41\n"
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_a_loaders_process_ends_when_it_is_told_to():
    """It is forked while training's handlers stand, which are for training to heed."""
    callback = Interruption()
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, callback._handle)
    try:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGINT)  # of the terminal: the training's to answer
        time.sleep(0.2)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    finally:
        for signum, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(signum, handler)
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert callback._signum is None
