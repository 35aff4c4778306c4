"""One data set that somebody stored: which columns are read, what is trained on, what is held out.

`PairSource` is what a recipe says of it, `StoredPairs` the data set opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from clipkit.data.caption_choice import CaptionChoice, CaptionPolicy
from clipkit.data.filters import Filters, Kept, filtered
from clipkit.data.images import Augmentation
from clipkit.data.pairs import TRAIN, VALIDATION
from clipkit.data.sampling import check_weights
from clipkit.errors import UserError

if TYPE_CHECKING:
    from clipkit.data.layouts import Layout
    from clipkit.data.rows import Rows, StoredRows

FEW = 50
"""Validation pairs below which a score's interval is wider than most differences."""


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """A data set from the Hugging Face hub or from a local folder or file.

    Where there is no validation split, 5 % of the training pictures (at least 1, at most 1,000)
    are held out by a hash of each picture's key.

    Args:
        dataset: a hub id, or a folder or file: a data set folder, parquet, pictures with metadata,
            name.jpg beside name.txt, a sub-folder a class, csv or tsv, webdataset tar shards.
        image_column: found by its name where left out.
        caption_column: a column, a pattern of several, a field of JSON objects such as
            `meta.caption`, or several such with weights; found by its name where left out.
        caption_template: makes a caption of a class's name, where folders are classes.
        captions: which caption of a picture that has several: random (drawn anew each epoch),
            first, longest, or all (a pair each).
        negative_column: captions that are wrong on purpose, one of which is a negative beside
            those of the batch.
        filters: what a training row has to be.
        train_split: the split to train on.
        image_folder: the folder that paths of pictures in a list are relative to, and may not
            leave; left out, the list's own.
        augment: how training pictures are varied, where this data is varied in a way of its own.
        weight: this data's part of an epoch, of the sum of all weights.
    """

    dataset: str = ""
    image_column: str | None = None
    caption_column: str | dict[str, float] | None = None
    caption_template: str = "a photo of a {}."
    captions: CaptionPolicy = "random"
    negative_column: str | None = None
    filters: Filters | None = None
    train_split: str = TRAIN
    image_folder: str | None = None
    augment: Augmentation | bool | None = None
    weight: float | None = None


class StoredPairs:
    """The pairs of a source, opened when they are asked for.

    Args:
        source: what to read.
        option: the YAML key that it stands under, for messages.
        cache_folder: where the index of many tar shards is kept; the user's cache folder if None.

    Raises:
        UserError: its captions are asked for in two ways that exclude one another.
    """

    def __init__(self, source: PairSource, *, option: str, cache_folder: str | None = None) -> None:
        if not source.dataset:
            raise UserError(f"{option}.dataset: needed; a hub id, a folder or a file is accepted")
        self.source = source
        self.option = option
        self.cache_folder = cache_folder
        columns = source.caption_column
        weights = None
        if isinstance(columns, dict):
            check_weights(f"{option}.caption_column", columns)
            weights = tuple(columns.values())
        if weights is not None and source.captions == "all":
            raise UserError(
                f"{option}.caption_column: with {option}.captions 'all' every caption makes a "
                "pair, so that columns have no weights; name a column or a pattern of several"
            )
        self.captions = CaptionChoice(source.captions, weights)
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._kept: Kept | None = None
        self._held_out_hashes: np.ndarray | None = None

    def rows(self, split: str) -> Rows:
        """Return the rows of a split; of training those that fit the filters."""
        return self._training().rows if split == TRAIN else self.evaluation_rows(split)

    def has(self, split: str) -> bool:
        """Whether there is such a split, or one that is held out."""
        return split == VALIDATION or split in self._layout().splits

    def evaluation_rows(
        self, split: str, *, image_column: str | None = None, caption_column: str | None = None
    ) -> StoredRows:
        """Return all rows of a split, which may read other columns."""
        layout = self._layout(image_column, caption_column)
        train = self.source.train_split
        if split == TRAIN:
            split = train
        if split in (train, VALIDATION) and not layout.splits.keys() & {train, split}:
            raise UserError(
                f"{self.option}.train_split: {self.source.dataset!r} has no split {train!r}; it "
                f"has: {', '.join(layout.splits)}"
            )
        if VALIDATION in layout.splits or split not in (train, VALIDATION):
            return layout.split(split)
        rows = layout.split(train)
        held_out = np.isin(rows.key_hashes(), self._held_out())
        return rows.select(np.flatnonzero(held_out == (split == VALIDATION)))

    def describe(self) -> str:
        """Return what the data is, in one line."""
        layout = self._layout()
        said = layout.describe()
        if VALIDATION not in layout.splits and self.source.train_split in layout.splits:
            validation = self.evaluation_rows(VALIDATION)
            said += f"; {len(validation):,} of them held out as validation"
            if len(validation) < FEW:
                said += f" (fewer than {FEW}: what is measured on them says little)"
        if self.source.filters is not None:
            said += self._training().describe()
        return said

    def fingerprint(self) -> str:
        """Return a digest that changes with the data, and with what of it is trained on."""
        return self.chosen_of(self._layout().fingerprint)

    def chosen_of(self, fingerprint: str) -> str:
        """Return a digest of data and of what of it is trained on, of the digest of the data."""
        columns, filters = self.source.caption_column, self.source.filters
        chosen = [part for part in (isinstance(columns, dict) and columns, filters) if part]
        if not chosen:
            return fingerprint
        return blake2b(repr((fingerprint, chosen)).encode(), digest_size=16).hexdigest()

    def _training(self) -> Kept:
        if self._kept is None:
            self._kept = filtered(
                self.evaluation_rows(TRAIN), self.source.filters, option=f"{self.option}.filters"
            )
        return self._kept

    def _held_out(self) -> np.ndarray:
        """Return the hashes of the pictures kept from training, whichever columns are read."""
        if self._held_out_hashes is None:
            from clipkit.data.rows import hold_out

            _, validation = hold_out(self._layout().split(self.source.train_split))
            self._held_out_hashes = np.unique(validation.key_hashes())
        return self._held_out_hashes

    def _layout(self, image_column: str | None = None, caption_column: str | None = None) -> Layout:
        from clipkit.data.layouts import open_layout

        columns = (image_column, caption_column)
        if columns not in self._layouts:
            self._layouts[columns] = open_layout(
                self.source.dataset,
                image_column=image_column or self.source.image_column,
                caption_column=caption_column or self.source.caption_column,
                negative_column=self.source.negative_column,
                caption_template=self.source.caption_template,
                image_folder=self.source.image_folder,
                cache_folder=self.cache_folder,
                option=f"{self.option}.dataset",
            )
        return self._layouts[columns]
