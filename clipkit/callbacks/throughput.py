"""How fast a run trains, and what it waits for: measured so that a card's queue deceives nobody.

A GPU works behind the program: what the clock shows between two steps is how fast work was handed
over, not how fast it was done. So the clock is read where the device has been synchronised, which
happens at logging steps (and where validation or a checkpoint interrupts the training) and nowhere
else. What happens in between is told by counts of integers alone.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.profilers import Profiler

from clipkit.callbacks.evaluation import Evaluation
from clipkit.callbacks.logged_steps import LoggedSteps
from clipkit.callbacks.peak_flops import peak_flops
from clipkit.data.samples import PairBatch
from clipkit.encoders.flops import (
    TextOperations,
    backward_share,
    image_operations,
    text_operations,
)
from clipkit.errors import UserError
from clipkit.module import CLIPModule
from clipkit.tracking import callbacks_of

FETCH = "[_TrainingEpochLoop].train_dataloader_next"
SAVE = "save_checkpoint"
"""What Lightning calls the two actions in its profilers."""

Context = Callable[[], AbstractContextManager[None]]

SHOWN = {"pairs_per_second": "pairs/s", "data_wait": "waiting", "mfu": "mfu"}
"""What the progress bar has room for, and as what."""


class Throughput(Callback):
    """Logs how fast a run trains, under ``throughput/``, at every logging step for the time since.

    - ``pairs_per_second``: of all ranks together. Validation, evaluations and checkpoints are not
      training time; waiting for data, logging and the steps themselves are. The first value holds
      the warm-up.
    - ``data_wait``: the share of that time in which a step waited for the next batch; on a CUDA
      device, in which the device had nothing to do meanwhile.
    - ``mfu``: the operations of the towers on real tokens and kept patches, as a share of the
      device's stated peak: forward once, backward twice as much for what is trained. What is
      computed again to save memory is not credited; heads and loss, about one per cent, are left
      out. Logged where the peak is known.
    - ``peak_memory``: the most bytes that tensors took on the device, CUDA only.
    - ``tokens_per_caption``: without padding; and ``padding``, its share of all computed tokens.

    But for the pairs of all ranks these are of rank zero, which alone measures.

    Args:
        peak_flops: operations a second that one device can do at most in the precision of the run;
            left out, what the maker of the card states, where that is known.
    """

    def __init__(self, *, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise UserError(f"Throughput.peak_flops: {peak_flops} is not above 0")
        self.peak_flops = peak_flops
        self._clock: Callable[[], float] = time.perf_counter
        self._meter: _Meter | None = None
        self._utilisation: _Utilisation | None = None
        self._profiler: Profiler | None = None
        self._logged = LoggedSteps()

    # --- When ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, CLIPModule)
        self._logged.start(trainer)
        self._utilisation = self._measurable(trainer, pl_module)
        self._meter = _Meter(pl_module.device, lambda: self._clock() - _evaluating(trainer))
        self._listen(trainer, self._meter)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._meter is not None:
            self._meter.resume()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: PairBatch, batch_idx: int
    ) -> None:
        if self._meter is not None:
            self._meter.resume()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: PairBatch,
        batch_idx: int,
    ) -> None:
        if self._meter is None:
            return
        assert isinstance(pl_module, CLIPModule)
        self._meter.counts.add(batch, pl_module)
        if self._is_due(trainer):
            lap = self._meter.read()
            if lap.seconds > 0:
                self._take(trainer, pl_module, lap)

    def _is_due(self, trainer: L.Trainer) -> bool:
        """Whether to read the meter after this batch; asked once a batch."""
        return self._logged.reached(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._meter is not None:
            self._meter.pause()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._meter is not None:
            self._meter.pause()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._finish(trainer)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._finish(trainer)

    def _listen(self, trainer: L.Trainer, meter: _Meter) -> None:
        # No hook stands right before a batch is fetched, nor after a checkpoint was written; and
        # under DDP Lightning waits for the device in between. Profilers are told of both.
        whole: Any = trainer
        self._profiler = whole.profiler
        whole.profiler = _Listening(
            whole.profiler, {FETCH: meter.fetching, SAVE: meter.interrupted}
        )

    def _finish(self, trainer: L.Trainer) -> None:
        self._meter = None
        if self._profiler is not None:
            trainer.profiler, self._profiler = self._profiler, None  # type: ignore[attr-defined]

    # --- What ----------------------------------------------------------------------------------

    def _measurable(self, trainer: L.Trainer, module: CLIPModule) -> _Utilisation | None:
        peak = self.peak_flops
        if peak is None and module.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(module.device), str(trainer.precision))
        if peak is None:
            return None
        contract, encoder = module.tokenizer.contract, module.image_encoder
        try:
            return _Utilisation(
                peak,
                {encoder.image_size: image_operations(encoder)},
                text_operations(module.text_encoder, contract),
            )
        except Exception as error:  # of a user's own tower; no reason not to train it
            warnings.warn(f"throughput/mfu: the towers' operations: {error}", stacklevel=2)
            return None

    def _take(self, trainer: L.Trainer, module: CLIPModule, lap: Lap) -> None:
        """Log what was measured."""
        values = self._values(trainer, module, lap)
        # Tensors on the CPU: reading them never waits for the device.
        module.log_dict(
            {f"throughput/{k}": torch.tensor(v, dtype=torch.float64) for k, v in values.items()},
            rank_zero_only=True,
        )
        # What goes to the bar through `log_dict` is turned to numbers again after every step.
        shown = {label: values[name] for name, label in SHOWN.items() if name in values}
        trainer.progress_bar_metrics.update(shown)

    def _values(self, trainer: L.Trainer, module: CLIPModule, lap: Lap) -> dict[str, float]:
        counts = lap.counts
        values = {"pairs_per_second": counts.pairs * trainer.world_size / lap.seconds}
        if lap.waited is not None:
            values["data_wait"] = min(lap.waited / lap.seconds, 1.0)
        if lap.peak_memory is not None:
            values["peak_memory"] = float(lap.peak_memory)
        if counts.tokens:
            values["tokens_per_caption"] = counts.tokens / counts.captions
            values["padding"] = 1 - counts.tokens / counts.computed_tokens
            if self._utilisation is not None:
                values["mfu"] = self._utilisation.of(counts, module, lap.seconds)
        return values


class _Utilisation(NamedTuple):
    """What a device could do, and what the towers take of it."""

    peak: float  # operations a second
    image: dict[int, float]  # operations of a picture, forward, by its side
    text: TextOperations

    def of(self, counts: _Counts, module: CLIPModule, seconds: float) -> float:
        """Return the share of the peak that was used."""
        encoder = module.image_encoder
        image = 0.0
        for size, pictures in counts.pictures.items():
            if size not in self.image:
                self.image[size] = image_operations(encoder, size)
            image += self.image[size] * pictures
        text = self.text.total(
            captions=counts.captions, tokens=counts.tokens, squares=counts.squared_tokens
        )
        done = image * (1 + 2 * backward_share(encoder)) + text * (
            1 + 2 * backward_share(module.text_encoder)
        )
        return done / seconds / self.peak


@dataclass
class _Counts:
    """What this rank was trained on since the last logging step."""

    pairs: int = 0
    pictures: Counter[int] = field(default_factory=Counter)  # by their side
    captions: int = 0  # of the pairs, and others that are negatives
    tokens: int = 0  # real ones
    squared_tokens: int = 0  # of each caption, added up: what attention costs goes by them
    computed_tokens: int = 0  # with padding

    def add(self, batch: PairBatch, module: CLIPModule) -> None:
        """Count a batch, without looking at a tensor's values."""
        self.pairs += len(batch["tokens"])
        self.pictures[batch["images"].shape[-1]] += len(batch["images"])
        lengths = batch.get("lengths")
        if lengths is not None:
            self.captions += len(lengths)
            self.tokens += sum(lengths)
            self.squared_tokens += sum(length * length for length in lengths)
            self.computed_tokens += _computed_tokens(batch, module)


