"""Building a zero-shot classifier: clipkit against open_clip's builder, the same random weights.

python -m benchmarks.classifier [--classes 50] [--templates 80] [--rounds 3]

Both get class names and templates and return one unit vector a class; tokenising is included. The
rounds are interleaved, so that a busy machine is busy for both. The operations of 1,000 classes are
counted, not run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from clipkit.evaluation import build_classifier, expand
from clipkit.interop import open_model
from clipkit.interop.base import TEXTS_AT_ONCE
from clipkit.interop.open_clip import OpenClipModel, pooled_place

RESULTS = Path(__file__).parent / "results"
MODEL = "ViT-B-32"
GOALS = {"times_as_fast": 4.0, "largest_difference": 1e-5}
ALL_CLASSES = 1000


def theirs(adapter: OpenClipModel, classes: list[str], templates: list[str]) -> Tensor:
    """Build the classifier (C, D) as open_clip does."""
    from open_clip import build_zero_shot_classifier

    columns: Tensor = build_zero_shot_classifier(
        adapter.model, adapter.tokenizer, classes, templates, device=adapter.device
    )
    return columns.T


def ours(adapter: OpenClipModel, classes: list[str], templates: list[str]) -> Tensor:
    """Build the classifier (C, D) as an evaluation of clipkit does."""
    prompts = expand(classes, templates)
    embeddings = adapter.embed_texts(prompts.unique)[prompts.prompt_index]
    return build_classifier(embeddings, prompts.class_of_prompt, len(classes))


def measure(
    adapter: OpenClipModel, classes: list[str], templates: list[str], rounds: int
) -> dict[str, Any]:
    """Time both, in turn, and compare what they return."""
    builders = {"open_clip": theirs, "clipkit": ours}
    for build in builders.values():
        build(adapter, classes[:1], templates[:2])  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in builders}
    built: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, build in builders.items():
            began = time.perf_counter()
            built[name] = build(adapter, classes, templates)
            seconds[name].append(time.perf_counter() - began)
    pairs = zip(seconds["open_clip"], seconds["clipkit"], strict=True)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast": spread([slow / fast for slow, fast in pairs]),
        "largest_difference": float((built["open_clip"] - built["clipkit"]).abs().max()),
    }


def spread(values: list[float]) -> dict[str, object]:
    """Return the median, the extremes and every value."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "all": [round(value, 4) for value in values],
    }


def operations(
    adapter: OpenClipModel, classes: list[str], templates: list[str]
) -> dict[str, float | int]:
    """Count the floating-point operations of the text tower for both, in units of 1e12."""
    prompts = expand(classes, templates)
    lengths = pooled_place(adapter.tokenizer(prompts.unique), adapter.model) + 1
    batches = torch.split(lengths.sort(descending=True).values, TEXTS_AT_ONCE)
    needed = sum(len(batch) * operations_of_text(adapter.model, int(batch[0])) for batch in batches)
    context: int = adapter.model.context_length
    whole = len(prompts.prompt_index) * operations_of_text(adapter.model, context)
    return {
        "classes": len(classes),
        "prompts": len(prompts.prompt_index),
        "prompts_without_repeats": len(prompts.unique),
        "mean_tokens": round(float(lengths.float().mean()), 2),
        "open_clip": round(whole / 1e12, 3),
        "clipkit": round(needed / 1e12, 3),
        "times_fewer": round(whole / needed, 2),
    }


def operations_of_text(model: Any, length: int) -> int:
    """Two for each multiplication and addition of one text of so many tokens."""
    width, embed_dim = model.text_projection.shape
    per_layer = 24 * width**2 * length + 4 * width * length**2
    return int(model.transformer.layers * per_layer + 2 * width * embed_dim)


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    from open_clip import zero_shot_metadata

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--templates", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    names = list(zero_shot_metadata.IMAGENET_CLASSNAMES)
    every = [template("{}") for template in zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES]
    templates = every[: options.templates]
    adapter = open_model(f"open_clip:{MODEL}", device="cpu").model
    assert isinstance(adapter, OpenClipModel)
    result = {
        "schema": 1,
        "machine": {
            **describe(),
            "threads": torch.get_num_threads(),
            "version.open_clip_torch": metadata.version("open_clip_torch"),
        },
        "model": f"open_clip {MODEL}, random weights, float32",
        "classes": options.classes,
        "templates": len(templates),
        "rounds": options.rounds,
        **measure(adapter, names[: options.classes], templates, options.rounds),
        "must_show": GOALS,
        "operations_1e12": operations(adapter, names[:ALL_CLASSES], every),
    }
    path = options.output or RESULTS / f"{date.today()}-classifier.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(path.read_text())


if __name__ == "__main__":
    main()
