"""Rows to samples, samples to batches: what a loader's processes do."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipkit.data.broken import (
    NO_CAPTION,
    Broken,
    BrokenRowError,
    finding_broken,
    nothing_usable,
    stand_ins,
)
from clipkit.data.cached_tokens import CachedCaption, CachedTokens, read_cached
from clipkit.data.caption_choice import CaptionChoice
from clipkit.data.captions import encode_captions
from clipkit.data.identity import image_id
from clipkit.data.images import Augmentation, Source, decode_image, resize_for_eval, to_uint8
from clipkit.data.prepared_pictures import PreparedPictures, read_encoded
from clipkit.data.sampling import SampleKey
from clipkit.data.sizes import FULL_SIZE, SizeSchedule
from clipkit.encoders.base import Interpolation, ResizeMode
from clipkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.data.rows import Rows


class PairBatch(TypedDict):
    """A batch of pairs."""

    images: Tensor  # uint8 (b, 3, H, W)
    tokens: Tensor  # int64 (b, L)
    caption_ids: Tensor  # int64 (b,), equal for equal captions
    image_ids: Tensor  # int64 (b,), equal for equal pictures
    rows: Tensor  # int64 (b,), the pair's number in its split
    truncated: Tensor  # bool (b,), whether the caption was cut to the context
    # Captions that are negatives only, of e <= b of the pictures.
    negatives: NotRequired[Tensor]  # int64 (e, L)
    negative_ids: NotRequired[Tensor]  # int64 (e,), as `caption_ids`
    # Of all captions, the negatives after those of the pairs.
    lengths: NotRequired[list[int]]  # how many tokens each has
    by_length: NotRequired[Tensor]  # int64 (b + e,), their places, the longest first
    broken: NotRequired[list[Broken]]  # rows in whose place others stand
    sources: NotRequired[dict[str, int]]  # pairs by source, where there are several


class Pixels(NamedTuple):
    """What the image encoder wants of a picture."""

    size: int
    resize_mode: ResizeMode
    interpolation: Interpolation


class Sample(NamedTuple):
    """One pair on its way to a batch."""

    image: Tensor
    caption: str | CachedCaption
    image_id: int
    row: int
    broken: Sequence[Broken] = ()  # rows in whose place it stands
    negative: str | CachedCaption | None = None
    source: str = ""  # its name, where there are several


class PairDataset(Dataset[Sample]):
    """Rows of one source as pairs: picks a caption, decodes, augments.

    All that is drawn is drawn from (seed, source, epoch, number).
    """

    def __init__(
        self,
        rows: Rows,
        *,
        pixels: Pixels,
        sizes: SizeSchedule = FULL_SIZE,
        augment: Augmentation | None,
        captions: CaptionChoice,
        negatives: Rows | None = None,
        seed: int,
        source: str = "",
    ) -> None:
        self.rows = rows
        self.pixels = pixels
        self.sizes = sizes
        self.augment = augment
        self.captions = captions
        self.negatives = negatives
        self.source = source
        # By its name, so that what is drawn for a source does not hang on the others.
        self.seed = (seed, *source.encode())
        self.tokens: CachedTokens | None = None
        self.negative_tokens: CachedTokens | None = None
        self.pictures: PreparedPictures | None = None
        # The first pair of each row, where every caption makes a pair.
        self._starts: np.ndarray[Any, np.dtype[np.int64]] | None = None
        if captions.policy == "all":
            counts = [len(texts) for texts in rows.all_captions()]
            self._starts = np.concatenate([[0], np.cumsum(counts)])

    def __len__(self) -> int:
        return len(self.rows) if self._starts is None else int(self._starts[-1])

    def __getitem__(self, key: SampleKey) -> Sample:
        """Return a sample; where its row is broken, one of another row that says so."""
        broken: list[Broken] = []
        for number in stand_ins(key.number, length=len(self), seed=(*self.seed, key.epoch)):
            try:
                return self.sample(number, key.epoch)._replace(broken=broken)
            except BrokenRowError as error:
                row, _ = self._locate(number)
                place, name = self.rows.position(row), self.rows.key(row)
                stands_in = bool(broken)
                broken.append(Broken(place, name, error.reason, str(error), stands_in, self.source))
        raise nothing_usable(broken)

    def sample(self, number: int, epoch: int) -> Sample:
        rng = np.random.default_rng((*self.seed, epoch, number))
        row, which = self._locate(number)
        caption = self._caption(row, which, rng)
        pixels = self.pixels
        pixels = pixels._replace(size=self.sizes.at(epoch, full=pixels.size))
        with finding_broken():
            picture, identity = self._picture(row)
            if self.augment is not None:
                tensor = self.augment(picture, pixels.size, pixels.interpolation, rng)
            else:
                image = decode_image(picture)
                tensor = to_uint8(
                    resize_for_eval(image, pixels.size, pixels.resize_mode, pixels.interpolation)
                )
        # Last, so that views are the same with and without.
        negative = self._negative(row, rng)
        return Sample(tensor, caption, identity, number, negative=negative, source=self.source)

    def _picture(self, row: int) -> tuple[Source, int]:
        """A picture, encoded or prepared, and its id."""
        if self.pictures is not None:
            return self.pictures[row]
        encoded = read_encoded(self.rows.image(row))
        return encoded, image_id(encoded)

    def _locate(self, index: int) -> tuple[int, int | None]:
        if self._starts is None:
            return index, None
        row = int(np.searchsorted(self._starts, index, side="right")) - 1
        return row, index - int(self._starts[row])

    def _caption(
        self, row: int, which: int | None, rng: np.random.Generator
    ) -> str | CachedCaption:
        captions = _captions_of(row, self.rows, self.tokens)
        if not captions:
            raise BrokenRowError(NO_CAPTION)
        if which is not None:
            return _named(captions[which], self.tokens)
        counts = self.rows.caption_counts(row)
        length = len if self.tokens is None else self.tokens.characters
        return _named(self.captions.of(captions, counts, length=length, rng=rng), self.tokens)

    def _negative(self, row: int, rng: np.random.Generator) -> str | CachedCaption | None:
        if self.negatives is None:
            return None
        captions = _captions_of(row, self.negatives, self.negative_tokens)
        if not captions:
            return None
        return _named(captions[int(rng.integers(len(captions)))], self.negative_tokens)


def _captions_of(row: int, rows: Rows, tokens: CachedTokens | None) -> Sequence[Any]:
    """The captions of a row; where a file has their tokens, their numbers in it."""
    return rows.captions(row) if tokens is None else tokens.captions(row)


def _named(caption: Any, tokens: CachedTokens | None) -> str | CachedCaption:
    return caption if tokens is None else CachedCaption(tokens, caption)


class JoinedPairs(Dataset[Sample]):
    """The pairs of one or several sources, numbered through."""

    def __init__(self, parts: Sequence[PairDataset]) -> None:
        self.parts = list(parts)
        self.lengths = [len(part) for part in self.parts]
        self._starts = [sum(self.lengths[:place]) for place in range(len(self.parts))]
        self.have_negatives = any(part.negatives is not None for part in self.parts)

    def __len__(self) -> int:
        return sum(self.lengths)

    def __getitem__(self, key: SampleKey) -> Sample:
        place = bisect_right(self._starts, key.number) - 1
        start = self._starts[place]
        sample = self.parts[place][key._replace(number=key.number - start)]
        return sample._replace(row=start + sample.row)


class PairCollate:
    """Samples to a batch; a class so that data workers can be spawned.

    Args:
        tokenizer: of the captions.
        negatives: whether samples may have such, so that every batch says which.
    """

    def __init__(self, tokenizer: Tokenizer, *, negatives: bool = False) -> None:
        self.tokenizer = tokenizer
        self.negatives = negatives

    def __call__(self, samples: list[Sample]) -> PairBatch:
        pairs = len(samples)
        captions: list[Any] = [sample.caption for sample in samples]
        captions += [sample.negative for sample in samples if sample.negative is not None]
        if isinstance(captions[0], str):
            encoded = encode_captions(self.tokenizer, captions)
        else:
            encoded = read_cached(captions, self.tokenizer.contract)
        lengths = encoded.lengths
        batch = PairBatch(
            images=torch.stack([sample.image for sample in samples]),
            tokens=encoded.tokens[:pairs],
            caption_ids=encoded.ids[:pairs],
            image_ids=torch.tensor([sample.image_id for sample in samples]),
            rows=torch.tensor([sample.row for sample in samples]),
            truncated=encoded.truncated[:pairs],
            lengths=lengths.tolist(),
            by_length=lengths.argsort(descending=True, stable=True),
            broken=[broken for sample in samples for broken in sample.broken],
        )
        if self.negatives:
            batch["negatives"] = encoded.tokens[pairs:]
            batch["negative_ids"] = encoded.ids[pairs:]
        if samples[0].source:
            batch["sources"] = dict(Counter(sample.source for sample in samples))
        return batch
