"""From what a suite or a recipe says of a data set to its rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from clipkit.errors import UserError
from clipkit.suite.eval_data import Classes, EvalData, open_classes

if TYPE_CHECKING:
    from clipkit.data.pairs import PairDataModule
    from clipkit.data.rows import Rows

OPTION = "EvalData.path"


@dataclass(frozen=True)
class Opened:
    """A data set and its rows; what the data set says of its classes is filled in."""

    data: EvalData
    rows: Rows
    revision: str | None = None

    @cached_property
    def classes(self) -> Classes:
        """The class of each row, and the names of the classes."""
        return open_classes(self.data, self.rows)

    @cached_property
    def digest(self) -> str:
        """Hex digest of keys, captions, labels and sizes of the pictures, where they are known.

        It is equal where the same samples are scored against the same answers.
        """
        digest = blake2b(self.rows.digest().encode(), digest_size=16)
        for column in (self.data.label_column, "targets"):
            try:
                answers = self.rows.column(column), self.rows.class_names(column)
            except UserError:
                continue  # there is no such column
            digest.update(repr(answers).encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class Splits(NamedTuple):
    """What a task is given: the rows it is judged on, and those that a probe learns from."""

    test: Opened
    train: Opened | None = None
    validation: Opened | None = None


def open_data(data: EvalData, training: PairDataModule | None = None) -> Opened:
    """Open a split for evaluation; no picture is decoded.

    Args:
        data: which data set; without a path, that of the run.
        training: the run's own data module.

    Raises:
        UserError: it is not there, or lacks the split.
    """
    opened = _open(data, training)
    if data.limit is None:
        return opened
    return replace(opened, rows=opened.rows[: data.limit])


def _open(data: EvalData, training: PairDataModule | None) -> Opened:
    if data.path is None:
        if training is None:
            raise UserError(f"{OPTION}: needed where there is no data module")
        rows = training.evaluation_rows(
            data.split, image_column=data.image_column, caption_column=data.caption_column
        )
        return Opened(data, rows)
    # pyarrow is needed from here on, and not to train.
    from clipkit.data.layouts import open_layout
    from clipkit.suite.builtin import BUILTIN, open_builtin
    from clipkit.suite.clip_benchmark import is_folder, open_folder, open_sugar_crepe

    if data.path in BUILTIN:
        return Opened(data, open_builtin(data.path, data.split, caption_column=data.caption_column))
    if is_folder(data.path):
        folder = open_folder(data.path, data.split, class_names=data.class_names, option=OPTION)
        return Opened(folder.complete(data), folder.rows, folder.revision)
    if data.path.endswith(".json"):
        return Opened(data, open_sugar_crepe(data.path, option=OPTION))
    layout = open_layout(
        data.path,
        image_column=data.image_column,
        caption_column=data.caption_column,
        image_folder=data.image_folder,
        captions_required=False,
        option=OPTION,
    )
    return Opened(data, layout.split(data.split), layout.revision)


def other_pictures(opened: Opened, image_column: str) -> Opened:
    """Open the same split with the pictures of another column."""
    return open_data(replace(opened.data, image_column=image_column))