def _computed_tokens(batch: PairBatch, module: CLIPModule) -> int:
    """Return how many tokens the text side computes, padding and all."""
    # A tower that sees its padding is given all of it.
    least = 0 if module.text_encoder.trim_is_exact else module.tokenizer.contract.context_length
    groups = module.caption_groups(batch)
    if groups.packed:
        return sum(batch["lengths"])
    captions = batch["lengths"]
    return sum(len(captions[span.rows]) * max(span.length, least) for span in groups.spans)


def _evaluating(trainer: L.Trainer) -> float:
    """How long clipkit's own evaluations have taken so far."""
    return sum(c.seconds_spent for c in callbacks_of(trainer) if isinstance(c, Evaluation))


# --- Measuring -----------------------------------------------------------------------------------


class Lap(NamedTuple):
    """What was measured between two readings of the meter."""

    seconds: float  # of training
    waited: float | None  # seconds; None where Lightning told of no fetch
    counts: _Counts
    peak_memory: int | None


class _Meter:
    """The time of training, of waiting for data, and the memory, until it is read."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self.counts = _Counts()
        self._device = device
        self._training = _Stopwatch(clock)
        self._waiting: _Watch = _IdleTime() if device.type == "cuda" else _Stopwatch(clock)
        self._fetched = False
        self._peak_memory = 0

    def resume(self) -> None:
        """Training goes on, if it was interrupted."""
        if not self._training.running:
            if self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)
            self._training.start()

    def pause(self) -> None:
        """What follows is not training."""
        if self._training.running:
            self._synchronise()
            self._training.stop()
            self._note_memory()

    @contextmanager
    def interrupted(self) -> Iterator[None]:
        """Not training, within training or not."""
        within = self._training.running
        self.pause()
        yield
        if within:
            self.resume()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Waiting for a batch: that is training time too."""
        self.resume()
        self._fetched = True
        self._waiting.start()
        yield
        self._waiting.stop()

    def read(self) -> Lap:
        """Return what was measured since it was last read, when all of it is done."""
        self._synchronise()
        self._note_memory()
        lap = Lap(
            seconds=self._training.lap(),
            waited=self._waiting.lap() if self._fetched else None,
            counts=self.counts,
            peak_memory=self._peak_memory if self._device.type == "cuda" else None,
        )
        self.counts, self._peak_memory = _Counts(), 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return lap

    def _synchronise(self) -> None:
        torch.get_device_module(self._device).synchronize()

    def _note_memory(self) -> None:
        if self._device.type == "cuda":
            used = torch.cuda.max_memory_allocated(self._device)
            self._peak_memory = max(self._peak_memory, used)


