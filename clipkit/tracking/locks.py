"""Who writes a run just now: a lock on its journal, which the end of a process takes away."""

from __future__ import annotations

import fcntl
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SECONDS_OF_A_LOOK = 1.0  # whoever looks whether a lock is held has it for an instant


class LockedFile:
    """A file that one process alone has open, until it closes it or is gone.

    The lock is the open file's and not its name's: one that was killed holds nothing. Where the
    file system knows no locks, nobody is kept out.

    Args:
        path: is made where it is missing.
        flags: of ``os.open``; network file systems lock only what is open for writing.
    """

    def __init__(self, path: Path, flags: int = os.O_RDWR) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, flags | os.O_CREAT, 0o644)
        _OPEN.add(self)

    def take(self, *, wait: float = _SECONDS_OF_A_LOOK) -> bool:
        """Return whether the lock was free within so many seconds."""
        give_up = time.monotonic() + wait
        while not _try(self.descriptor, fcntl.LOCK_EX):
            if time.monotonic() >= give_up:
                return False
            time.sleep(0.05)
        return True

    def close(self) -> None:
        """Let the file and its lock go."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


def is_held(path: Path) -> bool:
    """Return whether a living process has this file locked."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


@contextmanager
def holding(path: Path, *, wait: float) -> Iterator[bool]:
    """Hold a file locked; yields whether its lock was free within so many seconds."""
    file = LockedFile(path)
    try:
        yield file.take(wait=wait)
    finally:
        file.close()


def _try(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _close_in_child() -> None:
    # A data worker is a fork: it would go on holding the lock of a trainer that was killed.
    for file in [*_OPEN]:
        file.close()


_OPEN: weakref.WeakSet[LockedFile] = weakref.WeakSet()
os.register_at_fork(after_in_child=_close_in_child)
