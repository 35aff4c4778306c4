"""How far a preparation is, where it takes more than a few seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")

_SECONDS = 3.0


def progress(values: Iterable[T], what: str, total: int | None, unit: str) -> Iterator[T]:
    """The values, with a bar on a terminal, and elsewhere a line, if they take long.

    Args:
        values: what is worked through.
        what: the work, in words.
        total: how many there are, where that is known.
        unit: what one of them is.
    """
    from tqdm import tqdm

    if sys.stderr.isatty():
        with tqdm(values, what, total, unit=unit, delay=_SECONDS, leave=False) as bar:
            yield from bar
        return
    began, said = time.monotonic(), False
    for number, value in enumerate(values):
        yield value
        if not said and time.monotonic() - began > _SECONDS:
            said = True
            of = "" if total is None else f" of {total:,}"
            log.info(f"data: {what}, {number + 1:,}{of} {unit}s so far")
