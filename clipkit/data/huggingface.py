"""HuggingFacePairs: pairs from a hub id, or from a local folder or file as people keep them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipkit.data.caption_choice import CaptionChoice, CaptionPolicy
from clipkit.data.filters import Filters, RowFilters
from clipkit.data.images import Augmentation
from clipkit.data.pair_source import PairSource, StoredPairs
from clipkit.data.pairs import TRAIN, PairDataModule
from clipkit.data.streaming import Streaming
from clipkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.data.rows import Rows
    from clipkit.data.streaming.opening import StreamedData
    from clipkit.data.streaming.splits import Columns, StreamedSplits
    from clipkit.data.streaming.stream import Stream


class HuggingFacePairs(PairDataModule):
    """Pairs from the Hugging Face hub or from a local folder or file.

    Where there is no validation split, 5 % of the training pictures (at least 1, at most 1,000)
    are held out by a hash of each picture's key.

    Args:
        dataset: a hub id, or a folder or file: a data set folder, parquet, pictures with metadata,
            name.jpg beside name.txt, a sub-folder a class, csv or tsv, webdataset tar shards.
        image_column: found by its name where left out.
        caption_column: a column, a pattern of several, a field of JSON objects such as
            `meta.caption`, or several such with weights, `{alt_text: 0.3, synthetic: 0.7}`: for
            each sample one of those with a caption is drawn. Found by its name where left out.
        caption_template: makes a caption of a class's name, where folders are classes.
        negative_column: captions that are wrong on purpose, one of which is a negative beside
            those of the batch.
        filters: what a training row has to be.
        train_split: the split to train on.
        image_folder: the folder that paths of pictures in a list are relative to, and may not
            leave; left out, the list's own.
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
        caption_column: str | dict[str, float] | None = None,
        caption_template: str = "a photo of a {}.",
        negative_column: str | None = None,
        filters: Filters | None = None,
        train_split: str = TRAIN,
        image_folder: str | None = None,
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
        source = PairSource(
            dataset=dataset,
            image_column=image_column,
            caption_column=caption_column,
            caption_template=caption_template,
            captions=captions,
            negative_column=negative_column,
            filters=filters,
            train_split=train_split,
            image_folder=image_folder,
        )
        self.stored = StoredPairs(source, option="data", cache_folder=cache_folder)
        self.streaming = Streaming() if streaming is True else (streaming or None)
        self._splits: StreamedSplits | None = None

    def load(self, split: str) -> Rows:
        if self.streaming is not None:
            return self.evaluation_rows(split)
        return self.stored.rows(split)

    def caption_choice(self) -> CaptionChoice:
        return self.stored.captions

    def evaluation_rows(
        self, split: str, *, image_column: str | None = None, caption_column: str | None = None
    ) -> Rows:
        if self.streaming is not None:
            source = self.stored.source
            given = (image_column or source.image_column, caption_column or _column_of(source))
            return self._streamed_splits(self.streaming).rows(split, given)
        return self.stored.evaluation_rows(
            split, image_column=image_column, caption_column=caption_column
        )

    def stream(self) -> Stream | None:
        if self.streaming is None:
            return None
        filters = self.stored.source.filters
        return self._streamed_splits(self.streaming).stream(
            seed=self.seed,
            every_caption=self.captions == "all",
            negatives=self.stored.source.negative_column is not None,
            filters=None if filters is None else RowFilters(filters, option="data.filters"),
        )

    def describe(self) -> str:
        if self.streaming is not None:
            return f"data: {self._streamed_splits(self.streaming).describe()}"
        return f"data: {self.stored.describe()}"

    def fingerprint(self) -> str:
        if self.streaming is not None:
            return self.stored.chosen_of(self._streamed_splits(self.streaming).fingerprint)
        return self.stored.fingerprint()

    def _streamed_splits(self, options: Streaming) -> StreamedSplits:
        from clipkit.data.streaming.splits import StreamedSplits

        source = self.stored.source
        if self._splits is None:
            self._splits = StreamedSplits(
                options,
                columns=(source.image_column, _column_of(source)),
                train_split=source.train_split,
                opened=self._open_stream,
            )
        return self._splits

    def _open_stream(self, columns: Columns) -> StreamedData:
        from clipkit.data.streaming.opening import open_stream

        image_column, caption_column = columns
        return open_stream(
            self.stored.source.dataset,
            image_column=image_column,
            caption_column=caption_column or self.stored.source.caption_column,
            negative_column=self.stored.source.negative_column,
            caption_template=self.stored.source.caption_template,
            image_folder=self.stored.source.image_folder,
            cache_folder=self.stored.cache_folder,
        )


def _column_of(source: PairSource) -> str | None:
    return source.caption_column if isinstance(source.caption_column, str) else None
