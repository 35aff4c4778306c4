"""A command that meets a hostile file: what it said, how it ended, and what it did besides."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.hostile.crafted import CASES, EVIL_CODE, Place, Words
from tests.hostile.watching import EVIL, watched

MEMORY = 4 * 2**30
"""Bytes that a command may take on top of what its process has already."""


@dataclass(frozen=True)
class Ending:
    """How a command ended."""

    words: Words
    code: int | str
    said: str
    crimes: list[str]

    @property
    def complaints(self) -> list[str]:
        """What is wrong with it; right is a harmless success, or exit code 2 and one line."""
        found = list(self.crimes)
        lines = self.said.splitlines()
        # A benchmark says in its table which task failed, goes on, and ends with 1.
        if self.code not in ((0, 1, 2) if self.words[0] == "benchmark" else (0, 2)):
            found.append(f"ended with {self.code}")
        elif self.code == 2 and (len(lines) != 1 or not lines[0].startswith("clipkit: ")):
            found.append(f"said {len(lines)} lines")
        elif self.code == 2 and len(lines[0]) > 1000:
            found.append(f"said a line of {len(lines[0])} letters")
        return found


def place_of(root: Path, checkpoint: Path, pictures: Path, recipe: str) -> Place:
    """Lay out the folders of a case."""
    place = Place(root / "inside", root / "outside", checkpoint, pictures)
    place.prepare()
    (place.inside / "pictures").symlink_to(pictures)
    (place.inside / "tiny.yaml").write_text(recipe)
    return place


def endings(place: Place, name: str) -> Iterator[Ending]:
    """Run every command of a case, one after another, in the folder of its place."""
    doors = CASES[name](place)
    for words in doors:
        yield meet(place, words)


def meet(place: Place, words: Words) -> Ending:
    """Run a command in this process, watched, with little memory."""
    shutil.rmtree(place.inside / "__pycache__", ignore_errors=True)
    said = io.StringIO()
    before, path = os.getcwd(), list(sys.path)
    os.chdir(place.inside)
    try:
        with (
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
            little_memory(),
            watched(place.inside, place.outside, [place.checkpoint.parent]) as crimes,
        ):
            warnings.simplefilter("ignore")
            code = _run(words)
    finally:
        os.chdir(before)
        sys.path[:] = path
    marks = [*place.inside.rglob("ran"), *place.outside.rglob("ran")]
    crimes.extend(f"ran code, see {mark}" for mark in marks)
    if EVIL in sys.modules:
        crimes.append("evil is imported")
        del sys.modules[EVIL]
    for mark in marks:
        mark.unlink()
    if (place.outside / "evil.py").read_text() != EVIL_CODE:
        crimes.append("evil.py is another")
    return Ending(words, code, said.getvalue(), crimes)


def _run(words: Words) -> int | str:
    from clipkit.cli import main

    try:
        if words[0] == "load":
            return _load(words[1], [*words[3:]])
        return main(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else str(stop.code)
    except BaseException as error:  # what panics in Rust is no Exception
        return "".join(traceback.format_exception(error)[-3:])[-1500:]


def _load(path: str, trust: list[str]) -> int:
    import clipkit
    from clipkit.errors import UserError

    try:
        clipkit.load(path, trust=trust)
    except UserError as error:
        print(f"clipkit: {error}", file=sys.stderr)
        return 2
    return 0


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let the process take no more than `MEMORY` on top of what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
