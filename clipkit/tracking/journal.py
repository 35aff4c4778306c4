"""The run's journal as a Lightning logger."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from clipkit.tracking.journal_file import JournalFile


class Journal(Logger):
    """Appends ``{"time", "step", "epoch", <metric>...}`` lines to metrics.jsonl.

    The run folder gives it its file; until then lines wait in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._file: JournalFile | None = None
        self._waiting: list[tuple[dict[str, float], int | None]] = []

    @property
    def name(self) -> str:
        return "journal"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def open(self, file: JournalFile) -> None:
        """Write to this file from now on."""
        self._file = file
        waiting, self._waiting = self._waiting, []
        for metrics, step in waiting:
            file.append(metrics, step)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if self._file is None:
            self._waiting.append(({**metrics}, step))
        else:
            self._file.append(metrics, step)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Nothing: the configuration lies beside the journal as config.yaml."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
