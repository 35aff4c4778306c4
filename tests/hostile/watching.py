"""What a command does behind one's back: imports, processes, sockets, files outside its folders.

Python's audit hook sees what Python does, whatever library asks for it; inotify sees every file of
the forbidden folder that is touched by anybody, libraries in C among them.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

EVIL = "evil"
"""The module that hostile files name; importing it is the crime."""

TRUSTED = "mine.py"
"""The file of the one module that a user trusts."""

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HARMLESS_PROGRAMS = ("git", "uname", "lscpu", "nvidia-smi", "ldconfig", "gcc", "cc", "objdump")
_TOUCHES = (
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link"),
    *("os.symlink", "os.truncate", "os.utime", "os.listdir", "os.scandir", "shutil.rmtree"),
    *(
        "shutil.copyfile",
        "shutil.move",
        "shutil.unpack_archive",
        "ctypes.dlopen",
        "sqlite3.connect",
    ),
)
_NETWORK = ("socket.connect", "socket.getaddrinfo")
_RUNS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")


class Watch:
    """Judges audit events while it is on.

    Args:
        inside: the folder of the command, which it may read and write.
        outside: the folder that is nobody's business.
        writable: further folders that may be written: the run's temporary ones, caches.
    """

    def __init__(self, inside: Path, outside: Path, writable: list[Path] | None = None) -> None:
        self.outside = str(outside)
        self.inside = str(inside)
        places = [inside, Path(tempfile.gettempdir()), Path("/dev"), *(writable or [])]
        self.writable = [str(place) for place in places if place != outside]
        self.crimes: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        crime = self._crime(event, arguments)
        if crime and crime not in self.crimes:
            self.crimes.append(crime)

    def _crime(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event == "import" and str(arguments[0]).partition(".")[0] == EVIL:
            return f"imports {arguments[0]}"
        if event == "open":
            return self._opening(*arguments)
        if event in _TOUCHES and any(self._is_outside(argument) for argument in arguments):
            return f"{event} {arguments}"
        if event in _RUNS and not self._is_harmless(arguments[0]):
            return f"{event} {arguments[0]}"
        if event in _NETWORK:
            return f"{event} {arguments}"
        if event == "exec" and isinstance(arguments[0], CodeType):
            file = arguments[0].co_filename
            trusted = os.path.basename(file) == TRUSTED
            if file.startswith((self.inside, self.outside)) and not trusted:
                return f"runs code of {file}"
        return None

    def _opening(self, path: Any, mode: Any, flags: Any) -> str | None:
        if self._is_outside(path):
            return f"opens {path!r}"
        writes = isinstance(flags, int) and flags & _WRITES
        if writes and isinstance(path, str | bytes | os.PathLike):
            whole = os.path.abspath(os.fsdecode(path))
            if not whole.startswith(tuple(self.writable)):
                return f"writes {whole!r}"
        return None

    def _is_outside(self, path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        whole = os.path.realpath(os.path.abspath(os.fsdecode(path)))
        return whole.startswith(self.outside)

    def _is_harmless(self, program: Any) -> bool:
        first = program[0] if isinstance(program, list | tuple) and program else program
        name = os.path.basename(os.fsdecode(first)) if isinstance(first, str | bytes) else ""
        return name in (*_HARMLESS_PROGRAMS, os.path.basename(sys.executable))


_watches: list[Watch] = []
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    for watch in _watches:
        watch(event, arguments)
    if _watches and event in _NETWORK:
        raise OSError("nothing leaves the machine while it is watched")


@contextmanager
def believing_in_a_network() -> Iterator[None]:
    """Let libraries go as far as a socket: told to be offline, they give up before it unseen."""
    import datasets.config
    import huggingface_hub.constants

    modules = (huggingface_hub.constants, datasets.config)
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = False
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = was


@contextmanager
def watched(inside: Path, outside: Path, writable: list[Path] | None = None) -> Iterator[list[str]]:
    """Give the list that names every crime committed within."""
    global _hooked
    if not _hooked:  # a hook stays for good
        sys.addaudithook(_hook)
        _hooked = True
    bytecode = Path(sysconfig.get_paths()["stdlib"]).parent.parent
    watch = Watch(inside, outside, [bytecode, *(writable or [])])
    with believing_in_a_network(), touched(outside) as names:
        _watches.append(watch)
        try:
            yield watch.crimes
        finally:
            _watches.remove(watch)
    watch.crimes.extend(f"touches {name}" for name in names)


_IN_ACCESS, _IN_MODIFY, _IN_OPEN, _IN_CREATE, _IN_DELETE = 1, 2, 0x20, 0x100, 0x200
_ALL = _IN_ACCESS | _IN_MODIFY | _IN_OPEN | _IN_CREATE | _IN_DELETE | 0xC0  # and moved
_IN_ISDIR, _IN_NONBLOCK = 0x40000000, 0o4000


@contextmanager
def touched(folder: Path) -> Iterator[dict[str, None]]:
    """Give the files of a folder that anybody opened, changed or made within; known at its end."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(_IN_NONBLOCK)
    assert handle >= 0, "inotify is not to be had"
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    watches = {libc.inotify_add_watch(handle, os.fsencode(path), _ALL): path for path in folders}
    found: dict[str, None] = {}

    def names() -> None:
        try:
            events = os.read(handle, 1 << 20)
        except BlockingIOError:
            events = b""
        while events:
            watch, mask, _, length = struct.unpack_from("iIII", events)
            name = events[16 : 16 + length].rstrip(b"\0").decode()
            if not mask & _IN_ISDIR:
                found[str(watches[watch] / name)] = None
            events = events[16 + length :]

    try:
        yield found
        names()
    finally:
        os.close(handle)
