"""The largest exact batch of one device: ViT-B/32 by micro-batches, its memory and its time.

python -m benchmarks.largest_batch --device cuda [--sizes 65536 131072 262144 524288]

A whole training step (forward, loss of all pairs against all pairs, backward, AdamW) of each size,
the pictures as bytes on the device. One step each after a small one: what takes seconds needs no
repeats, and the next size is left out where it would not end in time or has no memory.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.batches import batches_of
from benchmarks.interleaved import parser, peak_above, record, synchronise, table
from benchmarks.models import (
    SHAPES,
    add_precision,
    autocast,
    module_of,
    optimizer_of,
    precision_of,
)
from benchmarks.step import our_loss
from clipkit.module import CLIPModule

GOALS = {"pairs": 65_536}
GIB = 2**30


def measure(
    size: int, module: CLIPModule, optimizer: torch.optim.Optimizer, options: argparse.Namespace
) -> dict[str, Any]:
    """Make one step of that size."""
    device = options.device
    (batch,) = batches_of(1, size, SHAPES[options.model].image_size, device)
    losses: list[Tensor] = []
    seconds: list[float] = []

    def step() -> None:
        began = time.perf_counter()
        optimizer.zero_grad()
        with autocast(options.precision, device):
            loss = our_loss(module, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
        losses.append(loss.detach())

    above = peak_above(step, device)
    inputs = sum(v.numel() * v.element_size() for v in batch.values() if isinstance(v, Tensor))
    return {
        "pairs": size,
        "seconds": round(seconds[0], 3),
        "pairs_per_second": round(size / seconds[0], 1),
        "loss": round(float(losses[0]), 5),
        "GiB_of_inputs": round(inputs / GIB, 3),
        "GiB_above_weights_and_inputs": round(above / GIB, 3),
        "GiB_in_all": round(torch.cuda.max_memory_allocated() / GIB, 3)
        if device == "cuda"
        else None,
    }


def main() -> None:
    """Measure size after size, and write one dated file."""
    options_of = parser(__doc__, rounds=1)
    options_of.add_argument("--model", choices=SHAPES, default="ViT-B-32")
    options_of.add_argument("--micro-batch", type=int, default=1024)
    options_of.add_argument(
        "--sizes", type=int, nargs="+", default=[65_536, 131_072, 262_144, 524_288]
    )
    options_of.add_argument("--seconds", type=float, default=240, help="for all steps together")
    add_precision(options_of)
    options = options_of.parse_args()
    options.precision = precision_of(options)
    torch.set_num_threads(options.threads)
    module = module_of(options.model, micro_batch=options.micro_batch).to(options.device)
    optimizer = optimizer_of(module)
    measure(2 * options.micro_batch, module, optimizer, options)
    began, sizes, stopped = time.perf_counter(), list[dict[str, Any]](), "all sizes were made"
    for size in options.sizes:
        expected = sizes[-1]["seconds"] * size / sizes[-1]["pairs"] if sizes else 0.0
        if time.perf_counter() - began + 1.2 * expected > options.seconds:
            stopped = f"{size:,} would not have ended within {options.seconds:g} seconds"
            break
        try:
            sizes.append(measure(size, module, optimizer, options))
        except torch.OutOfMemoryError:
            stopped = f"there is no memory for {size:,}"
            break
    name = "largest-batch" if options.device == "cpu" else "largest-batch-gpu"
    result = {"sizes": sizes, "stopped": stopped, "must_show": GOALS}
    path = record(name, options, result)
    columns = ("pairs", "seconds", "pairs_per_second", "GiB_of_inputs")
    columns += ("GiB_above_weights_and_inputs", "GiB_in_all")
    table([columns, *([str(one[column]) for column in columns] for one in sizes)])
    print(stopped)
    print(path)


if __name__ == "__main__":
    main()
