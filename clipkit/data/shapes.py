"""ShapesPairs: drawn pictures with captions, the data set that is always there."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, get_args

from clipkit.data.caption_choice import CaptionPolicy
from clipkit.data.drawing import CLASS_NAMES, Split
from clipkit.data.images import Augmentation
from clipkit.data.pairs import PairDataModule
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.data.rows import Rows

LENGTHS: dict[str, int] = {"validation": 1280, "unseen": 1280, "test": 1280}


class ShapesPairs(PairDataModule):
    """Drawn shapes with captions; some combinations of colour and shape are never trained.

    Args:
        length: training pictures an epoch.
        drawing_seed: equal seeds draw equal pictures, everywhere.
        batch_size: pairs that the loss sees per step over all ranks together.
        num_workers: loader processes a rank; results do not depend on it.
        captions: which of a picture's captions: random, first, longest, or all (a pair each).
        augment: how training pictures are varied; drawn anew, they need none.
        shrink_batch: where the data cannot fill a batch, take half the data instead of an error.
        cache_tokens: keep the tokens of every caption on disk, about 60 bytes a caption.
        cache_folder: where they are kept; left out, `clipkit` in the user's cache folder.
        image_size: pixels a side, where no trainer says it.
        image_sizes: pixels a side of training pictures from an epoch on, counted from 0, such as
            {0: 112, 24: 224}; before the first and without any, the image encoder's own size.
        tokenizer: where no trainer says it.
        seed: of order and augmentation; left out, the run's seed.
    """

    def __init__(
        self,
        *,
        length: int = 40_000,
        drawing_seed: int = 0,
        batch_size: int = 256,
        num_workers: int | None = None,
        captions: CaptionPolicy = "random",
        augment: Augmentation | bool = False,
        shrink_batch: bool = False,
        cache_tokens: bool = False,
        cache_folder: str | None = None,
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
            cache_tokens=cache_tokens,
            cache_folder=cache_folder,
            image_size=image_size,
            image_sizes=image_sizes,
            tokenizer=tokenizer,
            seed=seed,
        )
        self.length = length
        self.drawing_seed = drawing_seed

    def load(self, split: str) -> Rows:
        if split not in get_args(Split):
            raise UserError(
                f"split: drawn pictures have {', '.join(get_args(Split))}, no {split!r}"
            )
        # pyarrow, which rows need, comes with datasets; a training step works without.
        from clipkit.data.drawn import DrawnRows

        return DrawnRows(
            split,  # type: ignore[arg-type]
            length=LENGTHS.get(split, self.length),
            seed=self.drawing_seed,
            size=self._pixels().size,
        )

    def describe(self) -> str:
        return (
            f"data: drawn shapes, {self.length:,} training pictures an epoch, "
            f"{len(CLASS_NAMES)} classes"
        )

    def fingerprint(self) -> str:
        return sha256(f"shapes/{self.length}/{self.drawing_seed}".encode()).hexdigest()[:16]
