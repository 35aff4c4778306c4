"""What it costs a training step that nothing is lost: tracking, with a server that is dead too.

python -m benchmarks.tracking [--rounds 20] [--steps 40] [--every 1]
python -m benchmarks.tracking --rounds 1 --steps 5 --sides off sqlite refused   # to see it work

`clipkit fit` of the quickstart's model on drawn shapes, every step logged (the recipe itself logs
every 10th). A contender is a process that trains without end and is asked for so many steps in
turn; between turns it waits. `off` has neither MLflow nor journal nor run folder, keeps no account
of broken rows, cannot be stopped between two steps, and draws its order and its dropout as torch
does, which nothing can go on with; the others have all of that. `sqlite` and `server` send to a
store that lives, and the others to one that is dead: it refuses the connection (`refused`), takes
it and is silent (`silent`), or does not answer at all (`black hole`). The turns begin when whoever
sends has found out.

`cost` is the store that lives against none, `dead` the dead one against the live server. Reads and
writes are those that the kernel counts for the training process (/proc/self/io); system calls are
those of its main thread, by strace, where that is installed.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader, RandomSampler

from benchmarks.interleaved import parser, ratio, record, shown, spread, table

GOALS = {"at_most": 1.02}
LIVE = ("sqlite", "server")
DEAD = ("refused", "silent", "black hole")
SIDES = ("off", *LIVE, *DEAD)
SECONDS_TO_FIND_OUT = 20.0  # MLflow is imported, and a call of 5 seconds has had its time


class Turn(NamedTuple):
    """What some steps took."""

    seconds: float
    reads: int
    writes: int
    of_the_sender: float  # seconds of processor that the process beside it took meanwhile


# --- Stores --------------------------------------------------------------------------------------


@contextmanager
def store(side: str, folder: Path) -> Iterator[str]:
    """Give the address of a store that lives, or is dead in its way."""
    if side == "server":
        with _server(folder) as uri:
            yield uri
    elif side in DEAD:
        with _dead_port(side) as port:
            yield f"http://127.0.0.1:{port}"
    else:
        yield f"sqlite:///{folder}/{side}.db"


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    import urllib.request

    with _dead_port("refused") as port:
        uri = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1",
         "--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db",
         "--artifacts-destination", str(folder / "artifacts")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield uri
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _dead_port(side: str) -> Iterator[int]:
    with ExitStack() as opened:
        listening = opened.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        address = listening.getsockname()
        if side == "silent":
            listening.listen(1024)
        if side == "black hole":
            # A queue of one that is full: Linux answers further knocks with nothing.
            listening.listen(0)
            for _ in range(4):
                knock = opened.enter_context(socket.socket())
                knock.setblocking(False)
                knock.connect_ex(address)
        yield int(address[1])


# --- Training ------------------------------------------------------------------------------------


class _InTurns(L.Callback):
    """Makes so many steps when it is asked to, and says what they took."""

    def __init__(self, steps: int, asked: Connection) -> None:
        self._steps = steps
        self._asked = asked
        self._left = 0
        self._began = (0.0, 0, 0, 0.0)

    def on_train_batch_start(self, *_: Any) -> None:
        if self._left == 0:
            if not self._asked.recv():
                os._exit(0)  # what there is to send is of no interest
            self._left = self._steps
            self._began = (time.perf_counter(), *_reads_and_writes(), _seconds_of_children())

    def on_train_batch_end(self, *_: Any) -> None:
        # The step's own metrics are logged after this: those of the step before are counted.
        self._left -= 1
        if self._left == 0:
            now = (time.perf_counter(), *_reads_and_writes(), _seconds_of_children())
            self._asked.send(Turn(*(b - a for a, b in zip(self._began, now, strict=True))))


def _reads_and_writes() -> tuple[int, int]:
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["syscr"]), int(counts["syscw"])


def _seconds_of_children() -> float:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    ticks = 0
    for child in children:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def train(
    side: str, uri: str, options: argparse.Namespace, folder: Path, asked: Connection
) -> None:
    """Train without end, in turns."""
    import clipkit
    from clipkit.tracking import callbacks_of

    logging.getLogger("lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    os.chdir(folder)
    torch.set_num_threads(options.threads)
    on = ["trainer.logger=MLflowLogger", f"trainer.logger.tracking_uri={uri}"]
    module, data, trainer = clipkit.build(
        "base",
        "quickstart",
        overrides=[
            *(["trainer.logger=false"] if side == "off" else on),
            f"run_name={side.replace(' ', '_')}", "data.length=10000000", "data.num_workers=0",
            f"data.batch_size={options.batch}", f"trainer.log_every_n_steps={options.every}",
            "trainer.callbacks=[]", f"trainer.accelerator={options.device}",
            "trainer.enable_checkpointing=false", "trainer.limit_val_batches=0",
        ],
    )  # fmt: skip
    if side == "off":
        _take_off(module, data, trainer)
    callbacks_of(trainer).append(_InTurns(options.steps, asked))
    trainer.fit(module, datamodule=data)


def _take_off(module: Any, data: Any, trainer: L.Trainer) -> None:
    """Leave nothing of what a run goes on with, or is told by."""
    from clipkit.callbacks.interruption import Interruption
    from clipkit.callbacks.quarantine import Quarantine
    from clipkit.tracking import Journal, RunFolder, callbacks_of

    trainer.loggers = [one for one in trainer.loggers if not isinstance(one, Journal)]
    for callback in callbacks_of(trainer)[:]:
        if isinstance(callback, RunFolder | Quarantine | Interruption):
            callbacks_of(trainer).remove(callback)
    module.on_train_batch_start = lambda *_: None  # no seed a step
    loader_of = data.train_dataloader

    def as_torch_draws() -> DataLoader[Any]:
        loader = loader_of()
        return DataLoader(
            loader.dataset, loader.batch_size, sampler=_RandomKeys(loader.dataset),
            collate_fn=loader.collate_fn, drop_last=True,
        )  # fmt: skip

    data.train_dataloader = as_torch_draws


class _RandomKeys(RandomSampler):
    def __iter__(self) -> Iterator[Any]:
        from clipkit.data.sampling import SampleKey

        return (SampleKey(0, number) for number in super().__iter__())


class Contender:
    """A process that trains in turns."""

    def __init__(self, side: str, uri: str, options: argparse.Namespace, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=train, args=(side, uri, options, folder, theirs))
        self.process.start()

    def turn(self) -> Turn:
        """Make some steps."""
        self._pipe.send(True)
        taken: Turn = self._pipe.recv()
        return taken

    def calls(self) -> dict[str, int]:
        """Return the system calls of the main thread in a turn, by name; none without strace."""
        if shutil.which("strace") is None:
            return {}
        tracer = subprocess.Popen(
            ["strace", "-c", "-p", str(self.process.pid)], stderr=subprocess.PIPE, text=True
        )
        time.sleep(1)
        self.turn()
        tracer.send_signal(2)
        text = tracer.communicate()[1]
        rows = re.findall(r"^ *[\d.]+ +[\d.]+ +\d+ +(\d+)(?: +\d+)? +(\w+)$", text, re.MULTILINE)
        return {name: int(count) for count, name in rows if name != "total"}

    def end(self) -> None:
        """Have it end."""
        self._pipe.send(False)
        self.process.join(30)
        self.process.kill()


# --- Measuring -----------------------------------------------------------------------------------


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let the contenders train in turns."""
    with ExitStack() as opened:
        contenders: dict[str, Contender] = {}
        for side in options.sides:
            uri = opened.enter_context(store(side, folder))
            contenders[side] = Contender(side, uri, options, folder)
            opened.callback(contenders[side].end)
        # A turn starts whoever sends, and gives it something to send.
        for contender in contenders.values():
            contender.turn()
        time.sleep(SECONDS_TO_FIND_OUT)
        turns: dict[str, list[Turn]] = {side: [] for side in options.sides}
        for number in range(-1, options.rounds):
            sides = list(contenders)
            for side in sides if number % 2 == 0 else reversed(sides):
                taken = contenders[side].turn()
                if number >= 0:
                    turns[side].append(taken)
        calls = {side: contender.calls() for side, contender in contenders.items()}
    return summarise(turns, calls, options.steps)


