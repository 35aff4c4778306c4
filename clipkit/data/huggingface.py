"""HuggingFacePairs: pairs from a hub id, or from a local folder or file as people keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from clipkit.data.images import Augmentation
from clipkit.data.pairs import TRAIN, VALIDATION, CaptionPolicy, PairDataModule
from clipkit.data.streaming import Streaming
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.data.layouts import Layout
    from clipkit.data.rows import Rows
    from clipkit.data.streaming.opening import StreamedData
    from clipkit.data.streaming.splits import Columns, StreamedSplits
    from clipkit.data.streaming.stream import Stream


FEW = 50
"""Validation pairs below which a score's interval is wider than most differences."""


class HuggingFacePairs(PairDataModule):
    """Pairs from the Hugging Face hub or from a local folder or file.

    Where there is no validation split, 5 % of the training pictures (at least 1, at most 1,000)
    are held out by a hash of each picture's key.

    Args:
        dataset: a hub id, or a folder or file: a data set folder, parquet, pictures with metadata,
            name.jpg beside name.txt, a sub-folder a class, csv or tsv, webdataset tar shards.
        image_column: found by its name where left out.
        caption_column: found by its name where left out.
        caption_template: makes a caption of a class's name, where folders are classes.
        train_split: the split to train on.
        streaming: read the data set from its beginning on instead of opening it as a whole; true is
            `Streaming` as it stands. A hub id is then not downloaded first.
        batch_size: pairs that the loss sees per step over all ranks together.
        num_workers: loader processes a rank; results do not depend on it. Left out: none on a
            machine without a GPU, else the cores a rank has, at most 8.
        captions: which caption of a picture that has several: random (drawn anew each epoch),
            first, longest, or all (a pair each).
        augment: how training pictures are varied; true is CLIP's mild crop, false leaves them as
            in evaluation.
        shrink_batch: where the data cannot fill a batch, take half the data instead of an error.
        shrink_pictures: the short side in pixels that larger training pictures are brought to
            before they are cropped; true is what the smallest crop needs. Crops are the same, their
            pixels are resized twice: about one grey level of difference.
        cache_tokens: keep the tokens of every caption on disk, about 60 bytes a caption.
        cache_pictures_gb: keep decoded pictures on disk, as many of each split as this many
            gigabytes hold: those of evaluation as it sees them, those of training if they are
            shrunk or not augmented. Batches are the same with and without.
        cache_folder: where both are kept; left out, `clipkit` in the user's cache folder.
        max_broken_ratio: the share of samples that may be broken (a picture that cannot be
            decoded, no caption) before the run stops. Others stand in for them.
        image_size: pixels a side, where no trainer says it.
        image_sizes: pixels a side of training pictures from an epoch on, counted from 0, such as
            {0: 112, 24: 224}; before the first and without any, the image encoder's own size.
        tokenizer: where no trainer says it.
        seed: of order and augmentation; left out, the run's seed.
    """

    def __init__(
        self,
        dataset: str,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
        caption_template: str = "a photo of a {}.",
        train_split: str = TRAIN,
        streaming: Streaming | bool = False,
        batch_size: int = 256,
        num_workers: int | None = None,
        captions: CaptionPolicy = "random",
        augment: Augmentation | bool = True,
        shrink_batch: bool = False,
        shrink_pictures: bool | int = False,
        cache_tokens: bool = False,
        cache_pictures_gb: float = 0.0,
        cache_folder: str | None = None,
        max_broken_ratio: float = 0.01,
        image_size: int | None = None,
        image_sizes: dict[int, int] | None = None,
        tokenizer: Tokenizer | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            captions=captions,
            augment=augment,
            shrink_batch=shrink_batch,
            shrink_pictures=shrink_pictures,
            cache_tokens=cache_tokens,
            cache_pictures_gb=cache_pictures_gb,
            cache_folder=cache_folder,
            max_broken_ratio=max_broken_ratio,
            image_size=image_size,
            image_sizes=image_sizes,
            tokenizer=tokenizer,
            seed=seed,
        )
        self.dataset = dataset
        self.image_column = image_column
        self.caption_column = caption_column
        self.caption_template = caption_template
        self.train_split = train_split
        self.streaming = (
            (Streaming() if streaming else None) if isinstance(streaming, bool) else (streaming)
        )
        self._splits: StreamedSplits | None = None
        self._layouts: dict[tuple[str | None, str | None], Layout] = {}
        self._held_out_hashes: np.ndarray | None = None

    def load(self, split: str) -> Rows:
        return self.evaluation_rows(split)

    def evaluation_rows(
        self, split: str, *, image_column: str | None = None, caption_column: str | None = None
    ) -> Rows:
        columns = (image_column or self.image_column, caption_column or self.caption_column)
        if self.streaming is not None:
            return self._streamed_splits(self.streaming).rows(split, columns)
        layout = self._layout(*columns)
        if split == TRAIN:
            split = self.train_split
        if split in (self.train_split, VALIDATION) and not layout.splits.keys() & {
            self.train_split,
            split,
        }:
            raise UserError(
                f"data.train_split: {self.dataset!r} has no split {self.train_split!r}; it has: "
                f"{', '.join(layout.splits)}"
            )
        if VALIDATION in layout.splits or split not in (self.train_split, VALIDATION):
            return layout.split(split)
        rows = layout.split(self.train_split)
        held_out = np.isin(rows.key_hashes(), self._held_out())
        return rows.select(np.flatnonzero(held_out == (split == VALIDATION)))

    def stream(self) -> Stream | None:
        if self.streaming is None:
            return None
        splits = self._streamed_splits(self.streaming)
        return splits.stream(seed=self.seed, every_caption=self.captions == "all")

    def _streamed_splits(self, options: Streaming) -> StreamedSplits:
        from clipkit.data.streaming.splits import StreamedSplits

        if self._splits is None:
            self._splits = StreamedSplits(
                options,
                columns=(self.image_column, self.caption_column),
                train_split=self.train_split,
                opened=self._open_stream,
            )
        return self._splits

    def _open_stream(self, columns: Columns) -> StreamedData:
        from clipkit.data.streaming.opening import open_stream

        image_column, caption_column = columns
        return open_stream(
            self.dataset,
            image_column=image_column,
            caption_column=caption_column,
            caption_template=self.caption_template,
        )

    def _held_out(self) -> np.ndarray:
        """Return the hashes of the pictures kept from training, whichever columns are read."""
        if self._held_out_hashes is None:
            from clipkit.data.rows import hold_out

            layout = self._layout(self.image_column, self.caption_column)
            _, validation = hold_out(layout.split(self.train_split))
            self._held_out_hashes = np.unique(validation.key_hashes())
        return self._held_out_hashes

    def describe(self) -> str:
        if self.streaming is not None:
            return f"data: {self._streamed_splits(self.streaming).describe()}"
        layout = self._layout(self.image_column, self.caption_column)
        held_out = ""
        if VALIDATION not in layout.splits and self.train_split in layout.splits:
            validation = self.evaluation_rows(VALIDATION)
            held_out = f"; {len(validation):,} of them held out as validation"
            if len(validation) < FEW:
                held_out += f" (fewer than {FEW}: what is measured on them says little)"
        return f"data: {layout.describe()}{held_out}"

    def fingerprint(self) -> str:
        if self.streaming is not None:
            return self._streamed_splits(self.streaming).fingerprint
        return self._layout(self.image_column, self.caption_column).fingerprint

    def _layout(self, image_column: str | None, caption_column: str | None) -> Layout:
        from clipkit.data.layouts import open_layout

        columns = (image_column, caption_column)
        if columns not in self._layouts:
            self._layouts[columns] = open_layout(
                self.dataset,
                image_column=image_column,
                caption_column=caption_column,
                caption_template=self.caption_template,
            )
        return self._layouts[columns]
