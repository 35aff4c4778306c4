"""Reading ahead: a value is made by a thread while the one before it is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_PATIENCE = 0.1  # seconds within which a thread sees that nobody wants more
_FAREWELL = 10.0  # seconds that a read in hand is waited for at the end


class ReadAhead(Generic[T]):
    """An iterator that is one value ahead of who iterates; to be closed.

    What fails while a value is made is raised where that value would have come.
    """

    def __init__(self, values: Iterator[T]) -> None:
        self._values = values
        self._made: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()
        # Not before the last one was taken, so that no more than two are in memory.
        self._wanted = threading.Semaphore(1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="clipkit-stream", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while True:
            value, error = self._made.get()
            if error is not None:
                raise error
            if value is None:
                return
            self._wanted.release()
            yield value

    def close(self) -> None:
        """End the thread, and what it reads from."""
        self._closed.set()
        self._thread.join(_FAREWELL)

    def _read(self) -> None:
        try:
            while self._is_wanted():
                value = next(self._values, None)
                self._made.put((value, None))
                if value is None:
                    return
        except BaseException as error:
            self._made.put((None, error))
        finally:
            # In the thread that reads: nobody else may end a generator that is running.
            close = getattr(self._values, "close", None)
            if close is not None:
                close()

    def _is_wanted(self) -> bool:
        while not self._closed.is_set():
            if self._wanted.acquire(timeout=_PATIENCE):
                return not self._closed.is_set()
        return False
