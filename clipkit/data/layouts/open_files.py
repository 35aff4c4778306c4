"""Files read at any place; few of them are open at a time, each process opening its own."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

MAX_OPEN = 32


class OpenFiles:
    """Numbered files of which any bytes can be read; it pickles to their paths.

    Reading names the place, so that a forked process may share what its parent has open.

    Args:
        paths: the files.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = [os.path.abspath(path) for path in paths]  # a worker may run elsewhere
        self._open: OrderedDict[int, _Descriptor] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}

    def size(self, number: int) -> int:
        """Bytes of a file."""
        return os.fstat(self._descriptor(number).number).st_size

    def read(self, number: int, start: int, length: int) -> bytes:
        """These bytes of a file.

        Raises:
            OSError: they are not all there.
        """
        descriptor = self._descriptor(number)
        pieces: list[bytes] = []
        missing = length
        while missing > 0:
            # The kernel hands out no more than 2 GiB at once.
            piece = _read_at(descriptor.number, missing, start + length - missing)
            if not piece:
                raise OSError(f"{self.paths[number]!r} is cut off: bytes from {start:,} on")
            pieces.append(piece)
            missing -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _descriptor(self, number: int) -> _Descriptor:
        found = self._open.get(number)
        if found is None:
            found = self._open[number] = _Descriptor(self.paths[number])
            if len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
        return found


class _Descriptor:
    """An open file, closed when nobody reads it any more."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if hasattr(self, "number"):
            close(self.number)


if hasattr(os, "pread"):

    def _read_at(descriptor: int, length: int, start: int) -> bytes:
        return os.pread(descriptor, length, start)

else:

    def _read_at(descriptor: int, length: int, start: int) -> bytes:
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, length)
