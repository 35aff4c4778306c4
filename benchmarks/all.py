"""Every question of speed, each in a process of its own, and one table at the end.

python -m benchmarks.all                          (the processor's; under 30 minutes on two cores)
python -m benchmarks.all --device cuda --part 1   (the GPU's: three parts, each under 10 minutes)
python -m benchmarks.all --only step loss
python -m benchmarks.all --device cuda --rehearse (does it run? tiny, on the processor)

A question that fails is named and the others are still asked; the exit code is then 1. Goals that
are not met are no failure. On a GPU the source tree, torch, timm, lightning and tokenizers
suffice; without open_clip its columns are left out.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import overview, scaling
from benchmarks.interleaved import DATA, table
from benchmarks.questions import CPU, GPU, RESULTS, Question, rows_of

ROOT = Path(__file__).parents[1]


class Answer(NamedTuple):
    """A question's result file, or why there is none."""

    question: Question
    path: Path | None
    seconds: float
    failure: str | None = None


def ask(question: Question, options: argparse.Namespace) -> Answer:
    """Run one question, its words on the screen, and say how it ended."""
    if question.needs_data and not options.data.is_dir():
        why = f"not asked: {options.data} is no folder, and it is to hold the data sets (--data)"
        return Answer(question, None, 0.0, why)
    path = (options.results / f"{date.today()}-{question.stem}.json").resolve()
    words = shlex.split(question.command)
    if options.rehearse:
        words = [words[0], *shlex.split(question.rehearsal)]
        if question.name.startswith("step") and question.device == "cuda":
            words += ["--precision", "bf16", "--peak-flops", "1e12"]
    elif question.device == "cuda":
        words += ["--device", "cuda"]
    if question.needs_data:
        words += ["--data", os.path.relpath(options.data, ROOT)]
    command = [
        sys.executable,
        "-m",
        f"benchmarks.{words[0]}",
        *words[1:],
        "--output",
        os.path.relpath(path),
    ]
    print(f"\n=== {question.name}: {question.asks}\n{shlex.join(command[1:])}", flush=True)
    began = time.perf_counter()
    failure = None
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=60 * question.minutes, check=False)
        if done.returncode:
            failure = f"ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        failure = f"not done after {question.minutes:g} minutes"
    return Answer(question, None if failure else path, time.perf_counter() - began, failure)


def questions(options: argparse.Namespace) -> list[Question]:
    """Return those asked for."""
    every = GPU if options.device == "cuda" else CPU
    chosen = [q for q in every if options.part in (None, q.part)]
    if options.only:
        chosen = [q for q in every if q.name in options.only]
    return chosen


def summary(answers: Sequence[Answer], options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return the table: what was asked now, and what only a GPU can answer.

    The figures of a rehearsal are held against no goal.
    """
    rows: list[tuple[str, ...]] = [("question", "what", "must show", "measured", "")]
    for answer in answers:
        if answer.failure is not None:
            rows.append((answer.question.name, answer.question.asks, "", answer.failure, "FAILED"))
        elif options.rehearse:
            rows += [(*row[:2], "", row[3], "") for row in rows_of(answer.question, answer.path)]
        else:
            rows += rows_of(answer.question, answer.path)
    if options.device == "cpu" and options.only is None:
        rows += [(q.name, q.asks, "", "not measured", "needs a GPU") for q in GPU]
    return rows


def draw(results: Path) -> None:
    """Draw the results, where matplotlib is."""
    try:
        from benchmarks.plots import draw_all
    except ImportError:
        print("no plots: matplotlib is not installed")
        return
    for path in draw_all(results):
        print(path)
    if results == RESULTS:
        # The pages show the newest figures.
        overview.write()
        scaling.write()


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask, print the table, return 1 if anything failed."""
    options_of = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options_of.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options_of.add_argument("--part", type=int, choices=[1, 2, 3], default=None)
    options_of.add_argument("--only", nargs="+", metavar="QUESTION", default=None)
    options_of.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    options_of.add_argument("--results", type=Path, default=RESULTS)
    options_of.add_argument("--rehearse", action="store_true", help="tiny, on the processor")
    options = options_of.parse_args(arguments)
    if options.only is not None:
        options.only = [name for word in options.only for name in word.split(",") if name]
        known = {q.name for q in (GPU if options.device == "cuda" else CPU)}
        unknown = [name for name in options.only if name not in known]
        if unknown:
            options_of.error(f"--only: no question {unknown[0]!r}; there are {', '.join(known)}")
    if options.rehearse and options.results == RESULTS:
        options_of.error("--rehearse: its figures mean nothing; give --results DIR, a scratch one")
    if options.device == "cuda" and not options.rehearse and not torch.cuda.is_available():
        options_of.error("--device cuda: there is no GPU here; --rehearse tries its questions")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return ask_all(questions(options), options)


def ask_all(asked: Sequence[Question], options: argparse.Namespace) -> int:
    """Ask one after the other, whatever becomes of them; print the table, return the exit code."""
    options.results.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    answers = [ask(question, options) for question in asked]
    draw(options.results)
    print()
    table(summary(answers, options))
    failed = [answer.question.name for answer in answers if answer.failure is not None]
    minutes = (time.perf_counter() - began) / 60
    print(f"\n{len(answers)} questions in {minutes:.1f} minutes", end="")
    print(f"; failed: {', '.join(failed)}" if failed else "; none failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
