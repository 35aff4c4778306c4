"""Zero-shot classification and retrieval inside training; all maths is in clipkit.evaluation."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from clipkit.data.pairs import PairDataModule
from clipkit.errors import UserError
from clipkit.evaluation.classification import (
    build_classifier,
    classification_intervals,
    classification_metrics,
    classify,
)
from clipkit.evaluation.prompts import class_name_warnings, expand
from clipkit.evaluation.retrieval import retrieval_intervals, retrieval_metrics, retrieve
from clipkit.evaluation.statistics import Interval
from clipkit.module import CLIPModule
from clipkit.suite import EvalData, embed_data, open_classes, open_rows
from clipkit.tracking import run_folder

if TYPE_CHECKING:
    from clipkit.data.rows import Rows


class Outcome(NamedTuple):
    """One metric sample by sample: what two runs are compared by."""

    metric: str
    row: Tensor  # (N,) int64
    group: Tensor  # (N,) int64, rows of one group are not independent
    outcome: Tensor  # (N,) float64


class Measured(NamedTuple):
    """What an evaluation found on one data set."""

    metrics: dict[str, float]
    intervals: dict[str, Interval]
    outcomes: list[Outcome]


class ZeroShot(Callback):
    """Evaluates once before the first step and at the end of every epoch, or every n.

    Args:
        datasets: what to evaluate on; the key names the set in its metrics.
        every_n_epochs: evaluate after every n-th epoch, the first and the last.
    """

    kind: str
    measures: tuple[str, ...]

    def __init__(self, datasets: dict[str, EvalData], *, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise UserError(f"every_n_epochs: {every_n_epochs} is less than 1")
        for name in datasets:
            if not re.fullmatch(r"[\w-][\w -]*", name):
                raise UserError(
                    f"{type(self).__name__}.datasets: {name!r} names metrics and files; use "
                    "letters, digits, _, - and blanks"
                )
        self.datasets = datasets
        self.every_n_epochs = every_n_epochs
        self._rows: dict[str, Rows] = {}
        self._has_logged = False
        self._latest: dict[str, dict[str, float]] = {"epoch": {}, "end": {}}
        self._kept: dict[Path, tuple[int, float | None]] = {}

    @abstractmethod
    def measure(self, module: CLIPModule, name: str, data: EvalData, rows: Rows) -> Measured:
        """Evaluate on one data set."""

    def arrange(self, rows: Rows) -> Rows:
        """Return the rows as the evaluation counts them."""
        return rows

    def check(self, data: EvalData, rows: Rows) -> None:
        """Refuse a data set that lacks what the evaluation needs."""

    def metric_names(self) -> dict[str, EvalData]:
        """Return the data set behind each metric that this callback logs."""
        return {
            f"{self.kind}/{name}/{measure}": data
            for name, data in self.datasets.items()
            for measure in self.measures
        }

    def latest(self, when: str) -> dict[str, float]:
        """Return what was measured last: ``epoch`` or ``end``."""
        return self._latest[when]

    # --- When ----------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Opened here, so that a missing column ends the run before an epoch is spent on it.
        for name, data in self.datasets.items():
            try:
                self.check(data, self._open(trainer, name, data))
            except UserError as error:
                raise UserError(f"{type(self).__name__}.datasets.{name}: {error}") from error

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            # Straight to the loggers: through `log` it would land on epoch 1 and reach the
            # checkpoint callback.
            _log_directly(trainer, self._evaluate(trainer, pl_module, "epoch"), step=0)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn != TrainerFn.FITTING or self._is_due(trainer):
            pl_module.log_dict(_exactly(self._evaluate(trainer, pl_module, "epoch")))
            self._has_logged = True
        # In an epoch without an evaluation the checkpoint callback still reads the last value,
        # which Lightning keeps; the loggers get none.

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._settle_outcomes(trainer)
        metrics = self._evaluate(trainer, pl_module, "end")
        _log_directly(trainer, metrics, step=trainer.global_step)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log_dict(_exactly(self._evaluate(trainer, pl_module, "end")))

    def _is_due(self, trainer: L.Trainer) -> bool:
        epoch = trainer.current_epoch + 1
        # The first epoch of a fit too: the checkpoint callback wants its metric from then on.
        return (
            epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs or not self._has_logged
        )

    # --- What ----------------------------------------------------------------------------------

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, when: str
    ) -> dict[str, float]:
        assert isinstance(pl_module, CLIPModule)
        found: dict[str, float] = {}
        for name, data in self.datasets.items():
            if data.when != when:
                continue
            rows = self._open(trainer, name, data)
            with _evaluating(trainer, pl_module):
                measured = self.measure(pl_module, name, data, rows)
            for measure, value in measured.metrics.items():
                key = f"{self.kind}/{name}/{measure}"
                found[key] = value
                found[f"{key}_low"], found[f"{key}_high"] = measured.intervals[measure]
            self._keep_outcomes(trainer, name, measured.outcomes)
        self._latest[when] = found
        return found

    def _open(self, trainer: L.Trainer, name: str, data: EvalData) -> Rows:
        if name not in self._rows:
            training = getattr(trainer, "datamodule", None)
            own = training if isinstance(training, PairDataModule) else None
            self._rows[name] = self.arrange(open_rows(data, own))
        return self._rows[name]

    # --- Outcomes, sample by sample ------------------------------------------------------------

    @rank_zero_only
    def _keep_outcomes(self, trainer: L.Trainer, name: str, outcomes: list[Outcome]) -> None:
        folder = run_folder(trainer)
        if folder is not None:
            self._settle_outcomes(trainer)
            path = folder / "outcomes" / f"{self.kind}-{name}-last.parquet"
            _write(path, outcomes, step=trainer.global_step)
            self._kept[path] = (trainer.global_step, best_score(trainer))

    @rank_zero_only
    def _settle_outcomes(self, trainer: L.Trainer) -> None:
        """Keep the last outcomes as the chosen ones where a checkpoint callback has chosen them.

        It chooses after every validation, so this is seen at the next evaluation: the best score
        has changed since the outcomes were written, and no step was made in between.
        """
        for last, (step, before) in self._kept.items():
            chosen = best_score(trainer) != before and chosen_step(trainer) == step
            if chosen and last.is_file():
                name = last.name.replace("-last.parquet", "-chosen.parquet")
                last.with_name(name).write_bytes(last.read_bytes())
        self._kept.clear()


class ZeroShotClassification(ZeroShot):
    """Names what is in a picture from the names of the classes alone.

    Logs ``zeroshot/<set>/top1``, ``top5`` and ``mean_class_top1``, each with its 95 % interval.

    Args:
        datasets: what to evaluate on; the key names the set in its metrics.
        every_n_epochs: evaluate after every n-th epoch, the first and the last.
    """

    kind = "zeroshot"
    measures = ("top1", "top5", "mean_class_top1")

    def check(self, data: EvalData, rows: Rows) -> None:
        expand(open_classes(data, rows).names, data.templates)

    def measure(self, module: CLIPModule, name: str, data: EvalData, rows: Rows) -> Measured:
        classes = open_classes(data, rows)
        for sentence in class_name_warnings(classes.names):
            rank_zero_warn(f"zeroshot/{name}: {sentence}")
        prompts = expand(classes.names, data.templates)
        texts = module.embed_texts(prompts.unique)[prompts.prompt_index]
        classifier = build_classifier(texts, prompts.class_of_prompt, len(classes.names))
        images = embed_data(module, data, rows)
        found = classify(images, classifier, torch.from_numpy(classes.labels))
        numbers = torch.arange(len(rows))
        return Measured(
            classification_metrics(found),
            classification_intervals(found),
            [Outcome("top1", numbers, numbers, found.top1)],
        )


class ZeroShotRetrieval(ZeroShot):
    """Finds a picture's captions among all captions, and a caption's picture among all pictures.

    Logs ``retrieval/<set>/image_to_text_r1`` and its like, each with its 95 % interval.

    Args:
        datasets: what to evaluate on; the key names the set in its metrics.
        every_n_epochs: evaluate after every n-th epoch, the first and the last.
    """

    kind = "retrieval"
    measures = tuple(
        f"{direction}_{measure}"
        for direction in ("image_to_text", "text_to_image")
        for measure in ("r1", "r5", "r10", "recall5", "mean_rank", "median_rank")
    )

    def arrange(self, rows: Rows) -> Rows:
        # A picture that stands in several rows is one candidate with several captions.
        from clipkit.data.rows import group_by_picture

        return group_by_picture(rows)

    def measure(self, module: CLIPModule, name: str, data: EvalData, rows: Rows) -> Measured:
        captions, image_of_text = _captions(rows)
        texts = module.embed_texts(captions)
        images = embed_data(module, data, rows)
        found = retrieve(images, texts, torch.from_numpy(image_of_text))
        outcomes = [
            Outcome(f"{direction}_r{k}", side.rows, side.groups, getattr(side, f"hit{k}"))
            for direction, side in (
                ("image_to_text", found.image_to_text),
                ("text_to_image", found.text_to_image),
            )
            for k in (1, 5, 10)
        ]
        return Measured(retrieval_metrics(found), retrieval_intervals(found), outcomes)


def chooser(trainer: L.Trainer) -> ModelCheckpoint | None:
    """Return the checkpoint callback that chooses by a monitored metric, if there is one."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            return callback
    return None


