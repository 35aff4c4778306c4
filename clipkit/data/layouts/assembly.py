"""From pictures and columns to the rows of each split: captions chosen, what lacks reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from clipkit.data.layouts.columns import holds_classes, without_caption
from clipkit.data.layouts.fields import locate
from clipkit.data.layouts.request import Request
from clipkit.data.layouts.texts import TextColumns, choose_texts, read_texts
from clipkit.data.rows import Source, StoredRows
from clipkit.errors import named

# Up to this share of a split may be incomplete: it is left out and the report says so. More is an
# error, because nobody reads a report of half the data missing.
MAX_INCOMPLETE_RATIO = 0.01


class Part(NamedTuple):
    """One split as a reader found it."""

    source: Source
    keys: pa.Array


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a reader recognised; `open_layout` makes a Layout of it."""

    name: str
    splits: dict[str, StoredRows]
    image_column: str
    caption_columns: list[str]
    caption_template: str | None  # where captions are made from the names of classes
    notes: list[str]
    revision: str | None = None  # the commit, of a data set of the hub


def assemble(
    request: Request, parts: dict[str, Part], *, name: str, image_column: str, hint: str = ""
) -> Found:
    """Rows of every split, with the caption column that the train split (or the first) suggests.

    Raises:
        UserError: no or a wrong caption column, an empty split, too many incomplete rows.
    """
    model = parts.get("train") or next(iter(parts.values()))
    columns = choose_texts(request, model.source)
    chosen = columns.captions
    templated = any(holds_classes(model.source, column) for column in chosen)
    splits: dict[str, StoredRows] = {}
    notes: list[str] = []
    for split, (source, keys) in parts.items():
        if missing := [column for column in chosen if locate(source, column) is None]:
            raise request.error(
                f"split {split!r} has no column {missing[0]!r}, which captions are read from; its"
                f" columns are: {', '.join(source.columns) or 'none'}"
            )
        texts = read_texts(request, source, _of_split(source, columns))
        if len(texts.captions) != len(source):
            raise request.error(
                f"split {split!r} is damaged: {len(source):,} pictures, {len(texts.captions):,} "
                "captions"
            )
        faults = {"without a picture": source.without_image()}
        # An evaluation needs no captions of classes, which numbers without names cannot make.
        if chosen and (request.captions_required or not templated):
            faults["without a caption"] = without_caption(texts.captions)
        whole, left_out = leave_out(request, split, source, faults, hint=hint)
        if len(whole) == 0:
            raise request.error(f"split {split!r} is empty")
        rows = StoredRows(source, keys=keys, **texts._asdict())
        splits[split] = rows if len(whole) == len(source) else rows.select(whole)
        notes += left_out
    return Found(
        name=name,
        splits=splits,
        image_column=image_column,
        caption_columns=chosen,
        caption_template=request.caption_template if templated else None,
        notes=notes,
    )


def _of_split(source: Source, columns: TextColumns) -> TextColumns:
    """The columns of a split; one other than the first may have no negatives."""
    there = all(locate(source, column) is not None for column in columns.negatives or ())
    return columns if there else columns._replace(negatives=None)


def leave_out(
    request: Request, split: str, source: Source, faults: dict[str, np.ndarray], *, hint: str = ""
) -> tuple[np.ndarray, list[str]]:
    """The positions of the complete rows, and a note for each kind of incomplete ones.

    Args:
        request: what the user asked.
        split: the split's name.
        source: the split's pictures, which name a row in messages.
        faults: what is wrong ("without a caption") to the positions (K,) it is wrong with.
        hint: what else the user can do, ending the message of an error.

    Raises:
        UserError: more than `MAX_INCOMPLETE_RATIO` of the rows are incomplete.
    """
    whole = np.ones(len(source), bool)
    notes = []
    for fault, positions in faults.items():
        positions = positions[whole[positions]]
        whole[positions] = False
        if len(positions):
            names = named([source.row_name(int(position)) for position in positions[:4]])
            notes.append(f"{len(positions):,} of {len(source):,} pairs {fault} ({names})")
    if (~whole).sum() > MAX_INCOMPLETE_RATIO * len(source):
        raise request.error(
            f"split {split!r} has {' and '.join(notes)}; up to {MAX_INCOMPLETE_RATIO:.0%} is left"
            f" out with a note, more has to be corrected or removed{hint}"
        )
    return np.flatnonzero(whole), [f"left out of {split}: {note}" for note in notes]
