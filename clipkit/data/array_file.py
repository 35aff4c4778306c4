"""Named arrays in one file: there whole or not at all, checked when opened, mapped when read.

Arrays follow one another; the end of the file says where each lies. A reader maps the file, so that
its pages are shared by all processes and memory does not grow with their number.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipkit.errors import UserError

log = logging.getLogger(__name__)

_END = struct.Struct("<8sII")  # the mark, bytes of the table before it, the table's checksum
_MARK = b"clipkit\x01"
_ALIGNMENT = 64
_A_DAY = 24 * 60 * 60.0

LIMIT = "CLIPKIT_CACHE_GB"
"""What all caches of a folder may take together, of the environment: it is the machine's."""
_LIMIT_GB = 100.0

Array = np.ndarray[Any, np.dtype[Any]]


class DamagedFileError(Exception):
    """A file that is cut off or altered; the message says which."""


class ArrayWriter:
    """Writes arrays, piece by piece, one name after the other."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._table: dict[str, dict[str, Any]] = {}

    def append(self, name: str, values: Array) -> None:
        """Write more of an array; only the name written last can go on."""
        if name not in self._table:
            self._stream.write(bytes(-self._stream.tell() % _ALIGNMENT))
            start = self._stream.tell()
            self._table[name] = {"dtype": values.dtype.str, "start": start, "bytes": 0, "crc": 0}
        entry = self._table[name]
        assert name == next(reversed(self._table))
        assert entry["dtype"] == values.dtype.str
        content = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        self._stream.write(content)
        entry["bytes"] += values.nbytes
        entry["crc"] = zlib.crc32(content, entry["crc"])

    def finish(self) -> None:
        """Write where everything is."""
        table = json.dumps(self._table).encode()
        self._stream.write(table + _END.pack(_MARK, len(table), zlib.crc32(table)))


class ArrayFile:
    """The arrays of a file, mapped read-only when first asked for; it pickles to its path.

    Args:
        path: the file.
        unchecked: names of arrays too large to be read in advance; who reads them checks them.

    Raises:
        DamagedFileError: the file is cut off or was altered.
    """

    def __init__(self, path: Path, *, unchecked: Collection[str] = ()) -> None:
        self.path = path
        self._arrays: dict[str, Array] | None = None
        if _mark_of(path).exists():
            raise DamagedFileError("a part of it is not what was written")
        for name, (content, checksum) in self._contents().items():
            if name not in unchecked and zlib.crc32(content.data) != checksum:
                raise DamagedFileError(f"{name} is not what was written")

    def __getitem__(self, name: str) -> Array:
        if self._arrays is None:
            self._arrays = {name: array for name, (array, _) in self._contents().items()}
        return self._arrays[name]

    def names(self) -> list[str]:
        """The arrays there are, as they were written."""
        return list(self._contents())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}

    def mark_damaged(self) -> None:
        """Have the next process that opens the file build it again."""
        with suppress(OSError):
            _mark_of(self.path).touch()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def describe(self) -> str:
        """Where it is and how large."""
        size, unit = float(self.size), "bytes"
        for larger in ("kB", "MB", "GB", "TB"):
            if size >= 1000:
                size, unit = size / 1000, larger
        return f"{self.path} ({size:.3g} {unit})"

    def _contents(self) -> dict[str, tuple[Array, int]]:
        """Each array, and its checksum."""
        if self.path.stat().st_size < _END.size:
            raise DamagedFileError("it is cut off")
        with self.path.open("rb") as stream:
            mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        mark, length, checksum = _END.unpack(mapped[-_END.size :].tobytes())
        table = mapped[-_END.size - length : -_END.size].tobytes()
        if mark != _MARK or len(table) != length or zlib.crc32(table) != checksum:
            raise DamagedFileError("it is cut off")
        contents = {}
        for name, entry in json.loads(table).items():
            array = mapped[entry["start"] : entry["start"] + entry["bytes"]]
            contents[name] = (array.view(entry["dtype"]), entry["crc"])
        return contents


def cache_folder(folder: str | None) -> Path:
    """The folder of caches as the user wrote it, or the one of the system."""
    if folder is not None:
        return Path(os.path.expanduser(folder))
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the XDG specification.
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "clipkit"


def open_or_build(
    path: Path,
    build: Callable[[ArrayWriter], None],
    *,
    unchecked: Collection[str] = (),
    accepts: Callable[[ArrayFile], bool] = lambda file: True,
) -> tuple[ArrayFile, bool]:
    """Return the file, and whether it was built now.

    One process of a machine builds; others that want the same file wait for it. What a killed
    process left unfinished is removed by the next one.

    Args:
        path: the file.
        build: writes its arrays.
        unchecked: as in `ArrayFile`.
        accepts: whether a whole file will do; it is built again otherwise.

    Raises:
        UserError: the folder cannot be written.
    """
    with _naming_the_folder(path), _only_one_process(path):
        if path.exists():
            try:
                found = ArrayFile(path, unchecked=unchecked)
            except DamagedFileError as error:
                log.warning("warning: %s is damaged (%s) and is built again", path, error)
            else:
                if accepts(found):
                    with suppress(OSError):  # of another user
                        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
                    return found, False
        for left_over in path.parent.glob(f".{path.name}.*.unfinished"):
            left_over.unlink()
        _write(path, build)
        _make_room(path)
        return ArrayFile(path, unchecked=unchecked), True


def _make_room(new: Path) -> None:
    """Remove the files of the folder that were not used for longest, while all are too much.

    Those of the last day stay: another process may be about to open them. One that is open already
    stays readable without its name.
    """
    used = []
    for path in new.parent.glob("*.clipkit"):
        with suppress(OSError):  # removed by another process
            found = path.stat()
            used.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    total = sum(size for _, size, _ in used)
    for moment, size, path in sorted(used):
        if total <= _limit() or moment > time.time() - _A_DAY or path == new:
            continue
        with suppress(OSError):
            path.unlink()
            total -= size
            log.info(
                "data: removed %s, not used since %s: the caches together exceed the %s GB of %s",
                path, time.strftime("%Y-%m-%d", time.localtime(moment)), f"{_limit() / 1e9:g}",
                LIMIT,
            )  # fmt: skip


def _limit() -> float:
    given = os.environ.get(LIMIT)
    try:
        limit = _LIMIT_GB if given is None else float(given)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise UserError(f"{LIMIT}: {given!r} is no number of gigabytes from 0 on")
    return limit * 1e9


def _write(path: Path, build: Callable[[ArrayWriter], None]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("wb") as stream:
            writer = ArrayWriter(stream)
            build(writer)
            writer.finish()
        os.replace(unfinished, path)
        _mark_of(path).unlink(missing_ok=True)
    finally:
        unfinished.unlink(missing_ok=True)


def _mark_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.damaged")


@contextmanager
def _naming_the_folder(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"data.cache_folder: {str(path.parent)!r} cannot be used ({reason}); "
            "name a folder that can be written, on a disk with room"
        ) from error


@contextmanager
def _only_one_process(path: Path) -> Iterator[None]:
    """Wait until no other process is inside; the kernel lets go of what a killed one held."""
    if os.name != "posix":  # two builders do no harm: each writes a file of its own
        yield
        return
    import fcntl

    with path.with_name(f".{path.name}.lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("data: waiting for another process that is at %s", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
