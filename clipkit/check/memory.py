"""What memory a run takes, and the largest micro-batch that fits beside it."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.data.samples import PairBatch
from clipkit.module import CLIPModule
from clipkit.pieces import counting_norms

SECONDS = 20.0
"""How long micro-batches are tried."""

_MOST = 16_384  # pairs; by then a device has long been full of work
_GROWTH = 2**27  # bytes, enough to tell what a pair takes
_LEAST_GROWTH = 2**26  # below that, the allocator's own habits hide it

_PROCESS = Path("/proc/self/status")
_MACHINE = Path("/proc/meminfo")
# What a container may use, uses, and would give back of that: files that were read and are not
# needed. By the second and the first version of control groups.
_CONTAINERS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


class LargestMicroBatch(NamedTuple):
    """How many pairs a device holds at a time.

    Attributes:
        pairs: so many fit; None where it cannot be measured.
        refused: so many were tried and did not.
        bytes_per_pair: what the estimate is made of, where it is one.
        available: bytes, likewise.
    """

    pairs: int | None = None
    refused: int | None = None
    bytes_per_pair: float | None = None
    available: int | None = None


def peak_of_process() -> int | None:
    """Return the most bytes this process held since the peak was reset; None where unknown."""
    return _entry(_PROCESS, "VmHWM")


def reset_peak() -> bool:
    """Begin a new peak; false where the system knows none.

    What the allocator keeps of freed memory is given back first: it would hide what comes next.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError, TypeError):  # no glibc, no Linux, Windows
        return False
    return True


def available_memory() -> int:
    """Return the bytes that are free to take, of the machine or of the container's share."""
    found = [_entry(_MACHINE, "MemAvailable")]
    for folder, limit, used, unneeded in _CONTAINERS:
        group = Path(folder)
        try:
            left = int((group / limit).read_text()) - int((group / used).read_text())
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found.append(left + int(counts.get(unneeded, 0)))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(one for one in found if one is not None)


def largest_micro_batch(
    module: CLIPModule,
    batch: PairBatch,
    context: Callable[[], AbstractContextManager[None]],
    *,
    fits: int,
    processes: int,
) -> LargestMicroBatch:
    """Try micro-batches of doubling size, both towers forward and backward as in training.

    On a CUDA device until one does not fit. On a CPU, where that would end the process, by what a
    pair adds to the peak.

    Args:
        module: as training left it, gradients and optimiser in memory.
        batch: pairs to make micro-batches of.
        context: the precision of the run.
        fits: pairs that were trained on already.
        processes: how many share this machine's memory.
    """
    if module.device.type == "cuda":
        return _by_trying(module, batch, context, fits)
    if module.device.type == "cpu" and _PROCESS.exists() and reset_peak():
        return _by_growth(module, batch, context, processes)
    return LargestMicroBatch()


def _by_trying(
    module: CLIPModule,
    batch: PairBatch,
    context: Callable[[], AbstractContextManager[None]],
    fits: int,
) -> LargestMicroBatch:
    began = time.perf_counter()
    refused = None
    pairs = fits
    while refused is None and 2 * pairs <= _MOST and time.perf_counter() - began < SECONDS / 2:
        try:
            _run(module, batch, context, 2 * pairs)
            torch.cuda.synchronize(module.device)
            pairs *= 2
        except torch.OutOfMemoryError:
            refused = 2 * pairs
        gc.collect()
        torch.cuda.empty_cache()
    return LargestMicroBatch(pairs, refused)


def _by_growth(
    module: CLIPModule,
    batch: PairBatch,
    context: Callable[[], AbstractContextManager[None]],
    processes: int,
) -> LargestMicroBatch:
    room = available_memory() // processes
    began = time.perf_counter()
    peaks: list[tuple[int, int]] = []  # pairs, bytes
    # A lone pair has no statistics for batch norm to take.
    pairs, took, growth = 2 if counting_norms([module]) else 1, 0.0, 0
    while pairs <= _MOST and time.perf_counter() - began + 2 * took < SECONDS:
        reset_peak()
        step_began = time.perf_counter()
        _run(module, batch, context, pairs)
        took = time.perf_counter() - step_began
        peaks.append((pairs, peak_of_process() or 0))
        growth = peaks[-1][1] - peaks[0][1]
        if growth > min(_GROWTH, room // 4):
            break
        pairs *= 2
    if growth < min(_LEAST_GROWTH, room // 8):
        return LargestMicroBatch(peaks[-1][0])
    per_pair = growth / (peaks[-1][0] - peaks[0][0])
    return LargestMicroBatch(int(room / per_pair), bytes_per_pair=per_pair, available=room)


def _run(
    module: CLIPModule,
    batch: PairBatch,
    context: Callable[[], AbstractContextManager[None]],
    pairs: int,
) -> None:
    rows = torch.arange(pairs, device=module.device) % len(batch["tokens"])
    sides: tuple[tuple[Callable[[Tensor], Tensor], Tensor], ...] = (
        (module.encode_image, batch["images"]),
        (module.encode_text, batch["tokens"]),
    )
    for embed, inputs in sides:  # one after the other, as micro-batches run again
        with context():
            embeddings = embed(inputs[rows])
        if embeddings.requires_grad:
            torch.autograd.backward(embeddings.sum())


def _entry(file: Path, name: str) -> int | None:
    """Return the bytes that a line such as `VmHWM: 12 kB` gives."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    return None
