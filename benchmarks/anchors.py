"""Published values, measured again: needs the hub, and says so where there is none.

python -m benchmarks.anchors

OpenAI's ViT-B/32. ImageNet-V2 is the value of CLIP's own notebook; those of SugarCrepe are quoted
from a discussion of its results, in an order that was not checked.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import describe
from clipkit.errors import UserError
from clipkit.interop import open_model
from clipkit.suite.benchmark import benchmark
from clipkit.suite.suite_file import read_suite

RESULTS = Path(__file__).parent / "results"
MODEL = "open_clip:ViT-B-32/openai"


class Anchor(NamedTuple):
    """A published value, in per cent."""

    suite: str
    set: str
    metric: str
    published: float


ANCHORS = (
    Anchor("imagenet_robustness", "imagenetv2", "top1", 55.93),
    Anchor("imagenet_robustness", "imagenetv2", "top5", 83.36),
    Anchor("sugar_crepe", "replace_obj", "accuracy", 90.92),
    Anchor("sugar_crepe", "replace_att", "accuracy", 80.08),
    Anchor("sugar_crepe", "replace_rel", "accuracy", 69.20),
    Anchor("sugar_crepe", "swap_obj", "accuracy", 61.38),
    Anchor("sugar_crepe", "swap_att", "accuracy", 63.96),
    Anchor("sugar_crepe", "add_obj", "accuracy", 77.20),
    Anchor("sugar_crepe", "add_att", "accuracy", 68.79),
)


def measure() -> dict[str, dict[str, Any]]:
    """Return the metrics of every task that an anchor speaks of, by suite and set."""
    opened = open_model(MODEL)
    found = {}
    for name in dict.fromkeys(anchor.suite for anchor in ANCHORS):
        wanted = {anchor.set for anchor in ANCHORS if anchor.suite == name}
        suite = read_suite(name)
        tasks = [spec for spec in suite.tasks if spec.set in wanted]
        result = benchmark(opened, replace(suite, tasks=tasks))
        found |= {f"{name}/{entry['set']}": entry["metrics"] for entry in result["tasks"]}
        found |= {f"{name}/{one['set']}": {"failed": one["error"]} for one in result["failed"]}
    return found


def main() -> None:
    """Measure what can be measured and write one dated file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    status, found = "measured", dict[str, dict[str, Any]]()
    try:
        found = measure()
    except UserError as error:
        status = f"not run: {error.sentence}"
    rows = []
    for anchor in ANCHORS:
        metrics = found.get(f"{anchor.suite}/{anchor.set}", {})
        metric = metrics.get(anchor.metric)
        rows.append(
            {
                **anchor._asdict(),
                "measured": None if metric is None else round(100 * metric["value"], 2),
                "why_not": metrics.get("failed"),
            }
        )
    if status == "measured" and all(row["measured"] is None for row in rows):
        status = "not run: no data set could be opened"
    result = {
        "schema": 1,
        "machine": describe(),
        "model": MODEL,
        "status": status,
        "anchors": rows,
    }
    path = options.output or RESULTS / f"{date.today()}-anchors.json"
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(path.read_text())


if __name__ == "__main__":
    main()
