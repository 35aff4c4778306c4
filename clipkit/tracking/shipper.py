"""A process beside the training that sends its run folder to MLflow, while it is written.

It is a process and not a thread, so that nothing it does can hold training up: MLflow takes seconds
to be imported and holds Python's lock at every call, a fork of a data worker may come in the middle
of either, and what hangs can be ended. The training only writes its journal.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import clipkit
from clipkit.tracking.left_running import end_those
from clipkit.tracking.locks import holding
from clipkit.tracking.mlflow_errors import RefusedError, UnreachableError
from clipkit.tracking.run_record import read_record
from clipkit.tracking.shipment import LOCK_FILE, Shipment
from clipkit.tracking.tracking_uri import without_password

EVERY = 5.0  # seconds between two batches
LONGEST_PAUSE = 60.0  # seconds between two attempts at a store that does not answer
AT_THE_END = 2.0  # the same, while the training waits
_LOOK = 1.0  # seconds between two looks whether the training is still there
_KILL_AFTER = 3.0  # seconds that an end may be late
_SILENT = 3.0  # seconds that the person need not be told of
_COMMAND = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from clipkit.tracking.shipper import main; main(*sys.argv[1:])"
)

Say = Callable[[int, str], None]

log = logging.getLogger(__name__)


class Shipper:
    """The process, as the training has it.

    Args:
        folder: the run folder.
        uri: of the store.
        wait_at_end: seconds that :meth:`finish` waits at the most.
    """

    def __init__(self, folder: Path, uri: str, wait_at_end: float) -> None:
        self.folder = folder
        self.uri = uri
        self.wait_at_end = wait_at_end
        self._process: subprocess.Popen[str] | None = None
        self._listener: threading.Thread | None = None

    def start(self) -> None:
        """Begin to send; a machine that gives no further process is no reason not to train."""
        root = str(Path(clipkit.__file__).parents[1])
        try:
            self._process = subprocess.Popen(
                # Not the current folder first: a user's file may be called mlflow.py.
                [
                    *(sys.executable, "-P", "-c", _COMMAND, root),
                    *(str(self.folder), str(self.wait_at_end), str(os.getpid())),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                # By the environment, as there may be a password in it.
                env={**os.environ, "MLFLOW_TRACKING_URI": self.uri, "OMP_NUM_THREADS": "1"},
                process_group=0,  # Ctrl-C is for the training, which then tells it to end
            )
        except OSError as error:
            log.warning("warning: nothing can be sent to MLflow for now (%s)", error.strerror)
            return
        assert self._process.stdout is not None
        self._listener = threading.Thread(
            target=_repeat, args=(self._process.stdout,), daemon=True, name="clipkit-shipper"
        )
        self._listener.start()

    def finish(self) -> None:
        """Have what is left sent, within the time that it may take."""
        if self._process is None or self._process.poll() is not None:
            self._clear()
            self.start()  # it had given up, or had its end: a trainer may go on after that
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write("end\n")
            process.stdin.close()
        try:
            self._wait(process)
        except KeyboardInterrupt:
            process.kill()  # whoever is impatient need not wait; the run itself is at its end
        self._clear()

    def _wait(self, process: subprocess.Popen[str]) -> None:
        if _ends_within(process, _SILENT):
            return
        log.info("sending MLflow what it has not yet, for %g s at the most", self.wait_at_end)
        if not _ends_within(process, self.wait_at_end + _KILL_AFTER - _SILENT):
            process.kill()

    def _clear(self) -> None:
        if self._process is None or self._listener is None:
            return
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process = self._listener = None


def _ends_within(process: subprocess.Popen[str], seconds: float) -> bool:
    try:
        process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return False
    return True


def _repeat(lines: IO[str]) -> None:
    for line in lines:
        level, text = json.loads(line)
        log.log(level, text)


# --- In the process ------------------------------------------------------------------------------


def main(folder: str, wait_at_end: str, training: str) -> None:
    """Send a run folder until the process that trains says that it ends, or is gone."""
    tell = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever MLflow prints

    def say(level: int, text: str) -> None:
        with contextlib.suppress(OSError):  # the training is gone
            print(json.dumps([level, text]), file=tell, flush=True)

    try:
        uri = os.environ["MLFLOW_TRACKING_URI"]
        training_process = _Training(int(training))
        Sending(Path(folder), uri, float(wait_at_end), training_process, say).run()
    except Exception as error:
        reason = str(error).partition("\n")[0]
        say(logging.WARNING, f"warning: no more is sent to MLflow ({reason})")
    finally:
        os._exit(0)  # threads of MLflow's may be waiting for an answer


class _Training:
    """The process that trains, as the one beside it sees it.

    Attributes:
        ended: when it was seen to have ended, by this process's clock; None before.
    """

    def __init__(self, process: int) -> None:
        self.ended: float | None = None
        self._process = process

    def look(self) -> float | None:
        """Return when it has ended, without waiting."""
        self.wait(0)
        return self.ended

    def wait(self, seconds: float) -> None:
        """Wait so long, or until it ends."""
        until = time.monotonic() + seconds
        while self.ended is None:
            left = until - time.monotonic()
            # Its data workers hold the pipe too, so its end is not the end of the pipe.
            told = select.select([0], [], [], max(0.0, min(left, _LOOK)))[0]
            if told or os.getppid() != self._process:
                self.ended = time.monotonic()
            if left <= 0:
                return


class Sending:
    """When what is sent, and what is said of it.

    Args:
        folder: the run folder.
        uri: of the store.
        wait_at_end: seconds to go on for after the training has ended.
        training: tells when that is.
        say: tells the person something, at a level of ``logging``.
    """

    def __init__(
        self, folder: Path, uri: str, wait_at_end: float, training: _Training, say: Say
    ) -> None:
        self.folder = folder
        self.uri = uri
        self.wait_at_end = wait_at_end
        self.say = say
        self._training = training
        self._has_failed = False
        self._has_looked = False

    def run(self) -> None:
        """Send until all is sent, or time is over."""
        free = False
        while not free and not self._is_over():
            # A process of the run's last attempt may have something left to send.
            with holding(self.folder / LOCK_FILE, wait=_LOOK) as free:
                if free:
                    self._run()

    def _run(self) -> None:
        record = read_record(self.folder)
        if record is None:
            return  # the folder is gone
        shipment = Shipment(self.folder, self.uri, record)
        pause = 1.0
        while True:
            ended = self._training.look() is not None
            try:
                shipment.send(ended=ended)
                self._say_recovered()
                self._look_for_others(shipment)
                pause, wait = 1.0, EVERY
                if ended:
                    break
            except UnreachableError as error:
                self._say_failed(str(error))
                pause = min(2 * pause, LONGEST_PAUSE)
                wait = min(pause, AT_THE_END) if ended else pause
            except RefusedError as error:
                self._say_given_up(str(error))
                break
            if self._is_over():
                break
            self._pause(wait, ended)
        if shipment.refused:
            first, more = shipment.refused[0], len(shipment.refused) - 1
            rest = f", and {more} more" if more else ""
            self.say(logging.WARNING, f"warning: MLflow refused {first}{rest}")

    def _pause(self, seconds: float, ended: bool) -> None:
        """Wait; not longer than until the training ends, if it has not."""
        if ended:
            time.sleep(seconds)
        else:
            self._training.wait(seconds)

    def _is_over(self) -> bool:
        since = self._training.look()
        return since is not None and time.monotonic() - since >= self.wait_at_end

    def _look_for_others(self, shipment: Shipment) -> None:
        """Once, see to runs of the experiment that were killed."""
        if self._has_looked or shipment.shipped.experiment_id is None:
            return
        self._has_looked = True
        ended = end_those(shipment.client, shipment.shipped.experiment_id)
        if ended:
            names = ", ".join(ended[:3]) + (", ..." if len(ended) > 3 else "")
            self.say(logging.INFO, f"in MLflow, {names} had been left running; now ended")

    # --- Said once each --------------------------------------------------------------------------

    def _say_failed(self, reason: str) -> None:
        if not self._has_failed:
            where = os.path.relpath(self.folder)
            self.say(
                logging.WARNING,
                f"warning: MLflow at {without_password(self.uri)} does not take the run "
                f"({reason}); training goes on and keeps all in {where}; what MLflow has not in "
                f"the end is sent by: clipkit sync {where}",
            )
        self._has_failed = True

    def _say_recovered(self) -> None:
        if self._has_failed:
            self.say(logging.INFO, f"MLflow at {without_password(self.uri)} has all of it again")
        self._has_failed = False

    def _say_given_up(self, reason: str) -> None:
        self.say(logging.WARNING, f"warning: no more of the run is sent to MLflow ({reason})")
