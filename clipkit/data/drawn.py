"""Drawn pictures as rows, so that whatever reads a data set reads them too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from clipkit.data.drawing import CLASS_NAMES, Drawing, Split, captions, draw, sample
from clipkit.data.rows import Labels, Row, Rows
from clipkit.errors import UserError


class DrawnRows(Rows):
    """Pictures drawn when they are asked for; nothing is kept.

    Args:
        split: train, validation (the same combinations of colour and shape), unseen (those that
            training never shows) or test (all).
        length: number of pictures.
        seed: equal seeds draw equal pictures, everywhere.
        size: pixels a side.
        index: which of the pictures this selection consists of; None for all.
    """

    def __init__(
        self, split: Split, *, length: int, seed: int, size: int, index: np.ndarray | None = None
    ) -> None:
        self.split = split
        self.length = length
        self.seed = seed
        self.size = size
        self._index = index

    def __len__(self) -> int:
        return self.length if self._index is None else len(self._index)

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(draw(self._drawing(index), self.size))

    def captions(self, index: int) -> list[str]:
        return captions(self._drawing(index))

    def key(self, index: int) -> str:
        return f"{self.split}-{self.position(index)}"

    def keys(self) -> list[str]:
        return [self.key(index) for index in range(len(self))]

    def all_captions(self) -> Iterator[list[str]]:
        return (self.captions(index) for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        return Row(self.image(index), self.captions(index), self.key(index))

    @property
    def columns(self) -> list[str]:
        return ["label"]

    def column(self, name: str) -> list[Any]:
        self._check(name)
        return [self._drawing(index).label for index in range(len(self))]

    def class_names(self, name: str) -> list[str] | None:
        self._check(name)
        return list(CLASS_NAMES)

    def labels(self, name: str) -> Labels:
        return Labels(np.array(self.column(name), np.int64), list(CLASS_NAMES))

    def select(self, index: Sequence[int] | np.ndarray) -> Rows:
        chosen = np.asarray(index, np.int64)
        if self._index is not None:
            chosen = self._index[chosen]
        return DrawnRows(
            self.split, length=self.length, seed=self.seed, size=self.size, index=chosen
        )

    def _drawing(self, index: int) -> Drawing:
        return sample(self.seed, self.split, self.position(index))

    def _check(self, name: str) -> None:
        if name != "label":
            raise UserError(f"there is no column {name!r}; drawn pictures have: label")
