"""MixedPairs: several sources in one batch, each with its own columns, captions and filters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from clipkit.data.images import Augmentation, augmentation
from clipkit.data.pair_source import PairSource, StoredPairs
from clipkit.data.pairs import TRAIN, VALIDATION, PairDataModule, Part
from clipkit.data.sampling import MixtureOrder, Order, check_weights, shares_of
from clipkit.errors import UserError, did_you_mean
from clipkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.data.rows import Rows


class MixedPairs(PairDataModule):
    """Pairs of several sources, mixed within each batch.

    Without weights an epoch has every pair of every source once. With weights it has so many pairs
    of each as its weight says, taken from one permutation of the source after another.

    What is held out for validation is held out of its own source: a picture that two sources hold
    may be trained on in one and validated on in the other.

    Args:
        sources: what is mixed, by names that metrics and quarantine.jsonl use.
        epoch_pairs: pairs an epoch, where sources have weights; left out, as many as there are.
            Of them, as many as make whole batches are trained on.
        validation_sources: the sources whose validation pairs are validated on; left out, all.
        batch_size: pairs that the loss sees per step over all ranks together.
        num_workers: loader processes a rank; results do not depend on it. Left out: none on a
            machine without a GPU, else the cores a rank has, at most 8.
        augment: how training pictures are varied, where their source does not say; true is CLIP's
            mild crop, false leaves them as in evaluation.
        shrink_batch: where the data cannot fill a batch, take half the data instead of an error.
        shrink_pictures: the short side in pixels that larger training pictures are brought to
            before they are cropped; true is what the smallest crop needs. Crops are the same, their
            pixels are resized twice: about one grey level of difference.
        cache_tokens: keep the tokens of every caption on disk, about 60 bytes a caption.
        cache_pictures_gb: keep decoded pictures on disk, as many of each split of each source as
            this many gigabytes hold: those of evaluation as it sees them, those of training if
            they are shrunk or not augmented. Batches are the same with and without.
        cache_folder: where both are kept; left out, `clipkit` in the user's cache folder.
        max_broken_ratio: the share of samples that may be broken (a picture that cannot be
            decoded, no caption) before the run stops. Others of their source stand in for them.
        image_size: pixels a side, where no trainer says it.
        image_sizes: pixels a side of training pictures from an epoch on, counted from 0, such as
            {0: 112, 24: 224}; before the first and without any, the image encoder's own size.
        tokenizer: where no trainer says it.
        seed: of order and augmentation; left out, the run's seed.
    """

    def __init__(
        self,
        sources: dict[str, PairSource],
        *,
        epoch_pairs: int | None = None,
        validation_sources: list[str] | None = None,
        batch_size: int = 256,
        num_workers: int | None = None,
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
        if not sources:
            raise UserError("data.sources: {} names no source")
        for name in sources:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise UserError(
                    f"data.sources: {name!r} is to be part of the name of a metric; accepted are "
                    "letters, digits, _ and -"
                )
        self.weights = _weights_of(sources)
        if epoch_pairs is not None and self.weights is None:
            raise UserError(
                f"data.epoch_pairs: {epoch_pairs:,} asks for weights; without, an epoch has every "
                "pair once (data.sources.NAME.weight)"
            )
        if epoch_pairs is not None and epoch_pairs < 1:
            raise UserError(f"data.epoch_pairs: {epoch_pairs} is not a positive number of pairs")
        for name in validation_sources or ():
            if name not in sources:
                raise UserError(
                    f"data.validation_sources: {name!r} is none of data.sources; "
                    f"{did_you_mean(name, sources)}accepted are: {', '.join(sources)}"
                )
        if validation_sources == []:
            raise UserError("data.validation_sources: [] names no source; left out, it is all")
        self.epoch_pairs = epoch_pairs
        self.validation_sources = validation_sources or list(sources)
        self.stored = {
            name: StoredPairs(source, option=f"data.sources.{name}", cache_folder=cache_folder)
            for name, source in sources.items()
        }

    @property
    def source_names(self) -> list[str]:
        """What the sources are called, by which they are counted."""
        return list(self.stored)

    def load(self, split: str) -> Rows:
        raise UserError(f"data.sources: the split {split!r} of a mixture is no one table of rows")

    def parts(self, split: str) -> list[Part]:
        found = []
        for name in self.stored if split == TRAIN else self.validation_sources:
            stored = self.stored[name]
            if split in (TRAIN, VALIDATION) or stored.has(split):
                own = stored.source.augment
                augment = self.augment if own is None else augmentation(own)
                found.append(Part(stored.rows(split), stored.captions, augment, name))
        if not found:
            raise UserError(f"data.sources: none of them has a split {split!r}")
        return found

    def order(self, lengths: Sequence[int]) -> Order:
        if self.weights is None:
            return super().order(lengths)
        pairs = self.epoch_pairs or sum(lengths)
        if pairs > self.batch_size:  # of what makes no whole batch nothing would be seen
            pairs -= pairs % self.batch_size
        shares = shares_of(self.weights, pairs)
        for name, share in shares.items():
            if not share:
                raise UserError(
                    f"data.sources.{name}.weight: {self.weights[name]:g} gives it no pair in an "
                    f"epoch of {pairs:,}; raise it, or data.epoch_pairs"
                )
        return MixtureOrder(dict(zip(self.stored, lengths, strict=True)), shares, seed=self.seed)

    def evaluation_rows(
        self, split: str, *, image_column: str | None = None, caption_column: str | None = None
    ) -> Rows:
        if len(self.validation_sources) > 1:
            raise UserError(
                "EvalData.path: needed where several sources are mixed; it takes what dataset of "
                "a source does (or name one in data.validation_sources)"
            )
        (name,) = self.validation_sources
        return self.stored[name].evaluation_rows(
            split, image_column=image_column, caption_column=caption_column
        )

    def describe(self) -> str:
        each = "; ".join(f"{name}: {stored.describe()}" for name, stored in self.stored.items())
        mixed = "every pair once an epoch"
        if self.weights is not None:
            whole = sum(self.weights.values())
            parts = (f"{name} {weight / whole:.1%}" for name, weight in self.weights.items())
            mixed = ", ".join(parts)
        return f"data: {len(self.stored)} sources ({mixed}); {each}"

    def fingerprint(self) -> str:
        digest = blake2b(digest_size=16)
        for name, stored in self.stored.items():
            digest.update(f"{name}:{stored.fingerprint()};".encode())
        digest.update(repr((self.weights, self.epoch_pairs)).encode())
        return digest.hexdigest()


def _weights_of(sources: dict[str, PairSource]) -> dict[str, float] | None:
    given = {name: s.weight for name, s in sources.items() if s.weight is not None}
    if not given:
        return None
    if missing := [name for name in sources if name not in given]:
        raise UserError(
            f"data.sources: {', '.join(given)} has a weight, {', '.join(missing)} has none; give "
            "one to all, or to none for every pair once an epoch"
        )
    check_weights("data.sources", given)
    return given
