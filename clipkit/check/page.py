"""The page that `clipkit check` prints, a paragraph as soon as it is measured."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch

from clipkit.check.gradients import Comparison
from clipkit.check.memory import LargestMicroBatch
from clipkit.check.speed import Captions, Speed
from clipkit.data.pairs import PairDataModule
from clipkit.losses import InfoNCELoss, SigLIPLoss
from clipkit.module import CLIPModule

_WIDTH = 22  # of what stands before a value


def say(title: str, rows: Iterator[tuple[str, str]]) -> None:
    """Print a paragraph."""
    lines = [f"  {label:{_WIDTH}}{text}" for label, text in rows]
    print("\n".join([f"\n{title}", *lines]), flush=True)


def run_rows(
    trainer: L.Trainer, module: CLIPModule, data: PairDataModule, precision: str
) -> Iterator[tuple[str, str]]:
    """Say what is checked."""
    total = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    frozen = f", {trained / 1e6:.1f} M of them trained" if trained < total else ""
    towers = f"{type(module.image_encoder).__name__} + {type(module.text_encoder).__name__}"
    yield "model", f"{towers}, {total / 1e6:.1f} M parameters{frozen}"
    yield "data", data.describe().removeprefix("data: ")
    held = f", {module.micro_batch} at a time" if module.micro_batch else ""
    yield "batch", f"{data.batch_size:,} pairs a step over {_ranks(trainer.world_size)}{held}"
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    yield "precision", f"{precision} on {name}"


def gradient_rows(found: Comparison, module: CLIPModule, ranks: int) -> Iterator[tuple[str, str]]:
    """Say whether the gradients of all ranks are those of one process."""
    who = _ranks(ranks) if ranks > 1 else "the run"
    yield "verdict", f"{who} and one process {_verdict(found)}"
    yield (
        "largest difference",
        f"{found.difference:.2g} times the largest gradient of {found.worst} "
        f"(up to {found.allowed:.2g} is rounding)",
    )
    still = f"; held still: {', '.join(found.held_still)}" if found.held_still else ""
    yield "compared", f"{found.parameters} parameters on {found.pairs} pairs in float64{still}"
    known = type(module.loss) in (InfoNCELoss, SigLIPLoss)
    loss = "the whole matrix of logits" if known else f"your {type(module.loss).__name__}"
    yield "one process has", f"all pairs at once, captions padded to the context, {loss}"
    if found.unreached:
        rest = f" and {len(found.unreached) - 1} more" if len(found.unreached) > 1 else ""
        yield "without a gradient", f"{found.unreached[0]}{rest}"
    for hint in _hints(found, ranks):
        yield "likely", hint


def speed_rows(
    speed: Speed, data: PairDataModule, steps_done: int, largest: LargestMicroBatch | None
) -> Iterator[tuple[str, str]]:
    """Say how fast the run is, how long it takes and in what memory."""
    batches = f"{speed.batches} batches" if speed.batches > 1 else "1 batch"
    stretch = f"{batches} in {speed.seconds:.0f} s"
    cold = "" if speed.warmed_up else ", the first and slowest among them"
    yield "pairs a second", f"{speed.values['pairs_per_second']:,.1f} ({stretch}{cold})"
    if (waiting := speed.values.get("data_wait")) is not None:
        more = "; a larger data.num_workers may help" if waiting > 0.2 else ""
        yield "waiting for data", f"{_percent(waiting)} of the time{more}"
    if (used := speed.values.get("mfu")) is not None:
        yield "of the card's peak", _percent(used)
    left = max(speed.total_steps - steps_done, 0)
    at_most = ""
    for size in data.image_sizes.sizes.values():  # one, if any: what the stretch was trained on
        at_most = "at most "
        yield "pictures", f"{size} px, the largest of data.image_sizes; others are faster"
    yield (
        "to the end",
        f"{at_most}{_duration(left * speed.seconds_per_step)} for {left:,} steps of "
        f"{data.batch_size * speed.batches_per_step:,} pairs; evaluations come on top",
    )
    on_device = "peak_memory" in speed.values
    what = "of tensors on the device" if on_device else "of the process, loaders left out"
    peak = "not known on this system" if speed.peak_memory is None else None
    yield "peak memory", peak or f"{_bytes(speed.peak_memory or 0)} {what}"
    yield "largest micro-batch", _largest(largest or LargestMicroBatch())


def caption_rows(found: Captions, module: CLIPModule) -> Iterator[tuple[str, str]]:
    """Say what the batches are made of."""
    context = module.tokenizer.contract.context_length
    yield "captions cut", f"{_percent(found.truncated)} are longer than {context} tokens"
    treated = getattr(module.loss, "duplicates", None)
    how = f"; model.loss.duplicates is {treated}" if treated else ""
    yield "captions repeated", f"{_percent(found.captions_repeated)} within their batch{how}"
    yield "pictures repeated", f"{_percent(found.images_repeated)} within their batch"
    yield "seen", f"{found.pairs:,} training pairs"


def _verdict(found: Comparison) -> str:
    if found.agrees:
        close = "" if found.allowed <= 1e-8 else ", as far as the model's own rounding lets them"
        return f"agree{close}"
    if not found.different:
        return "agree, and yet fit would go wrong"
    return f"DIFFER: {found.different} of {found.parameters} parameters"


def _hints(found: Comparison, ranks: int) -> Iterator[str]:
    if found.agrees:
        return
    if found.unreached_stops and found.unreached:
        yield (
            f"no loss depends on {found.unreached[0]}, for whose gradient DDP waits: use it, "
            "freeze it, or take --trainer.strategy ddp_find_unused_parameters_true"
        )
    if found.same_pairs:
        yield "several ranks are given the same pairs: a sampler that does not know its rank"
    if not found.different:
        return
    if found.factor is not None and abs(found.factor) < 1e-6:
        yield f"something detaches {found.worst}: no gradient arrives"
    elif found.factor is not None:
        yield (
            f"a sum where a mean belongs, or the other way round: {found.worst} has "
            f"{found.factor:.4g} times the gradient, and nothing else is wrong with it"
        )
    elif ranks > 1:
        yield "a gather that carries no gradient back to the other ranks, or sums it twice"
        yield "a loss whose mean over the ranks is not the loss of the whole batch"
    else:
        yield "a loss or a tower whose result depends on how the batch is cut"


def _largest(found: LargestMicroBatch) -> str:
    if found.pairs is None:
        return "not known on this system"
    if found.bytes_per_pair is not None and found.available is not None:
        return (
            f"about {_rounded(found.pairs):,} pairs (estimated: {_bytes(found.bytes_per_pair)} "
            f"a pair, {_bytes(found.available)} free to each rank)"
        )
    if found.refused is not None:
        return f"{found.pairs:,} pairs fit, {found.refused:,} do not (tried)"
    return f"{found.pairs:,} pairs fit (tried, and no more)"


def _ranks(count: int) -> str:
    return f"{count} ranks" if count > 1 else "1 rank"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _rounded(number: int) -> int:
    """Return the number with two digits of its own: an estimate has no more."""
    digits = max(len(str(number)) - 2, 0)
    return int(number // 10**digits * 10**digits)


def _bytes(number: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number / 2**10:.1f} KiB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
