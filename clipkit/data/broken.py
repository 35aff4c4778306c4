"""Samples that cannot be made of their rows: why, and which other rows stand in for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image

from clipkit.data.picture_files import ImageDecodeError
from clipkit.errors import UserError

NO_CAPTION = "no caption"
WRONG_TYPE = "wrong type"
CANNOT_BE_READ = "cannot be read"

ATTEMPTS = 32
"""Rows that are tried in the place of a broken one."""


class Broken(NamedTuple):
    """A row of which no sample could be made."""

    row: int  # from 0, of the split as it is kept, or of the shard where there is one
    key: str
    reason: str  # to be counted: one of `picture_files.REASONS`, or a constant above
    detail: str
    stands_in: bool = False  # it was itself to stand in for another
    source: str = ""  # its name, where there are several
    shard: str = ""  # of a stream: the file that its rows are counted in


class BrokenRowError(Exception):
    """A row of which no sample can be made."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(detail or reason)
        self.reason = reason


@contextmanager
def finding_broken() -> Iterator[None]:
    """Whatever fails inside because of what a row holds becomes a BrokenRowError."""
    try:
        yield
    except ImageDecodeError as error:
        raise BrokenRowError(error.reason, str(error)) from error
    except OSError as error:
        raise BrokenRowError(CANNOT_BE_READ, str(error)) from error


def check_picture(picture: object) -> None:
    """Raise a BrokenRowError for what is no picture by its type."""
    if not isinstance(picture, bytes | str | Image.Image):
        raise BrokenRowError(WRONG_TYPE, f"the picture is of type {type(picture).__name__}")


def stand_ins(number: int, *, length: int, seed: tuple[int, ...]) -> Iterator[int]:
    """Yield the number of a pair, then those tried in its place: a function of the seed alone."""
    yield number
    rng = np.random.default_rng((*seed, number, 1))
    for _ in range(ATTEMPTS):
        yield int(rng.integers(length))


def nothing_usable(broken: list[Broken], *, hint: str = "") -> UserError:
    """Return the error for a row in whose place no other could be taken either.

    Args:
        broken: all of them.
        hint: what else there is to say, ending the message.
    """
    first = broken[0]
    return UserError(
        f"data: {len(broken)} pairs tried in turn cannot be used; the first is {first.key!r} "
        f"({first.reason}: {first.detail}){hint}"
    )
