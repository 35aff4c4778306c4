"""A stretch of the run itself: how fast, in what memory, and what its batches are made of."""

from __future__ import annotations

import time
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from clipkit.callbacks import Throughput
from clipkit.callbacks.throughput import Lap
from clipkit.check.everyone import of_every_rank
from clipkit.check.memory import (
    LargestMicroBatch,
    largest_micro_batch,
    peak_of_process,
    reset_peak,
)
from clipkit.data.samples import PairBatch
from clipkit.module import CLIPModule

SECONDS = 40.0
"""How long the measured stretch is."""

_WARM_UP = 3  # batches before it, or a quarter of its time
_ENOUGH_PAIRS = 4096  # to tell what batches are made of


class Speed(NamedTuple):
    """What the run does on this machine."""

    values: dict[str, float]  # as Throughput names them
    batches: int
    seconds: float
    warmed_up: bool
    total_steps: int
    batches_per_step: int
    peak_memory: int | None  # bytes: of tensors on a CUDA device, else of the process

    @property
    def seconds_per_step(self) -> float:
        """Seconds between two updates of the weights."""
        return self.seconds / self.batches * self.batches_per_step


class Captions(NamedTuple):
    """Shares of the training pairs that were seen."""

    pairs: int
    truncated: float
    captions_repeated: float  # within a batch of all ranks
    images_repeated: float


class Stretch(Throughput):
    """Trains a few batches, measures some more by Throughput's meter, and ends the fit."""

    _warm_up: int | None = None  # batches, once it is over
    speed: Speed | None = None
    captions: Captions | None = None
    largest: LargestMicroBatch | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._total_steps = int(trainer.estimated_stepping_batches)
        # A run that is hardly longer than the warm-up is measured from its first batch.
        long = self._total_steps * trainer.accumulate_grad_batches > 2 * _WARM_UP
        self._warm_up = None if long else 0
        self._done, self._look_after = 0, 1
        self._began = time.perf_counter()
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        reset_peak()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: PairBatch,
        batch_idx: int,
    ) -> None:
        self._done += 1
        if self._warm_up is None and trainer.strategy.broadcast(self._is_warm()):
            self._warm_up = self._done
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._batch = batch
        if len(self._seen) * len(batch["tokens"]) * trainer.world_size < _ENOUGH_PAIRS:
            self._seen.append((batch["truncated"], batch["caption_ids"], batch["image_ids"]))
        if self._done == self._warm_up:
            self._began, self._look_after = time.perf_counter(), self._done + 1
        elif self._warm_up is not None and self._done == self._look_after:
            self._look_after = trainer.strategy.broadcast(self._when_to_look_again())
            trainer.should_stop = self._look_after == self._done

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CLIPModule)
        if self._meter is not None:
            lap = self._meter.read()
            peak, warm_up = lap.peak_memory, self._warm_up or 0
            self.speed = Speed(
                values=self._values(trainer, pl_module, lap),
                batches=self._done - warm_up,
                seconds=lap.seconds,
                warmed_up=warm_up > 0,
                total_steps=self._total_steps,
                batches_per_step=trainer.accumulate_grad_batches,
                peak_memory=peak_of_process() if peak is None else peak,
            )
            self._try_micro_batches(trainer, pl_module, self._batch)
        super().on_train_end(trainer, pl_module)
        ranks = of_every_rank([[column.cpu() for column in one] for one in self._seen])
        self.captions = _captions(ranks)

    def _is_warm(self) -> bool:
        return self._done >= _WARM_UP or time.perf_counter() - self._began > SECONDS / 4

    def _when_to_look_again(self) -> int:
        """Return the batch after which to look at the clock; this one, if it is time to end.

        Clocks differ between ranks, so all ask rank zero; half of what is left is done unasked.
        """
        passed = time.perf_counter() - self._began
        batches = (SECONDS - passed) * (self._done - (self._warm_up or 0)) / passed
        return self._done + max(int(batches / 2), 0)

    # --- What Throughput asks --------------------------------------------------------------------

    def _is_due(self, trainer: L.Trainer) -> bool:
        return self._done == self._warm_up

    def _take(self, trainer: L.Trainer, module: CLIPModule, lap: Lap) -> None:
        """Forget the warm-up."""

    def _try_micro_batches(self, trainer: L.Trainer, module: CLIPModule, batch: PairBatch) -> None:
        share = len(batch["tokens"])
        self.largest = largest_micro_batch(
            module,
            batch,
            trainer.precision_plugin.forward_context,
            fits=min(share, module.micro_batch or share),
            processes=max(trainer.world_size // trainer.num_nodes, 1),
        )


def _captions(ranks: list[list[list[Tensor]]]) -> Captions:
    """Return what the batches are made of; each rank holds its share of every batch."""
    truncated, captions, images = (
        [torch.cat([share[column] for share in shares]) for shares in zip(*ranks, strict=True)]
        for column in range(3)
    )
    return Captions(
        pairs=sum(map(len, truncated)),
        truncated=float(torch.cat(truncated).double().mean()),
        captions_repeated=_repeated(captions),
        images_repeated=_repeated(images),
    )


def _repeated(batches: list[Tensor]) -> float:
    """Return the share of rows whose id stands more than once in its own batch."""
    repeated = 0
    for ids in batches:
        _, counts = torch.unique(ids, return_counts=True)
        repeated += int(counts[counts > 1].sum())
    return repeated / sum(map(len, batches))
