"""What evaluation inside training costs: its share of the emoji recipe's time.

python -m benchmarks.evaluation_share [--data ../shared/data] [--epochs 4] [--every 1]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from datetime import date
from pathlib import Path

import clipkit
from benchmarks.interleaved import add_data
from benchmarks.machine import describe
from clipkit.callbacks import ZeroShotRetrieval

RESULTS = Path(__file__).parent / "results"
GOALS = {"share": 0.10}


def main() -> None:
    """Train some epochs with an evaluation after each, and write one dated file."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_data(parser)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--every", type=int, default=1, help="the recipe itself takes every 4th")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    dataset = (options.data / "emoji_vendors").resolve()
    path = (options.output or RESULTS / f"{date.today()}-evaluation-share.json").resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        module, data, trainer = clipkit.build(
            "base",
            "emoji",
            overrides=[
                f"data.dataset={dataset}",
                f"trainer.max_epochs={options.epochs}",
                "trainer.logger=false",
            ],
        )
        (callback,) = (c for c in trainer.callbacks if isinstance(c, ZeroShotRetrieval))
        object.__setattr__(callback.schedule, "every_n_epochs", options.every)
        began = time.perf_counter()
        trainer.fit(module, datamodule=data)
        seconds = time.perf_counter() - began
    result = {
        "schema": 1,
        "machine": describe(),
        "recipe": "emoji",
        "epochs": options.epochs,
        "evaluated_every": options.every,
        "sets": {name: one.split for name, one in callback.datasets.items()},
        "seconds": round(seconds, 2),
        # Before the first step and at the end too.
        "seconds_of_evaluation": round(callback.seconds_spent, 2),
        "share": round(callback.seconds_spent / seconds, 4),
        "must_show": GOALS,
    }
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(path.read_text())


if __name__ == "__main__":
    main()
