"""Whether word order and attributes are understood: SugarCrepe and Winoground."""

from __future__ import annotations

from typing import Any

import torch

from clipkit.errors import UserError
from clipkit.evaluation.compositionality import (
    sugarcrepe,
    sugarcrepe_metrics,
    winoground,
    winoground_metrics,
)
from clipkit.suite.embedder import Embedder
from clipkit.suite.opening import Opened, Splits, other_pictures
from clipkit.suite.outcomes import Measured, Outcome
from clipkit.suite.tasks.base import Task


class SugarCrepe(Task):
    """A picture's caption against the same caption with one thing changed.

    The first two captions of a row are the right one and the wrong one.
    """

    kind = "sugarcrepe"
    measures = ("accuracy",)

    def check(self, opened: Opened) -> None:
        short = sum(len(captions) < 2 for captions in opened.rows.all_captions())
        if short:
            raise UserError(
                f"{short} rows have no second caption, the wrong one; name both columns, as in "
                "caption_column: '*caption'"
            )

    def texts(self, opened: Opened) -> list[str]:
        return [text for captions in opened.rows.all_captions() for text in captions[:2]]

    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        test = splits.test
        numbers = torch.arange(len(test.rows))
        # A picture that stands in several rows is one: its examples are not independent.
        first: dict[str, int] = {}
        images = torch.tensor([first.setdefault(k, i) for i, k in enumerate(test.rows.keys())])
        found = sugarcrepe(
            embedder.images(test.data, test.rows),
            embedder.texts(self.texts(test)),
            images,
            torch.stack([2 * numbers, 2 * numbers + 1], dim=1),
        )
        outcome = Outcome("accuracy", numbers, found.groups, found.accuracy)
        return Measured(sugarcrepe_metrics(found), [outcome])


_PICTURES = ("image_0", "image_1")


class Winoground(Task):
    """Two pictures and two captions of the same words; columns image_0, image_1, caption_0, ..."""

    kind = "winoground"
    measures = ("group", "text", "image")

    def texts(self, opened: Opened) -> list[str]:
        columns = (opened.rows.column(f"caption_{which}") for which in (0, 1))
        return [str(text) for pair in zip(*columns, strict=True) for text in pair]

    def settings(self, splits: Splits) -> dict[str, Any]:
        # The digest of the rows knows the pictures of one column.
        digests = [other_pictures(splits.test, column).digest for column in _PICTURES]
        return {**super().settings(splits), "pictures": digests}

    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        test = splits.test
        sides = [other_pictures(test, column) for column in _PICTURES]
        pictures = [embedder.images(side.data, side.rows) for side in sides]
        numbers = torch.arange(len(test.rows))
        found = winoground(
            torch.cat(pictures),
            embedder.texts(self.texts(test)),
            torch.stack([numbers, numbers + len(numbers)], dim=1),
            torch.stack([2 * numbers, 2 * numbers + 1], dim=1),
        )
        outcomes = [
            Outcome(name, numbers, found.groups, getattr(found, name))
            for name in ("text", "image", "group")
        ]
        return Measured(winoground_metrics(found), outcomes)
