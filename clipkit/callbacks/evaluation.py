"""A task of the suite inside training: when it runs, what it logs, what it keeps of samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor

from clipkit.callbacks.schedule import Clock, Schedule
from clipkit.data.pairs import PairDataModule
from clipkit.errors import UserError
from clipkit.module import CLIPModule
from clipkit.suite import EvalData
from clipkit.suite.embedder import ModuleEmbedder
from clipkit.suite.eval_data import refuse_set_name
from clipkit.suite.examples import write_examples
from clipkit.suite.opening import Opened, Splits, open_data
from clipkit.suite.outcomes import Measured, write_outcomes
from clipkit.suite.tasks import Task
from clipkit.tracking import folder_of_run
from clipkit.tracking.chosen import best_score, chooses_by, saved_step, saves_after_step
from clipkit.tracking.digests import digest_of_values
from clipkit.tracking.outcomes import examples_beside


class Evaluation(Callback):
    """Evaluates once before the first step and then as scheduled; a subclass names the task.

    Args:
        datasets: what to evaluate on; the key names the set in its metrics.
        every_n_epochs: evaluate after every n-th epoch, the first and the last; left out, after
            every epoch, but where steps or samples are given.
        every_n_steps: evaluate after every n-th optimiser step.
        every_n_samples: evaluate each time so many further pairs were seen.
        max_time_ratio: leave an evaluation out where they would take more than this share of the
            time; before the first step and at the end is always.
    """

    task: Task
    train_split: str | None = None
    """The split of each data set that the task learns from."""

    def __init__(
        self,
        datasets: dict[str, EvalData],
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every_n_samples: int | None = None,
        max_time_ratio: float | None = None,
    ) -> None:
        for name in datasets:
            if wrong := refuse_set_name(name):
                raise UserError(f"{type(self).__name__}.datasets: {wrong}")
        self.datasets = datasets
        self.schedule = Schedule(
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            every_n_samples=every_n_samples,
            max_time_ratio=max_time_ratio,
        )
        self._clock = Clock(self.schedule)
        self._opened: dict[tuple[str, str], Opened] = {}
        self._settings: dict[str, str] = {}
        self._has_logged = False
        self._evaluated_step: dict[str, int] = {}
        self._latest: dict[str, dict[str, float]] = {"epoch": {}, "end": {}}
        self._kept: dict[Path, tuple[int, float | None]] = {}

    def metric_names(self) -> dict[str, EvalData]:
        """Return the data set behind each metric that this callback logs."""
        return {
            f"{self.task.kind}/{name}/{measure}": data
            for name, data in self.datasets.items()
            for measure in self.task.measures
        }

    def latest(self, when: str) -> dict[str, float]:
        """Return what was measured last: ``epoch`` or ``end``."""
        return self._latest[when]

    def evaluated_at(self, when: str) -> int | None:
        """Return how many steps had been made when that was measured."""
        return self._evaluated_step.get(when)

    @property
    def seconds_spent(self) -> float:
        """How long the evaluations of this fit have taken together."""
        return self._clock.spent

    @property
    def state_key(self) -> str:
        return self._generate_state_key(datasets=sorted(self.datasets))

    def state_dict(self) -> dict[str, Any]:
        return {"latest": self._latest, "evaluated_step": self._evaluated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._latest = state_dict["latest"]
        self._evaluated_step = state_dict["evaluated_step"]
        self._has_logged = bool(self._latest["epoch"])

    # --- When ----------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Opened here, so that a missing column ends the run before an epoch is spent on it.
        for name, data in self.datasets.items():
            try:
                if data.split == self.train_split:
                    raise UserError(f"train_split: {data.split!r} is the split that is scored")
                self.task.check(self._open(trainer, name, data.split))
                if self.train_split is not None:
                    self.task.check(self._open(trainer, name, self.train_split))
            except UserError as error:
                sentence = str(error).removeprefix("EvalData.")
                raise UserError(f"{type(self).__name__}.datasets.{name}: {sentence}") from error

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._clock.start(trainer.global_step)
        if trainer.global_step == 0:
            # Straight to the loggers: through `log` it would land on epoch 1 and reach the
            # checkpoint callback.
            _log_directly(trainer, self._evaluate(trainer, pl_module, "epoch"), step=0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
    ) -> None:
        if not self.schedule.within_epochs:
            return
        data = own_data(trainer)
        pairs = 1 if data is None else data.batch_size * trainer.accumulate_grad_batches
        due = self._clock.due_after_step(trainer, pairs)
        chosen_now = saves_after_step(trainer, self.metric_names())
        if due or (chosen_now and not self._is_current(trainer)):
            metrics = self._evaluate(trainer, pl_module, "epoch")
            _log_directly(trainer, metrics, step=trainer.global_step)
            # For a checkpoint callback that chooses inside an epoch.
            pl_module.log_dict(_exactly(metrics), on_step=True, on_epoch=False, logger=False)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            pl_module.log_dict(_exactly(self._evaluate(trainer, pl_module, "epoch")))
        elif self._is_current(trainer):
            pl_module.log_dict(_exactly(self._latest["epoch"]), logger=False)
            self._has_logged = True
        elif self._is_due_after_epoch(trainer):
            metrics = self._evaluate(trainer, pl_module, "epoch")
            # At the steps that were made, as within an epoch; Lightning would log one less.
            _log_directly(trainer, metrics, step=trainer.global_step)
            pl_module.log_dict(_exactly(metrics), logger=False)
            self._has_logged = True
        else:
            # The checkpoint callback still reads the last value; the loggers get none.
            pl_module.log_dict(_exactly(self._latest["epoch"]), logger=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A run that steps, time or a callback have ended: the weights it ends with count.
        if not self._is_current(trainer):
            metrics = self._evaluate(trainer, pl_module, "epoch")
            _log_directly(trainer, metrics, step=trainer.global_step)
        metrics = self._evaluate(trainer, pl_module, "end")
        _log_directly(trainer, metrics, step=trainer.global_step)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log_dict(_exactly(self._evaluate(trainer, pl_module, "end")))

    def _is_current(self, trainer: L.Trainer) -> bool:
        """Whether the last evaluation is of the present weights."""
        return self._evaluated_step.get("epoch") == trainer.global_step

    def _is_due_after_epoch(self, trainer: L.Trainer) -> bool:
        # After the first epoch of a fit too: the checkpoint callback wants its metric from then on.
        # And whoever chooses by a value of an earlier step would keep weights that never had it.
        return (
            not self._has_logged
            or self._clock.due_after_epoch(trainer)
            or (self.schedule.within_epochs and chooses_by(trainer, self.metric_names()))
        )

    # --- What ----------------------------------------------------------------------------------

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, when: str
    ) -> dict[str, float]:
        assert isinstance(pl_module, CLIPModule)
        found: dict[str, float] = {}
        self._settle_outcomes(trainer)
        self._evaluated_step[when] = trainer.global_step
        with self._clock.running():
            for name, data in self.datasets.items():
                if data.when == when:
                    found |= self._evaluate_set(trainer, pl_module, name, data)
        self._latest[when] = found
        return found

    def _evaluate_set(
        self, trainer: L.Trainer, module: CLIPModule, name: str, data: EvalData
    ) -> dict[str, float]:
        test = self._open(trainer, name, data.split)
        train = None if self.train_split is None else self._open(trainer, name, self.train_split)
        splits = Splits(test, train)
        prefix = f"{self.task.kind}/{name}"
        with evaluating(trainer, module), _naming_warnings(prefix):
            try:
                measured = self.task.measure(ModuleEmbedder(module), splits)
            except UserError as error:
                if trainer.state.fn != TrainerFn.FITTING:
                    raise
                # Training goes on: a broken picture in one of many sets is no reason to lose it.
                warnings.warn(f"not evaluated ({error.sentence})", stacklevel=2)
                return {}
        # The same at every evaluation, and many prompts may be in it.
        if name not in self._settings:
            self._settings[name] = digest_of_values(self.task.settings(splits))
        self._keep_outcomes(trainer, name, splits, measured)
        found: dict[str, float] = {}
        for measure in self.task.measures:
            metric = measured.metrics.get(measure)
            if metric is None:
                continue
            found[f"{prefix}/{measure}"] = metric.value
            if metric.interval is not None:
                low, high = metric.interval
                found[f"{prefix}/{measure}_low"], found[f"{prefix}/{measure}_high"] = low, high
        return found

    def _open(self, trainer: L.Trainer, name: str, split: str) -> Opened:
        if (name, split) not in self._opened:
            data = self.datasets[name].of_split(split)
            self._opened[name, split] = self.task.arrange(open_data(data, own_data(trainer)))
        return self._opened[name, split]

    # --- Outcomes, sample by sample ------------------------------------------------------------

    @rank_zero_only
    def _keep_outcomes(
        self, trainer: L.Trainer, name: str, splits: Splits, measured: Measured
    ) -> None:
        folder = folder_of_run(trainer)
        if folder is None:
            return
        path = folder / "outcomes" / f"{self.task.kind}-{name}-last.parquet"
        write_outcomes(
            path,
            measured,
            task=self.task.kind,
            set_name=name,
            data=splits.test.digest,
            settings=self._settings[name],
            step=trainer.global_step,
        )
        write_examples(path, measured.examples, splits.test.rows)
        self._kept[path] = (trainer.global_step, best_score(trainer))

    @rank_zero_only
    def _settle_outcomes(self, trainer: L.Trainer) -> None:
        """Keep the last outcomes as the chosen ones where a checkpoint callback has chosen them.

        It chooses after every validation, so this is seen at the next evaluation: the best score
        has changed since the outcomes were written, and no step was made in between.
        """
        for last, (step, before) in self._kept.items():
            if best_score(trainer) == before or saved_step(trainer) != step:
                continue
            chosen = last.with_name(last.name.replace("-last.parquet", "-chosen.parquet"))
            for source, target in (
                (last, chosen),
                (examples_beside(last), examples_beside(chosen)),
            ):
                if source.is_file():
                    target.write_bytes(source.read_bytes())
        self._kept.clear()


def own_data(trainer: L.Trainer) -> PairDataModule | None:
    """Return the data module of the run, where it is one of clipkit's."""
    data = getattr(trainer, "datamodule", None)
    return data if isinstance(data, PairDataModule) else None


def _exactly(metrics: dict[str, float]) -> dict[str, Tensor]:
    # A plain float would be rounded to float32 on its way to the loggers.
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}


def _log_directly(trainer: L.Trainer, metrics: dict[str, float], *, step: int) -> None:
    if metrics:
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step=step)


@contextmanager
def evaluating(trainer: L.Trainer, module: CLIPModule) -> Iterator[None]:
    """Eval mode, no gradients, and the run's own precision."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        module.train(training)


@contextmanager
def _naming_warnings(prefix: str) -> Iterator[None]:
    """Say what the task warns of on the first rank only, and of which data set it speaks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if warning.category is UserWarning:
            rank_zero_warn(f"{prefix}: {warning.message}")
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