class _Watch(Protocol):
    """Something that adds up seconds."""

    def start(self) -> None:
        """Begin a span."""

    def stop(self) -> None:
        """End it."""

    def lap(self) -> float:
        """Return the seconds since the last lap; on a GPU, when it is synchronised."""


class _Stopwatch:
    """Seconds by a clock of the program."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began: float | None = None
        self._seconds = 0.0

    @property
    def running(self) -> bool:
        return self._began is not None

    def start(self) -> None:
        self._began = self._clock()

    def stop(self) -> None:
        if self._began is not None:
            self._seconds += self._clock() - self._began
            self._began = None

    def lap(self) -> float:
        running = self.running
        self.stop()
        seconds, self._seconds = self._seconds, 0.0
        if running:
            self.start()
        return seconds


class _IdleTime:
    """Seconds in which a CUDA device had nothing left to do between two marks in its queue.

    While it is behind, it passes both marks in one go; nobody waits for it here.
    """

    def __init__(self) -> None:
        self._began: torch.cuda.Event | None = None
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        self._began = _mark()

    def stop(self) -> None:
        if self._began is not None:
            self._spans.append((self._began, _mark()))

    def lap(self) -> float:
        spans, self._spans = self._spans, []
        return sum((float(began.elapsed_time(ended)) for began, ended in spans), 0.0) / 1000


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class _Listening(Profiler):
    """The run's own profiler, and contexts that some actions are to run in."""

    def __init__(self, profiler: Profiler, actions: Mapping[str, Context]) -> None:
        super().__init__()
        self._profiler = profiler
        self._actions = actions
        self._open: dict[str, AbstractContextManager[None]] = {}

    def start(self, action_name: str) -> None:
        if action_name in self._actions:
            self._open[action_name] = self._actions[action_name]()
            self._open[action_name].__enter__()
        self._profiler.start(action_name)

    def stop(self, action_name: str) -> None:
        self._profiler.stop(action_name)
        if action_name in self._open:
            self._open.pop(action_name).__exit__(None, None, None)

    def summary(self) -> str:
        return self._profiler.summary()

    def __getattr__(self, name: str) -> Any:
        # Whatever else a profiler of the user offers.
        return getattr(self._profiler, name)
