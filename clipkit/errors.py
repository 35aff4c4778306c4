"""The exception for what a user wrote: its sentence is printed, the exit code is 2."""

from __future__ import annotations

import re
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


def of_memory(error: BaseException) -> UserError | None:
    """The sentence for memory that ran out, of the machine or of a GPU; None for other errors."""
    text = str(error)
    signs = ("can't allocate memory", "Cannot allocate memory", "CUDA out of memory")
    if not isinstance(error, MemoryError) and not any(sign in text for sign in signs):
        return None
    which = "the GPU's memory" if "CUDA" in text else "memory"
    asked = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", text)
    amount = ""
    if asked:
        amount = f" where {asked[2] or f'{int(asked[1]) / 2**30:.1f} GiB'} more were wanted"
    return UserError(
        f"{which} ran out{amount}; a smaller model.micro_batch (or data.batch_size), "
        "gradient_checkpointing on a tower, or fewer data.num_workers take less"
    )


def did_you_mean(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """The question for a message, with a blank behind it; nothing where nothing is close."""
    close = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}? " if close else ""


def named(items: Sequence[object], shown: int = 3) -> str:
    """The first few of a list, as they are named in a message."""
    rest = ", ..." if len(items) > shown else ""
    return ", ".join(str(item) for item in items[:shown]) + rest
