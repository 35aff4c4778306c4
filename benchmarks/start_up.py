"""How long commands take to start, and a training to make its first step.

python -m benchmarks.start_up [--rounds 5]

Each command is a process of its own, in turn, from an empty folder; the first round, which brings
the files into the page cache, is not kept. `first step` is a whole process that draws or invents
its pictures, builds a small model, makes one step on eight pairs, writes a checkpoint and ends:
`clipkit fit` of the quickstart's model with MLflow as it is by default, its database made anew,
and open_clip's training of synthetic pictures with its smallest ViT, which logs to a text file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.interleaved import parser, race, ratio, record, shown, spread, table
from benchmarks.models import has_peer, has_peers_training

ROOT = Path(__file__).parents[1]
GOALS = {"times_as_fast": 1.0}

FIRST_STEP = Path(__file__).parent / "first_step.yaml"
OURS = {
    "import clipkit": "-c 'import clipkit'",
    "clipkit --help": "-m clipkit.cli --help",
    "clipkit fit --help": "-m clipkit.cli fit --help",
    "clipkit fit --print_config": "-m clipkit.cli fit -c base -c quickstart --print_config",
    "clipkit compare --help": "-m clipkit.cli compare --help",
    "clipkit benchmark --list": "-m clipkit.cli benchmark --list",
    "clipkit fit, first step": f"-m clipkit.cli fit -c base -c {FIRST_STEP}",
}
THEIRS = {"import open_clip": "-c 'import open_clip'"}
THEIR_TRAINING = {
    "open_clip_train.main --help": "-m open_clip_train.main --help",
    "open_clip_train.main, first step": "-m open_clip_train.main --model ViT-S-32-alt "
    "--device cpu --precision fp32 --dataset-type synthetic --train-num-samples 8 --batch-size 8 "
    "--epochs 1 --workers 0 --warmup 1",
}
COMPARED = {
    "import clipkit": "import open_clip",
    "clipkit fit --help": "open_clip_train.main --help",
    "clipkit fit, first step": "open_clip_train.main, first step",
}


def run(words: str) -> None:
    """Run one command to its end, in a folder of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            f"{sys.executable} {words}", shell=True, cwd=folder, env=environment,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"python {words} ended with {done.returncode}: {done.stderr[-2000:]}")


def heavy_modules(statement: str) -> list[str]:
    """Return which of the large libraries a statement imports."""
    code = (
        f"import sys; {statement}; heavy = 'torch lightning timm transformers mlflow datasets "
        "jsonargparse open_clip pandas sklearn matplotlib'.split(); "
        "print(*[name for name in heavy if name in sys.modules])"
    )
    words = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    return done.stdout.split()


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    options_of = parser(__doc__, rounds=5, threads=1)
    options_of.add_argument("--only", nargs="+", default=None, metavar="NAME")
    options = options_of.parse_args()
    every = OURS | (THEIRS if has_peer() else {})
    every |= THEIR_TRAINING if has_peers_training() else {}
    unknown = set(options.only or ()) - every.keys()
    if unknown:
        options_of.error(f"--only: {', '.join(sorted(unknown))} is not among {', '.join(every)}")
    chosen = {name: words for name, words in every.items() if name in (options.only or every)}
    turns: dict[str, Callable[[], Any]] = {n: partial(run, words) for n, words in chosen.items()}
    began = time.perf_counter()
    seconds = race(turns, rounds=options.rounds, device="cpu")
    fast = {
        own: ratio(seconds[peer], seconds[own])
        for own, peer in COMPARED.items()
        if {own, peer} <= seconds.keys()
    }
    result = {
        "commands": {n: f"python {w.replace(f'{ROOT}/', '')}" for n, w in chosen.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "compared_with": {own: COMPARED[own] for own in fast},
        "times_as_fast": fast,
        "import clipkit brings": heavy_modules("import clipkit"),
        "took": round(time.perf_counter() - began, 1),
        "must_show": GOALS,
    }
    path = record("start-up", options, result)
    rows = [("command", "seconds", "times as fast")]
    for name, found in result["seconds"].items():
        rows.append((name, shown(found), shown(fast[name]) if name in fast else ""))
    table(rows)
    print(path)


if __name__ == "__main__":
    main()
