"""PairDataModule: the template that turns rows of pictures with captions into batches.

A subclass only says where the rows of a split come from. Image size, interpolation, resize mode
and tokenizer are read from the module that is trained; constructor arguments serve use without one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning as L
import torch
from torch.utils.data import DataLoader

from clipkit.data.caches import Caches
from clipkit.data.caption_choice import CaptionChoice, CaptionPolicy
from clipkit.data.images import Augmentation, augmentation
from clipkit.data.prepared_pictures import AsEvaluated, Prepare, PreparedPictures, Shrunk
from clipkit.data.samples import JoinedPairs, PairBatch, PairCollate, PairDataset, Pixels
from clipkit.data.sampling import EvaluationSampler, Order, Permutation, TrainSampler
from clipkit.data.sizes import FULL_SIZE, SizeSchedule
from clipkit.errors import UserError
from clipkit.resume import BEGINNING, Position, position
from clipkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.data.rows import Rows
    from clipkit.data.streaming.stream import Stream
    from clipkit.data.streaming.training import StreamTraining

log = logging.getLogger(__name__)

TRAIN, VALIDATION, TEST = "train", "validation", "test"


class Part(NamedTuple):
    """What one source gives to a split."""

    rows: Rows
    captions: CaptionChoice
    augment: Augmentation | None
    source: str = ""  # its name, where there are several


class PairDataModule(L.LightningDataModule):
    """Batches of image-text pairs; a subclass implements :meth:`load`.

    Args:
        batch_size: pairs that the loss sees per step over all ranks together.
        num_workers: loader processes a rank; results do not depend on it. Left out: none on a
            machine without a GPU, else the cores a rank has, at most 8.
        captions: which caption of a picture that has several: ``random`` (drawn anew each epoch),
            ``first``, ``longest``, or ``all`` (a pair each).
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
            ``{0: 112, 24: 224}``; before the first and without any, the image encoder's own size.
        tokenizer: where no trainer says it.
        seed: of order and augmentation; left out, the run's seed.
    """

    def __init__(
        self,
        *,
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
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size: {batch_size} is not a positive number of pairs")
        self.batch_size = batch_size
        if not 0 <= max_broken_ratio <= 1:
            raise UserError(f"data.max_broken_ratio: {max_broken_ratio} is no share from 0 to 1")
        self.max_broken_ratio = max_broken_ratio
        self.num_workers = num_workers
        self.captions = captions
        self.augment = augmentation(augment)
        self.shrink_batch = shrink_batch
        self.shrink_pictures = shrink_pictures
        self.caches = Caches(cache_tokens, cache_pictures_gb, cache_folder)
        self.image_size = image_size
        self.image_sizes = SizeSchedule(image_sizes or {})
        self.tokenizer = tokenizer
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self._rows: dict[str, Rows] = {}
        self._parts: dict[str, list[Part]] = {}
        self._ready: dict[tuple[object, ...], JoinedPairs] = {}
        self._lengths: Sequence[int] = ()
        self._start = BEGINNING
        self._streamed: StreamTraining | None = None

    @abstractmethod
    def load(self, split: str) -> Rows:
        """Return the rows of ``train``, ``validation`` or ``test``."""

    def parts(self, split: str) -> list[Part]:
        """Return what a split consists of: of one source, its rows."""
        return [Part(self._load_once(split), self.caption_choice(), self.augment)]

    def caption_choice(self) -> CaptionChoice:
        """Return which caption of a picture is trained on."""
        return CaptionChoice(self.captions)

    def order(self, lengths: Sequence[int]) -> Order:
        """Return the order of training, of so many pairs of each part."""
        return Permutation(sum(lengths), seed=self.seed)

    def stream(self) -> Stream | None:
        """Return what is trained on in the place of the rows of ``train``; None for these."""
        return None

    def evaluation_rows(
        self, split: str, *, image_column: str | None = None, caption_column: str | None = None
    ) -> Rows:
        """Return the rows of a split for an evaluation, which may read other columns."""
        return self._load_once(split)

    def describe(self) -> str:
        """Return the one line that says what data this is."""
        return f"data: {type(self).__name__}"

    def fingerprint(self) -> str:
        """Return a digest that changes with the data."""
        return hashlib.sha256(self.describe().encode()).hexdigest()[:16]

    # --- Lightning's hooks -------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        log.info(self.describe())
        splits = {"fit": (TRAIN, VALIDATION), "validate": (VALIDATION,), "test": (TEST,)}
        if stage == "fit":
            self._streamed = self._stream_training()
        for split in splits.get(stage, ()):
            if split != TRAIN or self._streamed is None:
                self._parts_of(split)
        if TRAIN in self._parts:
            self._lengths = self._pairs(TRAIN).lengths
            self._fit_batch(len(self.order(self._lengths)))
        if stage == "fit" and self.image_sizes.sizes and self.trainer is not None:
            log.info(self.image_sizes.checked(self._module().image_encoder))
        if self.caches and self._streamed is None:  # here, so that it is done before the first step
            for split in splits.get(stage, ()):
                self._ready_pairs(split)

    def teardown(self, stage: str) -> None:
        if self._streamed is not None:
            self._streamed.close()

    def train_dataloader(self) -> DataLoader[PairBatch]:
        if self._streamed is not None:
            return self._stream_loader(self._streamed)
        pairs = self._ready_pairs(TRAIN)
        sampler = TrainSampler(
            pairs,
            order=self.order(pairs.lengths),
            batch_size=self.batch_size,
            rank=self._rank,
            world_size=self._world_size,
            start=self._start,
        )
        return self._loader(pairs, sampler)

    def val_dataloader(self) -> DataLoader[PairBatch]:
        return self._evaluation_loader(VALIDATION)

    def test_dataloader(self) -> DataLoader[PairBatch]:
        return self._evaluation_loader(TEST)

    # --- Where a run stands ------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the run, and what decides which rows it has seen by then."""
        if self.trainer is None or (TRAIN not in self._parts and self._streamed is None):
            return {}
        at = position(self.trainer)
        state = {**at._asdict(), **self._deciding_order()}
        return state if self._streamed is None else {**state, "stream": self._streamed.state(at)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is None or not state_dict:
            return
        if TRAIN not in self._parts and self._streamed is None:
            return
        start, stream = (
            Position(state_dict["epoch"], state_dict["batches"]),
            state_dict.get("stream"),
        )
        within = start.batches or stream is not None
        for name, now in self._deciding_order().items() if within else ():
            if state_dict.get(name, 0) != now:
                raise UserError(
                    f"data: the checkpoint stands within an epoch, {start.batches:,} batches into "
                    f"it, and was trained with {name.replace('_', ' ')} {state_dict.get(name)}, "
                    f"not {now}; go on with the same, or start a new run from it with --weights"
                )
        self._start = start
        if self._streamed is not None:
            self._streamed.go_on(start, stream)

    def _deciding_order(self) -> dict[str, int]:
        deciding = {"batch_size": self.batch_size, "seed": self.seed}
        if self._streamed is None:
            order = self.order(self._lengths)
            return {**deciding, "pairs": sum(self._lengths), **order.deciding()}
        return {**deciding, **self._streamed.deciding_order()}

    # --- Streams -----------------------------------------------------------------------------

    def _stream_training(self) -> StreamTraining | None:
        stream = self.stream()
        if stream is None:
            return None
        from clipkit.data.streaming.options import refuse_beside_streaming
        from clipkit.data.streaming.training import StreamTraining

        refuse_beside_streaming(
            {
                "cache_tokens": self.caches.tokens,
                "cache_pictures_gb": self.caches.pictures_gb,
                "shrink_batch": self.shrink_batch,
            }
        )
        self._check_shares()
        streamed = StreamTraining(stream)
        streamed.refuse(self.trainer)
        return streamed

    def _stream_loader(self, streamed: StreamTraining) -> DataLoader[PairBatch]:
        from clipkit.data.streaming.dataset import RowsInHand

        rows, choice = RowsInHand(), self.caption_choice()
        pairs = PairDataset(
            rows,
            pixels=self._pixels(),
            sizes=self.image_sizes,
            augment=self.augment,
            # Where each caption makes a pair, a row of the stream is one.
            captions=replace(choice, policy="first") if choice.policy == "all" else choice,
            negatives=rows.negatives() if streamed.negatives else None,
            seed=self.seed,
        )
        prepare = self._preparation(pairs)
        if prepare is not None:
            pairs.pictures = PreparedPictures(rows, prepare)
        workers = self._workers()
        return streamed.loader(
            pairs,
            rows,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self.batch_size // self._world_size,
            num_workers=workers,
            collate_fn=PairCollate(self._tokenizer(), negatives=streamed.negatives),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    # --- Rows to pairs -----------------------------------------------------------------------

    def _load_once(self, split: str) -> Rows:
        if split not in self._rows:
            rows = self.load(split)
            if not len(rows):
                raise UserError(f"data: the split {split!r} is empty")
            self._rows[split] = rows
        return self._rows[split]

    def _parts_of(self, split: str) -> list[Part]:
        if split not in self._parts:
            self._parts[split] = self.parts(split)
        return self._parts[split]

    def _pairs(self, split: str) -> JoinedPairs:
        training = split == TRAIN
        return JoinedPairs(
            [
                PairDataset(
                    part.rows,
                    pixels=self._pixels(),
                    sizes=self.image_sizes if training else FULL_SIZE,
                    augment=part.augment if training else None,
                    captions=part.captions if training else part.captions.of_evaluation(),
                    negatives=part.rows.negatives() if training else None,
                    seed=self.seed,
                    source=part.source,
                )
                for part in self._parts_of(split)
            ]
        )

    def _ready_pairs(self, split: str) -> JoinedPairs:
        """Return the pairs of a split with what is prepared of them, which may take a while."""
        tokenizer = self._tokenizer()
        sizes = tuple(self.image_sizes.sizes.items())
        described = (split, self._pixels(), sizes, tokenizer.digest, tokenizer.contract)
        if described not in self._ready:
            joined = self._pairs(split)
            for pairs in joined.parts:
                self._make_ready(pairs, " of ".join(filter(None, (split, pairs.source))))
            self._ready[described] = joined
        return self._ready[described]

    def _make_ready(self, pairs: PairDataset, name: str) -> None:
        tokenizer = self._tokenizer()
        pairs.tokens = self.caches.tokens_of(pairs.rows, tokenizer, split=name)
        if pairs.negatives is not None:
            pairs.negative_tokens = self.caches.tokens_of(
                pairs.negatives, tokenizer, split=f"{name}, negatives"
            )
        prepare = self._preparation(pairs)
        if prepare is not None:
            pairs.pictures = self.caches.pictures_of(pairs.rows, prepare, split=name)

    def _preparation(self, pairs: PairDataset) -> Prepare | None:
        pixels, augment = pairs.pixels, pairs.augment
        if augment is None:
            # What is kept has one size.
            kept = self.caches.pictures_gb and not pairs.sizes.sizes
            return AsEvaluated(*pixels) if kept else None
        if self.shrink_pictures is False:
            if self.caches.pictures_gb:
                log.info(
                    "data: training pictures are cropped from their full size, and so not kept; "
                    "with data.shrink_pictures=true they are brought to what a crop needs, and kept"
                )
            return None
        side = self.shrink_pictures
        largest = max(pixels.size, pairs.sizes.largest(full=pixels.size))
        side = augment.side_needed(largest) if side is True else side
        if side < largest:
            raise UserError(
                f"data.shrink_pictures: {side} is less than the {largest} pixels a side that "
                "the model sees; true and larger numbers are accepted"
            )
        return Shrunk(side, pixels.interpolation)

    def _fit_batch(self, num_pairs: int) -> None:
        world_size = self._world_size
        if self.batch_size > num_pairs:
            if not self.shrink_batch or num_pairs < 2 * world_size:
                raise UserError(
                    f"data.batch_size: {self.batch_size} is more than the {num_pairs} pairs of "
                    "the training split"
                )
            smaller = num_pairs // 2 // world_size * world_size
            log.info(
                f"data: {num_pairs} training pairs cannot fill a batch of {self.batch_size}; "
                f"data.batch_size is {smaller}"
            )
            self.batch_size = smaller
        self._check_shares()

    def _check_shares(self) -> None:
        if self.batch_size % self._world_size:
            raise UserError(
                f"data.batch_size: {self.batch_size} is shared by {self._world_size} ranks and "
                "must be a multiple of that"
            )

    def _evaluation_loader(self, split: str) -> DataLoader[PairBatch]:
        pairs = self._ready_pairs(split)
        sampler = EvaluationSampler(
            pairs, length=len(pairs), rank=self._rank, world_size=self._world_size
        )
        return self._loader(pairs, sampler)

    def _loader(
        self, pairs: JoinedPairs, sampler: TrainSampler | EvaluationSampler
    ) -> DataLoader[PairBatch]:
        workers = self._workers()
        return DataLoader(
            pairs,  # type: ignore[arg-type]
            batch_size=max(self.batch_size // self._world_size, 1),
            sampler=sampler,
            num_workers=workers,
            collate_fn=PairCollate(self._tokenizer(), negatives=pairs.have_negatives),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=workers > 0,
        )

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        if not torch.cuda.is_available():
            return 0
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(8, max((cores or 1) // max(torch.cuda.device_count(), 1), 1))

    # --- What the module says ----------------------------------------------------------------

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    def _module(self) -> Any:
        return self.trainer.lightning_module if self.trainer is not None else None

    def _pixels(self) -> Pixels:
        module = self._module()
        if module is None:
            if self.image_size is None:
                raise UserError("data.image_size: needed where no module says it")
            return Pixels(self.image_size, "shortest", "bicubic")
        encoder = module.image_encoder
        return Pixels(encoder.image_size, encoder.resize_mode, encoder.interpolation)

    def _tokenizer(self) -> Tokenizer:
        module = self._module()
        tokenizer = self.tokenizer if module is None else module.tokenizer
        if tokenizer is None:
            raise UserError("data.tokenizer: needed where no module says it")
        return tokenizer
