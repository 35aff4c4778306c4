"""metrics.jsonl: every metric of a run, one JSON object a line; all else is told what it holds."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from clipkit.errors import UserError
from clipkit.tracking.locks import LockedFile

JOURNAL_FILE = "metrics.jsonl"
MOST_WAITING = 100_000  # lines in memory while the disk takes none: some 50 MB

log = logging.getLogger(__name__)


class Line(NamedTuple):
    """What was logged at once."""

    time: float  # seconds since 1970
    step: int
    epoch: int | None
    values: dict[str, float]
    end: int  # bytes of the file up to here


def parse(text: bytes, end: int = 0) -> Line:
    """Read one line; ValueError where it is none."""
    try:
        line: dict[str, Any] = json.loads(text)
        moment, step = float(line.pop("time")), int(line.pop("step"))
        epoch = line.pop("epoch", None)
        return Line(moment, step, epoch, {name: float(v) for name, v in line.items()}, end)
    except (KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError("not a line of metrics") from error


def lines_after(path: Path, start: int = 0) -> Iterator[Line]:
    """Yield the whole lines from a byte on; one that is not yet at its end is not there yet."""
    with path.open("rb") as file:
        file.seek(start)
        for text in file:
            start += len(text)
            if not text.endswith(b"\n"):
                return
            try:
                yield parse(text, start)
            except ValueError:
                continue  # of a machine that died; nothing can be said of it


def points_after(path: Path, start: int = 0) -> int:
    """Return how many points stand in the journal from a byte on."""
    return sum(len(line.values) for line in lines_after(path, start)) if path.is_file() else 0


class JournalFile:
    """The journal of a run while it is written, by one process at a time.

    A line is one write. Where the disk takes none, lines wait in memory and training goes on.

    Args:
        folder: the run folder.
        continued: the journal is there; a last line that was cut off is taken away, and points
            that stand in it (name, step) are not written again.
    """

    def __init__(self, folder: Path, *, continued: bool = False) -> None:
        self.path = folder / JOURNAL_FILE
        self._file: LockedFile | None = self._locked()
        # By name, the last step that an earlier process has logged.
        self._known = _mend(self.path) if continued else {}
        self._last: tuple[int, dict[str, float | str]] | None = None
        self._waiting: deque[bytes] = deque()
        self._lost = 0
        self._is_stuck = False

    @property
    def known_step(self) -> int | None:
        """The last step of an earlier process, None where there was none."""
        return max(self._known.values(), default=None)

    def append(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Write what was logged at once; the same again, by the next logger, is no news."""
        values = {name: _strict(float(value)) for name, value in metrics.items()}
        if self._last == (step or 0, values):
            return
        self._last = (step or 0, values)
        values = {**values}
        epoch = values.pop("epoch", None)
        if self._known:
            values = {n: v for n, v in values.items() if self._known.get(n, -1) < (step or 0)}
            if not values:
                return
        line: dict[str, Any] = {"time": round(time.time(), 3), "step": step or 0}
        if epoch is not None:
            line["epoch"] = int(epoch)
        self._write(json.dumps({**line, **values}).encode() + b"\n")

    def sync(self) -> None:
        """Have the disk keep what was written, whatever becomes of the machine."""
        self._write_waiting()
        if self._file is not None:
            try:
                os.fsync(self._file.descriptor)
            except OSError as error:
                self._say_stuck(error)

    def close(self) -> None:
        """Let the file and its lock go; another line opens it again."""
        self._write_waiting()
        if self._waiting or self._lost:
            log.warning(
                "warning: %s: %d lines of metrics could not be written and are lost",
                self.path, len(self._waiting) + self._lost,
            )  # fmt: skip
            self._waiting.clear()
            self._lost = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    def _locked(self) -> LockedFile:
        file = LockedFile(self.path, os.O_RDWR | os.O_APPEND)
        if not file.take():
            file.close()
            raise UserError(
                f"the run {self.path.parent} is being written by another process; wait for its "
                "end, or stop it"
            )
        return file

    def _write(self, line: bytes) -> None:
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(line)
        else:
            self._lost += 1
        self._write_waiting()

    def _write_waiting(self) -> None:
        try:
            if self._file is None and self._waiting:
                self._file = self._locked()
                if _is_within_a_line(self._file.descriptor):  # the disk was full at the end
                    self._waiting.appendleft(b"\n")
            while self._waiting and self._file is not None:
                line = self._waiting[0]
                written = os.write(self._file.descriptor, line)
                if written == len(line):
                    self._waiting.popleft()
                else:  # the disk took a part; the rest of the line comes first
                    self._waiting[0] = line[written:]
        except OSError as error:
            self._say_stuck(error)
        else:
            self._is_stuck = False

    def _say_stuck(self, error: OSError) -> None:
        if not self._is_stuck:
            log.warning(
                "warning: %s cannot be written (%s); training goes on, the metrics wait in memory",
                self.path, error.strerror,
            )  # fmt: skip
        self._is_stuck = True


def _mend(path: Path) -> dict[str, int]:
    """Cut off what follows the last whole line, and return the last step of each metric."""
    last: dict[str, int] = {}
    whole = 0
    for line in lines_after(path):
        whole = line.end
        for name in line.values:
            last[name] = max(line.step, last.get(name, -1))
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return last


def _is_within_a_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _strict(value: float) -> float | str:
    # JSON knows no NaN and no infinity; a word survives every parser.
    return value if math.isfinite(value) else str(value)