def chosen_checkpoint(trainer: L.Trainer) -> str:
    """Return the file that holds the best weights so far, or ''."""
    callback = chooser(trainer)
    return "" if callback is None else callback.best_model_path


def best_score(trainer: L.Trainer) -> float | None:
    """Return the best value of the monitored metric so far."""
    callback = chooser(trainer)
    score = None if callback is None else callback.best_model_score
    return None if score is None else float(score)


def chosen_step(trainer: L.Trainer) -> int | None:
    """Return the step whose weights the chooser saved last."""
    callback = chooser(trainer)
    return None if callback is None else callback._last_global_step_saved


def _captions(rows: Rows) -> tuple[list[str], np.ndarray]:
    """Return all captions of the rows and the row of each."""
    captions: list[str] = []
    image_of_text: list[int] = []
    for row, texts in enumerate(rows.all_captions()):
        captions += texts
        image_of_text += [row] * len(texts)
    return captions, np.array(image_of_text, dtype=np.int64)


def _write(path: Path, outcomes: list[Outcome], *, step: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables(
        pa.table(
            {
                "metric": [one.metric] * len(one.row),
                "row": one.row.numpy(),
                "group": one.group.numpy(),
                "outcome": one.outcome.numpy(),
            }
        )
        for one in outcomes
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"step": str(step)}), path)


def _exactly(metrics: dict[str, float]) -> dict[str, Tensor]:
    # A plain float would be rounded to float32 on its way to the loggers.
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}


def _log_directly(trainer: L.Trainer, metrics: dict[str, float], *, step: int) -> None:
    if metrics:
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=step)


@contextmanager
def _evaluating(trainer: L.Trainer, module: CLIPModule) -> Iterator[None]:
    """Eval mode, no gradients, and the run's own precision."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        module.train(training)
