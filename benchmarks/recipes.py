"""The recipes' figures: each run as a user would, timed, its last metrics written down.

python -m benchmarks.recipes --data ../shared/data [quickstart] [emoji] [grocery]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from benchmarks.machine import describe

RESULTS = Path(__file__).parent / "results"
DATASETS = {"quickstart": None, "emoji": "emoji_vendors", "grocery": "grocery_store"}
# What the recipe must show: metric, least value.
GOALS = {
    "quickstart": {"zeroshot/shapes/top1": 0.90},
    "emoji": {
        "retrieval/emoji_test/text_to_image_r1": 0.45,
        "retrieval/emoji_test/text_to_image_r10": 0.70,
        "retrieval/emoji_test/image_to_text_r1": 0.42,
        "retrieval/emoji_test/image_to_text_r10": 0.68,
    },
    "grocery": {"zeroshot/grocery_test/top1": 0.55},
}


def run(recipe: str, data: Path) -> dict[str, object]:
    """Run one recipe in an empty folder and return its seconds and its last metrics."""
    dataset = DATASETS[recipe]
    words = ["-c", "base", "-c", recipe]
    if dataset is not None:
        words += ["--data.dataset", str((data / dataset).resolve())]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "clipkit.cli", "fit", *words], cwd=folder, check=True)
        seconds = time.monotonic() - began
        (journal,) = Path(folder).rglob("metrics.jsonl")
        return {"seconds": round(seconds, 1), **last_values(journal, recipe)}


def last_values(journal: Path, recipe: str) -> dict[str, object]:
    """Return the last value, with its interval, of each metric the recipe has a goal for."""
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    latest = {name: value for line in lines for name, value in line.items()}
    training = [line["time"] for line in lines if "train/loss" in line]
    return {
        "training_seconds": round(training[-1] - training[0], 1),
        "steps": latest["step"],
        "metrics": {
            name: {
                "value": latest[name],
                "low": latest[f"{name}_low"],
                "high": latest[f"{name}_high"],
                "at_least": goal,
            }
            for name, goal in GOALS[recipe].items()
        },
    }


def main() -> None:
    """Measure the recipes named and write one dated file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=list(DATASETS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    found = {recipe: run(recipe, options.data) for recipe in options.recipes}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today()}-recipes-{'-'.join(found)}.json"
    result = {"schema": 1, "machine": describe(), "recipes": found}
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(path.read_text())


if __name__ == "__main__":
    main()
