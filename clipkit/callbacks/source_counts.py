"""How many pairs of each source were trained on: data/SOURCE_pairs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from clipkit.callbacks.logged_steps import LoggedSteps
from clipkit.data.samples import PairBatch
from clipkit.distributed import sums_of_ranks

KEY = "source_counts"


class SourceCounts(Callback):
    """Counts the pairs of each source, of all ranks and of all of the run, where there are several.

    What this rank has counted is added to the account of all when training logs and when a
    checkpoint, in which the account travels, is written.
    """

    def __init__(self) -> None:
        self._logged = LoggedSteps()
        self._sources: list[str] = []
        self._new = Counter[str]()  # of this rank, not in the account yet
        self._account = Counter[str]()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._sources:
            self._settle()  # all ranks save together
            checkpoint[KEY] = dict(self._account)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._account = Counter(checkpoint.get(KEY, {}))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sources = list(getattr(trainer.datamodule, "source_names", ()))  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._logged.start(trainer)

    # After the batch, so that a checkpoint, which is written before the next, has it in.
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PairBatch,
        batch_idx: int,
    ) -> None:  # fmt: skip
        if not self._sources:
            return
        self._new.update(batch.get("sources", {}))
        if self._logged.reached(trainer):
            self._settle()
            for source in self._sources:
                pl_module.log(f"data/{source}_pairs", float(self._account[source]))

    def _settle(self) -> None:
        added = sums_of_ranks([self._new[source] for source in self._sources])
        self._account.update(dict(zip(self._sources, added, strict=True)))
        self._new.clear()
