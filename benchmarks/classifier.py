"""Building a zero-shot classifier: clipkit against open_clip's builder, the same random weights.

python -m benchmarks.classifier [--classes 50] [--templates 80] [--rounds 6]

Both get class names and templates and return one unit vector a class; tokenising is included. The
rounds are interleaved, so that a busy machine is busy for both. The operations of 1,000 classes are
counted, not run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import interleaved
from benchmarks.interleaved import race, ratio, spread
from clipkit.evaluation import build_classifier, expand
from clipkit.interop import open_model
from clipkit.interop.base import TEXTS_AT_ONCE
from clipkit.interop.open_clip import OpenClipModel, pooled_place

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


BUILDERS = {"open_clip": theirs, "clipkit": ours}


def measure(
    adapter: OpenClipModel, classes: list[str], templates: list[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Time both, in turn, and compare what they return."""
    built: dict[str, Tensor] = {}

    def build(name: str, builder: Callable[..., Tensor]) -> None:
        built[name] = builder(adapter, classes, templates)

    seconds = race(
        {name: partial(build, name, builder) for name, builder in BUILDERS.items()},
        rounds=options.rounds,
        device=options.device,
    )
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast": ratio(seconds["open_clip"], seconds["clipkit"]),
        "largest_difference": float((built["open_clip"] - built["clipkit"]).abs().max()),
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

    parser = interleaved.parser(__doc__, rounds=6)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--templates", type=int, default=80)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = list(zero_shot_metadata.IMAGENET_CLASSNAMES)
    every = [template("{}") for template in zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES]
    templates = every[: options.templates]
    adapter = open_model(f"open_clip:{MODEL}", device=options.device).model
    assert isinstance(adapter, OpenClipModel)
    result = {
        "model": f"open_clip {MODEL}, random weights, float32",
        **measure(adapter, names[: options.classes], templates, options),
        "must_show": GOALS,
        "operations_1e12": operations(adapter, names[:ALL_CLASSES], every),
    }
    print(interleaved.record("classifier", options, result).read_text())


if __name__ == "__main__":
    main()
