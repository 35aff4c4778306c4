"""Stores and trainers as processes that are killed, and what MLflow's tables hold afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# Long enough to be killed in the middle, and no more.
TINY = """\
model:
  embed_dim: 16
  image_encoder: {class_path: ConvNet, init_args: {image_size: 16, widths: [8, 8], feature_dim: 16}}
  text_encoder: {class_path: TextTransformer, init_args: {width: 16, depth: 1, heads: 2}}
  optimizer.lr: 1.0e-3
data:
  class_path: ShapesPairs
  init_args: {length: 256, batch_size: 8}
trainer:
  accelerator: cpu
  log_every_n_steps: 1
"""

STOPPER = """\
import sys
from pathlib import Path
from lightning.pytorch.callbacks import Callback

class StopWhenTold(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = Path("stop").exists()
        if trainer.should_stop:
            print("MLflow is imported:", "mlflow" in sys.modules)
"""


class Server:
    """An MLflow server on sqlite, which is killed and started again on the same port."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port
        self.uri = f"http://127.0.0.1:{port}"
        self.database = folder / "mlflow.db"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server",
             "--backend-store-uri", f"sqlite:///{self.database}",
             "--artifacts-destination", str(self.folder / "artifacts"),
             "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**ENVIRONMENT, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
        wait_until(self._answers, "the server answers")

    def kill(self) -> None:
        """End it and its workers as a machine that fails would."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
        except OSError:
            return False


class Trainer:
    """A `clipkit fit` of the tiny recipe as a process of its own, which trains until it is told."""

    def __init__(self, folder: Path, uri: str, *words: str) -> None:
        self.folder = folder
        self.uri = uri
        (folder / "harness.yaml").write_text(TINY)
        (folder / "my_code.py").write_text(STOPPER)
        self.run = folder / "runs" / "harness" / "run"
        self.journal = self.run / "metrics.jsonl"
        self._output = (folder / "output.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "clipkit.cli", "fit", "-c", "base", "-c", "harness.yaml",
             "--run_name=run", "--trainer.max_epochs=10000",
             "--trainer.callbacks+=my_code.StopWhenTold",
             f"--trainer.logger.tracking_uri={uri}", *words],
            stdout=self._output, stderr=subprocess.STDOUT, cwd=folder, env=ENVIRONMENT,
            # A job in the background inherits an ignored SIGINT, which Python then leaves ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def reach(self, lines: int) -> None:
        """Wait until it has logged so much."""
        wait_until(lambda: len(self.lines()) >= lines or not self.runs(), f"{lines} lines")

    def send(self, points: int = 1) -> None:
        """Wait until so much of it was sent."""
        wait_until(lambda: self.sent() >= points or not self.runs(), f"{points} bytes sent")

    def lines(self) -> list[str]:
        return self.journal.read_text().splitlines() if self.journal.is_file() else []

    def sent(self) -> int:
        with contextlib.suppress(OSError):
            return json.loads((self.run / "shipped.json").read_text())["offset"]
        return 0

    def runs(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def said(self) -> str:
        return Path(self._output.name).read_text()

    def stop(self) -> None:
        """Tell it that this is enough."""
        (self.folder / "stop").touch()

    def end(self) -> tuple[int, str]:
        """Let it come to its end; return its exit code and what it said."""
        self.stop()
        try:
            code = self._process.wait(300)
        finally:
            self.kill()
        return code, self.said()

    def close(self) -> None:
        self.kill()
        self._output.close()


def sync(folder: Path, *words: str) -> tuple[int, str]:
    """Run `clipkit sync`; return its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "clipkit.cli", "sync", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder, env=ENVIRONMENT,
    )  # fmt: skip
    return done.returncode, done.stdout


def rows_of_metrics(database: Path) -> Counter:
    """The metrics table itself, each row (name, step, value) with how often it is there."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT key, step, value, is_nan FROM metrics").fetchall()
    return Counter((key, step, "nan" if nan else value) for key, step, value, nan in rows)


def runs_of(database: Path) -> list[tuple[str, str]]:
    """Every run of the store by name and status."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT name, status FROM runs ORDER BY start_time").fetchall()


def points_of(journal: Path) -> Counter:
    """What the journal says that the metrics table must hold, the epoch of each step included."""
    points = set()
    for text in journal.read_text().splitlines():
        line = json.loads(text)
        step = line["step"]
        points |= {
            (name, step, float(value) if name == "epoch" else value)
            for name, value in line.items() if name not in ("time", "step")
        }  # fmt: skip
    return Counter(points)


def wait_until(there, what: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
