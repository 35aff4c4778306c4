"""What to evaluate on: a split of any data set, its classes, its captions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from clipkit.errors import UserError, named
from clipkit.evaluation.prompts import Prompts, collect, expand, readable

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
        image_folder: the folder that paths of pictures in a list are relative to, and may not
            leave; left out, the list's own.
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
    image_folder: str | None = None
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


def refuse_set_name(name: str) -> str:
    """Return what is wrong with a data set's name in metrics and files; '' for a good one."""
    if re.fullmatch(r"[\w-][\w -]*", name):
        return ""
    return f"{name!r} names metrics and files; use letters, digits, _, - and blanks"


@dataclass(frozen=True)
class Classes:
    """Labels of the rows and the names they stand for."""

    labels: np.ndarray  # (N,) int64
    names: list[str]  # C


def open_classes(data: EvalData, rows: Rows) -> Classes:
    """Return label ids and readable class names of the rows."""
    found = rows.labels(data.label_column)
    names = [readable(name) for name in found.names]
    if data.class_names is not None and found.are_words:
        return _by_name(data, found.ids, names)
    if data.class_names is not None:
        if len(data.class_names) < len(names):
            raise UserError(
                f"EvalData.class_names: {len(data.class_names)} names for the {len(names)} classes "
                f"of column {data.label_column!r}"
            )
        names = list(data.class_names)
    if data.class_name_column is not None:
        # Of all rows, so that a class none of these shows has its name too.
        everything, labels = rows.unselected(), found.ids
        try:
            labels = everything.labels(data.label_column).ids
        except UserError:  # of a row that was left out as incomplete
            everything = rows
        for label, name in zip(labels, everything.column(data.class_name_column), strict=True):
            names[int(label)] = str(name)
    return Classes(found.ids, names)


def prompts_for(data: EvalData, class_names: Sequence[str]) -> Prompts:
    """Return the prompts of the classes: those written out for each, or filled templates.

    Raises:
        UserError: a class has no prompts, or a template no place for the name.
    """
    if data.prompts is None:
        return expand(class_names, data.templates)
    prompts = {readable(name): texts for name, texts in data.prompts.items()} | data.prompts
    spelled = [name if name in prompts else readable(name) for name in class_names]
    lacking = [name for name in spelled if not prompts.get(name)]
    if lacking:
        raise UserError(
            f"EvalData.prompts: {len(lacking)} of {len(class_names)} classes have no prompts "
            f"({named([repr(name) for name in lacking])})"
        )
    return collect(prompts[name] for name in spelled)


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
