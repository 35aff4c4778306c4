"""Micro-batches: the memory of a small batch and the loss of a large one, and what that costs.

python -m benchmarks.micro_batches [--batch 256] [--micro-batch 16]
python -m benchmarks.micro_batches --device cuda     (ViT-B/32, batch 1,024 by 128, bf16)

One training step (forward, loss, backward) of a CLIPModule. Its peak memory is compared with that
of a plain step of the micro-batch alone, once with and once without weights and inputs; its time
with a plain step of the whole batch. Without a GPU the towers are those of open_clip's ViT-S-32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.batches import about, batches_of
from benchmarks.interleaved import (
    MIB,
    alone,
    parser,
    peak_above,
    race,
    ratio,
    record,
    shown,
    spread,
    table,
)
from benchmarks.models import SHAPES, add_precision, autocast, module_of, precision_of
from benchmarks.step import our_loss
from clipkit.data.samples import PairBatch
from clipkit.module import CLIPModule

GOALS = {"times_the_memory": 1.3, "times_the_time": 1.4}
DEFAULTS = {"cpu": ("ViT-S-32", 256, 16), "cuda": ("ViT-B-32", 1024, 128)}


class Contender(NamedTuple):
    """A step: of how many pairs, and how many of them the device holds at a time."""

    batch: int
    micro_batch: int | None


def contenders(options: argparse.Namespace) -> dict[str, Contender]:
    """Return what is compared."""
    return {
        "micro-batch alone": Contender(options.micro_batch, None),
        "micro-batches": Contender(options.batch, options.micro_batch),
        "whole batch": Contender(options.batch, None),
    }


def batch_for(options: argparse.Namespace, size: int) -> PairBatch:
    """Return one batch."""
    return batches_of(1, size, SHAPES[options.model].image_size, options.device)[0]


def step_of(
    module: CLIPModule, batch: PairBatch, micro_batch: int | None, options: argparse.Namespace
) -> Callable[[], None]:
    """Return what makes one step; the gradients of the one before are dropped first."""

    def step() -> None:
        module.micro_batch = micro_batch
        module.zero_grad()
        with autocast(options.precision, options.device):
            loss = our_loss(module, batch)
        loss.backward()  # type: ignore[no-untyped-call]

    return step


def peak(contender: Contender, options: argparse.Namespace) -> dict[str, float]:
    """Return the MiB of a step above weights and inputs, and theirs."""
    torch.set_num_threads(options.threads)
    module = module_of(options.model).to(options.device)
    # Libraries load what they need at the first call.
    step_of(module, batch_for(options, 2), None, options)()
    module.zero_grad()
    batch = batch_for(options, contender.batch)
    above = peak_above(step_of(module, batch, contender.micro_batch, options), options.device)
    return {
        "step": round(above / MIB, 1),
        "weights": round(_bytes(module.parameters()) / MIB, 1),
        "inputs": round(_bytes(v for v in batch.values() if isinstance(v, Tensor)) / MIB, 1),
    }


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender after the other, each in its process."""
    peaks = {name: alone(peak, one, options) for name, one in contenders(options).items()}
    own, small = peaks["micro-batches"], peaks["micro-batch alone"]
    return {
        "MiB": peaks,
        "times_the_memory": {
            "in_all": round(sum(own.values()) / sum(small.values()), 3),
            "above_weights_and_inputs": round(own["step"] / small["step"], 3),
        },
    }


def times(options: argparse.Namespace) -> dict[str, Any]:
    """Time the whole batch both ways, in turn."""
    module = module_of(options.model).to(options.device)
    batch = batch_for(options, options.batch)
    step_of(module, batch_for(options, options.micro_batch), None, options)()
    chosen = {name: one for name, one in contenders(options).items() if one.batch == options.batch}
    steps = {n: step_of(module, batch, one.micro_batch, options) for n, one in chosen.items()}
    # A GPU's first steps choose their kernels.
    warm_up = 0 if options.device == "cpu" else 2
    seconds = race(steps, rounds=options.rounds, device=options.device, warm_up=warm_up)
    return {
        "captions": about([batch]),
        "pairs_per_second": {
            name: spread([options.batch / s for s in values]) for name, values in seconds.items()
        },
        "times_the_time": ratio(seconds["micro-batches"], seconds["whole batch"]),
    }


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    options_of = parser(__doc__, rounds=5)
    options_of.add_argument("--model", choices=SHAPES, help="ViT-S-32 without a GPU, else ViT-B-32")
    options_of.add_argument("--batch", type=int, help="256 without a GPU, else 1,024")
    options_of.add_argument("--micro-batch", type=int, help="16 without a GPU, else 128")
    add_precision(options_of)
    options = options_of.parse_args()
    model, batch, micro_batch = DEFAULTS[options.device]
    options.model, options.batch = options.model or model, options.batch or batch
    options.micro_batch = options.micro_batch or micro_batch
    options.precision = precision_of(options)
    torch.set_num_threads(options.threads)
    result = {**memory(options), **times(options), "must_show": GOALS}
    path = record("micro-batches" + ("" if options.device == "cpu" else "-gpu"), options, result)
    rows = [("contender", "MiB of a step", "MiB with weights and inputs", "pairs/s")]
    for name, peaks in result["MiB"].items():
        rate = result["pairs_per_second"].get(name)
        rows.append((
            name, str(peaks["step"]), f"{sum(peaks.values()):.1f}", shown(rate) if rate else "",
        ))  # fmt: skip
    table(rows)
    print("times the memory", result["times_the_memory"])
    print("times the time", shown(result["times_the_time"]))
    print(path)


if __name__ == "__main__":
    main()
