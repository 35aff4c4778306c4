"""What of a data set is read as text: captions of its pictures, and what is no caption of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from clipkit.data.layouts.columns import (
    choose_captions,
    named_columns,
    read_captions,
    read_weighed_captions,
)
from clipkit.data.layouts.request import Request
from clipkit.data.rows import Source


class TextColumns(NamedTuple):
    """The columns that texts come from."""

    groups: Sequence[Sequence[str]]  # of captions: as one, or one for each weight
    negatives: Sequence[str] | None  # None where nobody asks for such

    @property
    def captions(self) -> list[str]:
        """All columns of captions."""
        return [column for group in self.groups for column in group]


class Texts(NamedTuple):
    """The texts of every row, as `StoredRows` takes them."""

    captions: pa.Array  # (N,) strings, or lists of strings
    counts: np.ndarray | None  # (N, C) how many captions each weighed column gave
    negatives: pa.Array | None  # (N,)


def choose_texts(request: Request, model: Source) -> TextColumns:
    """Return the columns that the request names, or that are found in a source.

    Raises:
        UserError: one does not exist, or none is found and one is required.
    """
    groups = choose_captions(request, model)
    wanted = request.negative_column
    negatives = wanted and named_columns(request, model, "negative_column", wanted)
    return TextColumns(groups, negatives or None)


def read_texts(request: Request, source: Source, columns: TextColumns) -> Texts:
    """Return the texts of every row.

    Raises:
        UserError: a column holds no text.
    """
    counts = negatives = None
    with source.together([*columns.captions, *(columns.negatives or ())]):
        if isinstance(request.caption_column, dict):
            captions, counts = read_weighed_captions(request, source, columns.groups)
        else:
            captions = read_captions(request, source, columns.captions)
        if columns.negatives is not None:
            negatives = read_captions(request, source, columns.negatives)
    return Texts(captions, counts, negatives)
