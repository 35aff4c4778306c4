"""The watch over the ranks of a run, from the moment they have found one another."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy

from clipkit.callbacks.interruption import Stopped
from clipkit.rank_watch import RankWatch


class WatchingRanks(Callback):
    """Has every rank know of the first error of any.

    Args:
        strategy: what joins the ranks: the watch begins before the first hook that could fail.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._watch: RankWatch | None = None
        self._launcher: Any = strategy.launcher
        self._join = strategy.setup_environment
        setattr(strategy, "setup_environment", self._join_and_watch)  # noqa: B010

    def _join_and_watch(self) -> None:
        self._join()
        if dist.is_available() and dist.is_initialized() and self._watch is None:
            self._watch = RankWatch(getattr(self._launcher, "procs", ()))
            self._watch.start()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if self._watch is None:
            return
        if isinstance(exception, Stopped):
            self._watch.part()  # asked for, by all of them
        elif isinstance(exception, SystemExit | KeyboardInterrupt):
            self._watch.stop()  # the first rank sees that the process has ended
        else:
            self._watch.tell(exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._watch is not None:
            watch, self._watch = self._watch, None
            watch.part()
