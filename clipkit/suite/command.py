"""`clipkit benchmark X`: any model on a suite, as a table and a result file."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipkit.arguments import Parser
from clipkit.errors import UserError
from clipkit.interop import open_model
from clipkit.suite.benchmark import benchmark
from clipkit.suite.clip_benchmark import save_clip_benchmark
from clipkit.suite.suite_file import read_suite, suite_names

log = logging.getLogger(__name__)

DEFAULT_SUITE = "offline"
MODELS = (
    "a checkpoint, open_clip:MODEL[/TAG], transformers:ORG/REPO, hf-hub:ORG/REPO, a folder in the "
    "layout of either, or my_code:build"
)


def run(arguments: Sequence[str], *, trust: Sequence[str] = ()) -> int:
    """Run the command; returns 0 when every task was measured, else 1."""
    options = _parser().parse_args(list(arguments))
    if options.list:
        return _list()
    if options.model is None:
        raise UserError(f"clipkit benchmark X: X is missing; it is {MODELS}")
    for name in ("limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name}: {value} is less than 1")
    suite = read_suite(options.suite)
    opened = open_model(options.model, trust=trust, device=options.device)
    output = options.output or Path(f"{_file_name(opened.name)}-{suite.name}.json")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name a file in it")
    try:
        with _Progress() as progress:
            result = benchmark(
                opened,
                suite,
                output=output,
                resume=options.resume,
                limit=options.limit,
                batch_size=options.batch_size,
                watch=progress.watch,
            )
    except KeyboardInterrupt:
        if output.is_file():
            log.info("\n%s holds what is done; the same command with --resume goes on", output)
        raise
    print(table(result))
    print(f"\n  result   {output}")
    if result["tasks"]:
        print(f"  compare  clipkit compare {output} OTHER.json")
    if options.clip_benchmark is not None:
        files = save_clip_benchmark(result, options.clip_benchmark)
        print(f"  export   {len(files)} files in {options.clip_benchmark}")
    return 1 if result["failed"] else 0


def _parser() -> Parser:
    parser = Parser(
        prog="clipkit benchmark",
        description="Score a model on a suite of data sets; every value with its 95 % interval.",
        epilog="example: clipkit benchmark runs/emoji/emoji_vendors/checkpoints/last.ckpt "
        "--suite my_suite.yaml --output mine.json; then clipkit compare mine.json base.json",
    )
    parser.add_argument("model", nargs="?", metavar="X", help=MODELS)
    parser.add_argument(
        "--suite",
        default=DEFAULT_SUITE,
        help=f"a YAML file, or one of {', '.join(suite_names())} (default {DEFAULT_SUITE})",
    )
    parser.add_argument("--output", type=Path, help="result file; left out, <model>-<suite>.json")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep what the result file holds for the same model, data and settings",
    )
    parser.add_argument("--limit", type=int, help="the first so many rows of each test set only")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time")
    parser.add_argument("--device", help="such as cpu or cuda:1; left out, a GPU if there is one")
    parser.add_argument("--list", action="store_true", help="print the suites and their tasks")
    parser.add_argument(
        "--clip_benchmark",
        type=Path,
        metavar="FOLDER",
        help="also write CLIP_benchmark's JSON files, for `clip_benchmark build`",
    )
    return parser


def table(result: dict[str, Any]) -> str:
    """Return a line a task: its main metric with its interval, n, chance, and the seconds."""
    rows = [["task", "set", "metric", "value", "95 % interval", "n", "chance", "seconds"]]
    for entry in result["tasks"]:
        metric = entry["metrics"][entry["main_metric"]]
        rows.append(
            [
                entry["task"],
                entry["set"],
                entry["main_metric"],
                _number(metric["value"], entry["main_metric"]),
                _interval(metric, entry["main_metric"]),
                str(metric["n"]),
                _number(metric["chance"], entry["main_metric"]),
                f"{entry['seconds']:.1f}",
            ]
        )
    for failed in result["failed"]:
        rows.append([failed["task"], failed["set"], "failed", "-", "-", "-", "-", "-"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [cell.ljust(w) for cell, w in zip(row[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(w) for cell, w in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join(["", *words, *numbers]).rstrip())
    # Of the suites that clipkit ships; what is in a user's own is the user's to know.
    shipped = result["suite"] in suite_names()
    unverified = sum(not entry["verified"] for entry in result["tasks"] if shipped)
    head = f"{result['model']['name']} on {result['suite']}"
    note = (
        f" ({unverified} tasks unverified: nobody has opened their data yet)" if unverified else ""
    )
    return "\n".join([head + note, *lines])


def _list() -> int:
    for name in suite_names():
        tasks = read_suite(name).tasks
        print(f"{name}: {len(tasks)} tasks")
        for spec in tasks:
            mark = "" if spec.verified else "  (unverified)"
            print(f"  {spec.task:10}  {spec.set:28}  {spec.metric}  {spec.data.path}{mark}")
    return 0


def _number(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if metric.endswith("rank") else f"{100 * value:.1f}"


def _interval(metric: dict[str, Any], name: str) -> str:
    if metric["low"] is None or metric["high"] is None:
        return "-"
    return f"{_number(metric['low'], name)}-{_number(metric['high'], name)}"


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=+-]+", "-", name).strip("-.") or "model"


class _Progress:
    """A progress bar in a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def watch(self, name: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        from tqdm import tqdm

        if name != self._name:
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=total, desc=name, unit="picture", leave=False)
            self._name = name
        self._bar.n = done
        self._bar.refresh()