def summarise(
    turns: Mapping[str, Sequence[Turn]], calls: Mapping[str, Mapping[str, int]], steps: int
) -> dict[str, Any]:
    """Return the ratios of step times, and what the kernel counted a step."""
    seconds = {side: [turn.seconds / steps for turn in some] for side, some in turns.items()}

    def of_step(side: str, count: Callable[[Turn], float]) -> float:
        return round(statistics.median(count(turn) / steps for turn in turns[side]), 3)

    return {
        "must_show": {"cost": GOALS, "dead": GOALS},
        "seconds_a_step": {side: spread(some) for side, some in seconds.items()},
        "cost": {
            side: ratio(seconds[side], seconds["off"]) for side in turns if side != "off"
        } if "off" in turns else {},
        "dead": {
            side: ratio(seconds[side], seconds["server"]) for side in turns if side in DEAD
        } if "server" in turns else {},
        "reads_a_step": {side: of_step(side, lambda turn: turn.reads) for side in turns},
        "writes_a_step": {side: of_step(side, lambda turn: turn.writes) for side in turns},
        "sender_share_of_a_core": {
            side: round(
                sum(turn.of_the_sender for turn in some) / sum(turn.seconds for turn in some), 4
            )
            for side, some in turns.items()
        },
        "system_calls_of_a_turn": calls,
    }  # fmt: skip


def main() -> None:
    """Measure, print a table and write one dated file."""
    options_of = parser(__doc__, rounds=20, threads=1)
    options_of.add_argument("--steps", type=int, default=40, help="of a turn")
    options_of.add_argument("--batch", type=int, default=32)
    options_of.add_argument("--every", type=int, default=1, help="log every so many steps")
    options_of.add_argument("--sides", nargs="+", choices=SIDES, default=[*SIDES])
    options = options_of.parse_args()
    if options.output is not None:
        options.output = options.output.resolve()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        result = measure(options, Path(folder))
    rows = [("side", "s a step", "over off", "over server", "writes a step", "sender's share")]
    for side in options.sides:
        rows.append(
            (
                side,
                shown(result["seconds_a_step"][side]),
                shown(result["cost"][side]) if side in result["cost"] else "",
                shown(result["dead"][side]) if side in result["dead"] else "",
                str(result["writes_a_step"][side]),
                str(result["sender_share_of_a_core"][side]),
            )
        )
    table(rows)
    print(record("tracking", options, result))


if __name__ == "__main__":
    main()
