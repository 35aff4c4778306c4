"""Broken rows: counted by reason, named in quarantine.jsonl; too many of them end the run."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import Callback

from clipkit.callbacks.logged_steps import LoggedSteps
from clipkit.data.broken import Broken
from clipkit.data.pairs import TRAIN, VALIDATION
from clipkit.data.samples import PairBatch
from clipkit.distributed import told_by_ranks
from clipkit.errors import UserError
from clipkit.tracking import folder_of_run

FILE = "quarantine.jsonl"
METRIC = "data/replaced"
_SURE = 4.0  # deviations by which a share must exceed the bound before an epoch has shown it
_FEW = 3

log = logging.getLogger(__name__)


class _Place(NamedTuple):
    """Where a row stands; a split's name is its source's, where there is one."""

    source: str
    split: str
    shard: str  # of a stream
    row: int


class TooManyBrokenError(UserError):
    """More of the data is broken than may be."""


class Quarantine(Callback):
    """Keeps account of the rows that others stood in for.

    The account is of all ranks, settled whenever training logs; it travels in the checkpoint.
    """

    def __init__(self) -> None:
        self._logged = LoggedSteps()
        self._new: list[tuple[str, Broken]] = []  # of this rank, not settled yet
        self._pairs = Counter[str]()  # seen by all ranks together, by split
        self._replaced: dict[str, Counter[str]] = {TRAIN: Counter(), VALIDATION: Counter()}
        self._named: set[_Place] = set()  # what is in the file
        self._file: Path | None = None
        self._said = False

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._settle(trainer)  # all ranks save together
        checkpoint[FILE] = {"pairs": self._pairs[TRAIN], "replaced": dict(self._replaced[TRAIN])}

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        kept = checkpoint.get(FILE, {"pairs": 0, "replaced": {}})
        self._pairs[TRAIN] = int(kept["pairs"])
        self._replaced[TRAIN] = Counter(kept["replaced"])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = folder_of_run(trainer)
        self._file = None if folder is None else folder / FILE
        self._named = _named_in(self._file)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._logged.start(trainer)

    # After the batch, so that a checkpoint, which is written before the next, has it in.
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PairBatch,
        batch_idx: int,
    ) -> None:  # fmt: skip
        self._note(TRAIN, batch, trainer)
        if self._logged.reached(trainer):
            self._settle(trainer)
            if self._replaced[TRAIN]:
                pl_module.log(METRIC, float(self._replaced[TRAIN].total()))
            self._refuse(TRAIN, trainer, slack=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(trainer)
        self._refuse(TRAIN, trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._pairs[VALIDATION] = 0
        self._replaced[VALIDATION] = Counter()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: PairBatch,
        *_: Any,
    ) -> None:  # fmt: skip
        self._note(VALIDATION, batch, trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle(trainer)
        self._refuse(VALIDATION, trainer, slack=True)

    def describe(self) -> str | None:
        """Return the line that says at the end what was replaced."""
        replaced = self._replaced[TRAIN]
        if not replaced:
            return None
        where = "" if self._file is None else f"; named in {os.path.relpath(self._file)}"
        return f"{_counted(replaced)} of {self._pairs[TRAIN]:,} samples were replaced{where}"

    def _note(self, split: str, batch: PairBatch, trainer: L.Trainer) -> None:
        self._new += [(split, broken) for broken in batch.get("broken", ())]
        self._pairs[split] += len(batch["tokens"]) * trainer.world_size

    def _settle(self, trainer: L.Trainer) -> None:
        everywhere = told_by_ranks(self._new)
        self._new = []
        for split, broken in everywhere:
            if not broken.stands_in:
                self._replaced[split][broken.reason] += 1
        if trainer.is_global_zero:
            self._name(everywhere)

    def _name(self, everywhere: Sequence[tuple[str, Broken]]) -> None:
        fresh = {_place(split, broken): broken for split, broken in everywhere}
        fresh = {place: broken for place, broken in fresh.items() if place not in self._named}
        if not fresh:
            return
        self._named |= fresh.keys()
        if self._file is not None:
            _append(self._file, [_line(place, broken) for place, broken in fresh.items()])
        if not self._said:
            self._said = True
            place, broken = next(iter(fresh.items()))
            where = "" if self._file is None else f" and named in {os.path.relpath(self._file)}"
            log.warning(
                "warning: data: %r of %s cannot be used (%s); other pairs stand in for such, which "
                "are counted as %s%s",
                broken.key, place.source, broken.reason, METRIC, where,
            )  # fmt: skip

    def _refuse(self, split: str, trainer: L.Trainer, *, slack: bool = False) -> None:
        share = getattr(trainer.datamodule, "max_broken_ratio", 1.0)  # type: ignore[attr-defined]
        replaced, pairs = self._replaced[split], self._pairs[split]
        allowed = share * pairs
        if slack and share > 0:  # a few broken ones among few pairs say little
            allowed += _SURE * math.sqrt(allowed) + _FEW
        if replaced.total() > allowed:
            where = "" if self._file is None else f"; {os.path.relpath(self._file)} names them"
            raise TooManyBrokenError(
                f"data: {_counted(replaced)} of {pairs:,} samples of {split} cannot be used, more "
                f"than data.max_broken_ratio, {share:g}, allows{where}"
            )


def _counted(reasons: Counter[str]) -> str:
    each = ", ".join(f"{reason} {number:,}" for reason, number in reasons.most_common())
    return f"{reasons.total():,} ({each})"


def _place(split: str, broken: Broken) -> _Place:
    return _Place(broken.source or split, split, broken.shard, broken.row)


def _line(place: _Place, broken: Broken) -> str:
    said = {**place._asdict(), "key": broken.key, "reason": broken.reason, "detail": broken.detail}
    if not place.shard:
        del said["shard"]
    return json.dumps(said, ensure_ascii=False) + "\n"


def _append(file: Path, lines: Sequence[str]) -> None:
    try:
        begin = "\n" if _is_torn(file) else ""
        with file.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(begin + "".join(lines))
    except OSError as error:  # a full disk; the counts are in the metrics
        log.warning("warning: %s cannot be written (%s)", file, error.strerror)


def _is_torn(file: Path) -> bool:
    """Whether a kill has left a file with half a line at its end."""
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() != b"\n"


def _named_in(file: Path | None) -> set[_Place]:
    """Return what a file names; a run goes on with it."""
    if file is None or not file.is_file():
        return set()
    named = set()
    # Not `splitlines`, which breaks within keys at rare separators too.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            said = json.loads(line)
            source, split, shard = (str(said.get(of, "")) for of in ("source", "split", "shard"))
            named.add(_Place(source, split, shard, int(said["row"])))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn by a kill
    return named
