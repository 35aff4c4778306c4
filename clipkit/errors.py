"""The exception for what a user wrote: its sentence is printed, the exit code is 2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(ValueError):
    """A user's mistake: one sentence with the key, the value and what is accepted."""

    exit_code = 2
    silent = False  # where another process says it

    @property
    def sentence(self) -> str:
        """The message alone, also where a loader's process wrapped it in its traceback."""
        return str(self).rpartition(f"{UserError.__module__}.{UserError.__qualname__}: ")[2].strip()


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The question for a message, with a blank behind it; nothing where nothing is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}? " if close else ""


def named(items: Sequence[object], shown: int = 3) -> str:
    """The first few of a list, as they are named in a message."""
    rest = ", ..." if len(items) > shown else ""
    return ", ".join(str(item) for item in items[:shown]) + rest
