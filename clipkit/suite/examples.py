"""A few samples, right and wrong, with their pictures: for the report that people look at."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from clipkit.data.images import decode_image
from clipkit.suite.whole_file import whole_file
from clipkit.tracking.outcomes import examples_beside

if TYPE_CHECKING:
    from clipkit.data.rows import Rows

EACH = 8
"""How many right ones and how many wrong ones are kept."""

_SIDE = 112


class Example(NamedTuple):
    """One sample that somebody may look at."""

    row: int
    right: bool
    truth: str
    found: str


def choose(
    right: Tensor, truth: Callable[[int], str], found: Callable[[int], str]
) -> list[Example]:
    """Choose samples spread over the data set.

    Args:
        right: (N,) bool, whether a sample was answered rightly
        truth: the right answer for a row
        found: what the model answered.
    """
    chosen = []
    for wanted in (True, False):
        rows: Sequence[int] = (right == wanted).nonzero().flatten().tolist()
        step = max(1, len(rows) // EACH)
        chosen += [Example(row, wanted, truth(row), found(row)) for row in rows[::step][:EACH]]
    return chosen


def write_examples(outcomes: Path, examples: Sequence[Example], rows: Rows) -> None:
    """Write samples as JSON beside the file of outcomes, with thumbnails inside."""
    written = [
        {**example._asdict(), "query": None, "image": _thumbnail(rows, example.row)}
        for example in examples
    ]
    if not written:
        return
    with whole_file(examples_beside(outcomes)) as file:
        file.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")


def _thumbnail(rows: Rows, row: int) -> str:
    picture = decode_image(rows.image(row))
    picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    picture.save(stream, "jpeg", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
