"""One rank's error ends all ranks, with that error on top.

A rank that waits for another in a collective waits for half an hour. So a thread of every rank
looks at a board that all of them share: what has gone wrong first, and whether the others live.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from clipkit.errors import UserError, of_memory

_SECONDS = 1.0  # between two looks
_SILENT = 40.0  # seconds without a sign of life after which a rank counts as dead
_HEARD = 15.0  # seconds that a rank which failed waits for rank zero to have read why
_OWN_END = 10.0  # seconds for the training thread to come to its end by itself
_SECONDS_TO_JOIN = 5.0
_ERROR, _READ, _ALIVE, _DONE = (f"clipkit/{key}" for key in ("error", "read", "alive", "done"))
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",
         "connectFullMesh", "Timed out waiting", "NCCL")  # fmt: skip


class Failure(NamedTuple):
    """What went wrong on a rank."""

    rank: int
    world_size: int
    exit_code: int
    text: str

    def __str__(self) -> str:
        return f"on rank {self.rank} of {self.world_size}: {self.text}"


class RankError(UserError):
    """The error of some rank, as it ends this one; the first rank says it."""

    def __init__(self, failure: Failure, *, silent: bool) -> None:
        super().__init__(str(failure))
        self.exit_code = failure.exit_code
        self.silent = silent


class RankWatch:
    """Watches the other ranks of this process's group, from when it is started.

    Args:
        processes: the processes of the other ranks, where this one has started them.
    """

    def __init__(self, processes: Sequence[Any] = ()) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._processes = processes
        self._board = _board()
        self._over = threading.Event()
        self._failure: Failure | None = None
        self._said = False
        self._seen: dict[int, tuple[int, float]] = {}
        self._thread = threading.Thread(target=self._look, name="rank-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        _stop_lightnings_observer()
        self._thread.start()
        # A thread that is within torch when Python ends has the process abort.
        atexit.register(self.stop)

    def stop(self) -> None:
        """End the watch: the ranks part in peace."""
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_SECONDS_TO_JOIN)

    def part(self) -> None:
        """End the watch where this rank has come to its end; the first one waits for the others.

        Raises:
            RankError: one of them has failed before it came to its end.
        """
        self._board.set(f"{_DONE}/{self.rank}", "1")
        while self.rank == 0 and not self._all_done():
            if self._failure is not None:
                raise RankError(self._failure, silent=self._said)
            time.sleep(0.05)
        self.stop()

    def _all_done(self) -> bool:
        return all(self._board.check([f"{_DONE}/{rank}"]) for rank in range(1, self.world_size))

    def tell(self, error: BaseException) -> None:
        """Tell the others why this rank has failed, and end with what failed first anywhere.

        A lost connection is what others notice of a failure: its cause is waited for.

        Raises:
            RankError: always, but on the first rank for an error of its own.
        """
        error = of_memory(error) or error
        lost = any(sign in str(error) for sign in _LOST) and not isinstance(error, UserError)
        deadline = time.monotonic() + (_SILENT + 2 * _SECONDS if lost else 0.0)
        while time.monotonic() < deadline and self._failure is None:
            time.sleep(0.1)
        if self._failure is None:
            text = error.sentence if isinstance(error, UserError) else _traceback(error)
            code = 2 if isinstance(error, UserError) else 1
            self._failure = self._publish(Failure(self.rank, self.world_size, code, text))
        self._over.set()
        if self.rank == 0 == self._failure.rank:
            return
        # Where the first rank is gone, the one that failed says it.
        unread = self.rank == self._failure.rank and not self._is_read()
        raise RankError(
            self._failure, silent=self._said or (self.rank > 0 and not unread)
        ) from error

    def _publish(self, failure: Failure) -> Failure:
        try:
            found = self._board.compare_set(_ERROR, "", json.dumps(failure))
            return Failure(*json.loads(found))
        except (RuntimeError, ValueError):  # rank zero, which keeps the board, is gone
            return failure

    def _is_read(self) -> bool:
        """Whether the first rank has read why this one fails; it is waited for."""
        # A process that ends at once would have the first rank killed before it has read why.
        deadline = time.monotonic() + _HEARD
        while time.monotonic() < deadline:
            try:
                if self._board.check([_READ]):
                    return True
            except RuntimeError:
                return False
            time.sleep(0.1)
        return False

    def _look(self) -> None:
        beat = 0
        while not self._over.wait(_SECONDS):
            beat += 1
            try:
                self._board.set(f"{_ALIVE}/{self.rank}", str(beat))
                if self._board.check([_ERROR]):
                    self._failure = Failure(*json.loads(self._board.get(_ERROR)))
                elif self.rank == 0:
                    self._failure = self._dead()
            except RuntimeError:
                self._failure = self._ended(0, "the process has ended")
            if self._failure is not None:
                self._end(self._failure)
                return

    def _dead(self) -> Failure | None:
        """Return what is known of a rank that has ended without a word."""
        for rank in range(1, self.world_size):
            if not self._board.check([f"{_DONE}/{rank}"]):
                text = self._exited(rank) or self._silent(rank)
                if text is not None:
                    return self._ended(rank, text)
        return None

    def _exited(self, rank: int) -> str | None:
        if rank > len(self._processes):
            return None  # somebody else has started it
        code = self._processes[rank - 1].poll()
        return None if code is None else f"the process was ended by {_cause(code)}"

    def _silent(self, rank: int) -> str | None:
        now, key = time.monotonic(), f"{_ALIVE}/{rank}"
        beat = int(self._board.get(key)) if self._board.check([key]) else 0
        before, at = self._seen.get(rank, (-1, now))
        self._seen[rank] = (beat, at if beat == before else now)
        if beat == before and now - at > _SILENT:
            return f"no sign of life for {_SILENT:.0f} seconds"
        return None

    def _ended(self, rank: int, text: str) -> Failure:
        return Failure(rank, self.world_size, 1, text)

    def _end(self, failure: Failure) -> None:
        """End this process: its training thread may be waiting for a rank that is gone."""
        if self.rank == 0:
            self._said = True
            print(f"clipkit: {failure}", file=sys.stderr, flush=True)
            with suppress(RuntimeError):
                self._board.set(_READ, "1")
        if self._over.wait(_OWN_END):
            return  # it has noticed, and ends as it should
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        sys.stdout.flush()
        os._exit(failure.exit_code)


def _board() -> Any:
    """Return a connection of its own to the store by which the ranks have found one another."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    distributed: Any = dist
    return distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=20))


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _cause(code: int) -> str:
    if code >= 0:
        return f"itself, with exit code {code}"
    memory = ", which is what Linux does when memory runs out" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{memory}"


def _stop_lightnings_observer() -> None:
    # It kills the first rank without a word, seconds after another has ended.
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
