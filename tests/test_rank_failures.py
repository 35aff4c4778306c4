"""One rank's error ends all ranks within a minute, with that error on top."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.test_ranks import ENVIRONMENT

CODE = """\
import os
import signal
import time

from lightning.pytorch.callbacks import Callback

from clipkit.errors import UserError


class FailOn(Callback):
    def __init__(self, rank: int, how: str, hook: str = "on_train_batch_start") -> None:
        self.rank, self.how = rank, how
        setattr(self, hook, self.maybe)

    def maybe(self, trainer, *_, **__):
        if trainer.global_rank != self.rank or (trainer.global_step < 2 and _):
            return
        if self.how == "sentence":
            raise UserError("the shelf of rank %d is empty" % self.rank)
        if self.how == "bug":
            raise KeyError("a bug")
        if self.how == "exit":
            os._exit(3)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def running(group):
    found = subprocess.run(["pgrep", "-g", str(group)], capture_output=True, check=False)
    return bool(found.stdout)


def start(workdir, pictures, rank, how, *words):
    (workdir / "my_code.py").write_text(CODE)
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "clipkit.cli", "fit", "-c", "base", "-c", "tiny.yaml"),
            *(f"--data.dataset={pictures}", "--run_name=run"),
            *("--trainer.devices=2", "--trainer.strategy=ddp"),
            *("--trainer.callbacks+=my_code.FailOn", f"--trainer.callbacks.rank={rank}"),
            *(f"--trainer.callbacks.how={how}", *words),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=workdir, env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "how", "code", "said"),
    [
        (1, "sentence", 2, "clipkit: on rank 1 of 2: the shelf of rank 1 is empty"),
        (1, "killed", 1, "clipkit: on rank 1 of 2: the process was ended by SIGKILL"),
        pytest.param(1, "exit", 1, "rank 1 of 2: the process was ended by itself, with exit code 3",
                     marks=pytest.mark.slow),
        pytest.param(1, "bug", 1, "KeyError: 'a bug'", marks=pytest.mark.slow),
        pytest.param(0, "sentence", 2, "clipkit: the shelf of rank 0 is empty",
                     marks=pytest.mark.slow),
        pytest.param(0, "bug", 1, "KeyError: 'a bug'", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_one_error_ends_all(workdir, pictures, rank, how, code, said):
    process = start(workdir, pictures, rank, how, "--trainer.max_epochs=1000")
    journal = workdir / "runs/tiny/run/metrics.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_text()):
        time.sleep(0.1)
    began = time.monotonic()
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, errors
    assert time.monotonic() - began < 60
    assert errors.count(said) == 1, errors
    if how != "bug":
        assert "Traceback" not in errors
        assert errors.count("clipkit: ") == 1, errors
    deadline = time.monotonic() + 30
    while running(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "said"), [("sentence", "shelf of rank 1"), ("bug", "KeyError:")])
def test_an_error_after_training_is_not_lost(workdir, pictures, how, said):
    """The first rank, which has come to its end, waits for the others."""
    process = start(
        workdir, pictures, 1, how, "--trainer.callbacks.hook=on_fit_end", "--trainer.max_epochs=2"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (2 if how == "sentence" else 1), errors
    assert errors.count(said) == 1, errors
