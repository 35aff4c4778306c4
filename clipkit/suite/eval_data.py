"""What to evaluate on: a split of any data set, its classes, its captions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from clipkit.errors import UserError
from clipkit.evaluation.prompts import readable

if TYPE_CHECKING:
    from clipkit.data.rows import Rows


@dataclass(frozen=True, kw_only=True)
class EvalData:
    """A data set for evaluation.

    Args:
        path: anything that ``data.dataset`` takes; left out, the data the run trains on.
        split: which of its splits.
        when: ``epoch`` evaluates before the first step and after every epoch; ``end`` once, when
            training is over: what is reported there has chosen nothing.
        image_column: found by its name where left out.
        caption_column: for retrieval; found by its name where left out.
        label_column: for classification.
        class_names: names of the classes in the order of their labels; left out, what the data
            set says.
        class_name_column: a text column whose value names each row's class better than the label.
        templates: prompts with ``{}`` for the name: a list, one, or a named set such as ``photo``.
        prompts: written-out prompts of every class by its name, instead of templates.
        limit: evaluate the first so many rows only.
    """

    path: str | None = None
    split: str = "validation"
    when: Literal["epoch", "end"] = "epoch"
    image_column: str | None = None
    caption_column: str | None = None
    label_column: str = "label"
    class_names: list[str] | None = None
    class_name_column: str | None = None
    templates: str | list[str] = field(default="photo")
    prompts: dict[str, list[str]] | None = None
    limit: int | None = None

    def of_split(self, split: str) -> EvalData:
        """Return the same for another split, all of it."""
        return self if split == self.split else replace(self, split=split, limit=None)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"EvalData.limit: {self.limit} is not a positive number of rows")


@dataclass(frozen=True)
class Classes:
    """Labels of the rows and the names they stand for."""

    labels: np.ndarray  # (N,) int64
    names: list[str]  # C


def open_classes(data: EvalData, rows: Rows) -> Classes:
    """Return label ids and readable class names of the rows."""
    found = rows.labels(data.label_column)
    names = [readable(name) for name in found.names]
    if data.class_names is not None and _is_text(rows.column(data.label_column)):
        return _by_name(data, found.ids, names)
    if data.class_names is not None:
        if len(data.class_names) < len(names):
            raise UserError(
                f"EvalData.class_names: {len(data.class_names)} names for the {len(names)} classes "
                f"of column {data.label_column!r}"
            )
        names = list(data.class_names)
    if data.class_name_column is not None:
        for label, name in zip(found.ids, rows.column(data.class_name_column), strict=True):
            names[int(label)] = str(name)
    return Classes(found.ids, names)


def _is_text(values: list[Any]) -> bool:
    return any(isinstance(value, str) and not value.isdecimal() for value in values)


def _by_name(data: EvalData, ids: np.ndarray, names: list[str]) -> Classes:
    """Return labels that are words as places in the list of names."""
    wanted = list(data.class_names or [])
    place = {readable(name): number for number, name in reversed([*enumerate(wanted)])}
    unknown = sorted({names[int(number)] for number in ids} - place.keys())
    if unknown:
        raise UserError(
            f"EvalData.class_names: column {data.label_column!r} holds {unknown[0]!r}, which is "
            "not in the list"
        )
    numbers = np.array([place.get(name, -1) for name in names], np.int64)
    return Classes(numbers[ids], wanted)
