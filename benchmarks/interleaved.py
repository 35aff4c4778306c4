"""Contenders in turn: a busy machine is busy for all, so what counts is the ratio within a round.

Time is measured in one process, round by round, the order turned around every other round. Memory
is measured in a process a contender, since what one frees another would find.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"
COVERAGE = 0.95
MIB = 2**20

Found = TypeVar("Found")
Seconds = dict[str, list[float]]


# --- Time ----------------------------------------------------------------------------------------


def race(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, device: str, warm_up: int = 1
) -> Seconds:
    """Return the seconds of each contender, one number a round; the first rounds are not kept."""
    seconds: Seconds = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        names = list(contenders)
        for name in names if number % 2 == 0 else reversed(names):
            taken = seconds_of(contenders[name], device)
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Return how long the work took, what the device still does of it included."""
    gc.collect()  # not in the middle of somebody's turn
    synchronise(device)
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.cuda.synchronize()


# --- Spread --------------------------------------------------------------------------------------


def ratio(of: Sequence[float], to: Sequence[float]) -> dict[str, object]:
    """Return the spread of the per-round ratios."""
    return spread([a / b for a, b in zip(of, to, strict=True)])


def spread(values: Sequence[float]) -> dict[str, object]:
    """Return the median, an interval for it, how sure that is, and every value."""
    low, high, coverage = interval_of_median(values)
    return {
        "median": _short(statistics.median(values)),
        "low": _short(low),
        "high": _short(high),
        "coverage": round(coverage, 4),
        "all": [_short(value) for value in values],
    }


def interval_of_median(values: Sequence[float]) -> tuple[float, float, float]:
    """Return two of the sorted values, and how surely the true median lies between them.

    By the signs alone (binomial), whatever the distribution: the narrowest such interval of 95 %.
    Fewer than six values have none; they give their extremes, and the coverage says how little
    that is.
    """
    ordered, count = sorted(values), len(values)
    inner, coverage = 0, _coverage(count, 0)
    while inner + 1 < count - inner - 1 and _coverage(count, inner + 1) >= COVERAGE:
        inner += 1
        coverage = _coverage(count, inner)
    return ordered[inner], ordered[count - 1 - inner], coverage


def _coverage(count: int, left_out: int) -> float:
    tail = sum(math.comb(count, k) for k in range(left_out + 1)) / 2.0**count
    return max(0.0, 1 - 2 * tail)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


# --- Memory --------------------------------------------------------------------------------------


def alone(function: Callable[..., Found], *arguments: object) -> Found:
    """Return what a function of a module gives in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(function, *arguments).result()


def peak_above(work: Callable[[], object], device: str) -> int:
    """Return how many bytes more than before were held while the work ran, at the most.

    On a GPU what its allocator gave out, elsewhere the pages of the process (Linux).
    """
    gc.collect()
    if device != "cpu":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        synchronise(device)
        return torch.cuda.max_memory_allocated() - before
    # Pages that were freed but not given back would hide as much of what the work takes.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _pages("VmRSS")
    work()
    return _pages("VmHWM") - before


def _pages(kind: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(kind)


# --- The frame of a script -----------------------------------------------------------------------


def parser(description: str | None, *, rounds: int, threads: int = 2) -> argparse.ArgumentParser:
    """Return the options that all these scripts have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=threads, help="of the processor")
    made.add_argument("--output", type=Path, default=None)
    return made


DATA = Path("../shared/data")


def add_data(options_of: argparse.ArgumentParser) -> None:
    """Add the option that says where the data sets lie, and refuse a folder that is not there."""

    def there(text: str) -> Path:
        path = Path(text)
        if not path.is_dir():
            raise argparse.ArgumentTypeError(f"{text} is no folder; it is to hold the data sets")
        return path

    options_of.add_argument(
        "--data", type=there, default=str(DATA), help="folder of the data sets, such as coco_mini"
    )


def record(name: str, options: argparse.Namespace, result: Mapping[str, Any]) -> Path:
    """Write one dated file with what was measured and what it was measured on."""
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    whole = {
        "schema": 1,
        "machine": {**describe(), "threads": torch.get_num_threads(), **_peer()},
        "settings": {key: _plain(value) for key, value in settings.items()},
        **result,
    }
    path: Path = options.output or RESULTS / f"{date.today()}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _peer() -> dict[str, str]:
    try:
        return {"version.open_clip_torch": metadata.version("open_clip_torch")}
    except metadata.PackageNotFoundError:
        return {}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def table(rows: Iterable[Sequence[object]]) -> None:
    """Print rows of cells, the first row the heads."""
    cells = [[cell if isinstance(cell, str) else f"{cell:.4g}" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(line.rstrip())


def shown(found: Mapping[str, Any]) -> str:
    """Return a spread as it stands in a table."""
    return f"{found['median']:.4g} [{found['low']:.4g}, {found['high']:.4g}]"
