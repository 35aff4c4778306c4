"""metrics.jsonl: every metric of a run, one JSON object a line, in the run's own folder."""

from __future__ import annotations

import json
import math
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class Journal(Logger):
    """A Lightning logger that appends ``{"time", "step", "epoch", <metric>...}`` lines.

    The run folder gives it its file; until then lines wait in memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self._path: Path | None = None
        self._waiting: list[str] = []

    @property
    def name(self) -> str:
        return "journal"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def open(self, folder: Path) -> None:
        """Write to ``metrics.jsonl`` of this folder from now on."""
        self._path = folder / "metrics.jsonl"
        waiting, self._waiting = self._waiting, []
        self._append(waiting)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {name: _strict(float(value)) for name, value in metrics.items()}
        epoch = values.pop("epoch", None)
        line = {"time": round(time.time(), 3), "step": step or 0}
        if epoch is not None:
            line["epoch"] = int(epoch)
        self._append([json.dumps({**line, **values})])

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Nothing: the configuration lies beside the journal as config.yaml."""

    def _append(self, lines: list[str]) -> None:
        if self._path is None:
            self._waiting += lines
        elif lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")


def _strict(value: float) -> float | str:
    # JSON knows no NaN and no infinity; a word survives every parser.
    return value if math.isfinite(value) else str(value)
