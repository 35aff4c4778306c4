"""A result in CLIP_benchmark's own JSON, for its tools."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Our metric to theirs. Their retrieval is named after what is retrieved; the rest of ours (ranks,
# recall, calibration, kNN) has no name there.
_CLASSIFICATION = {"top1": "acc1", "top5": "acc5", "mean_class_top1": "mean_per_class_recall"}
_PROBE = {ours: f"lp_{theirs}" for ours, theirs in _CLASSIFICATION.items()}
_NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "zeroshot": ("zeroshot_classification", _CLASSIFICATION),
    "multilabel": ("zeroshot_classification", {"map": "mean_average_precision"}),
    "retrieval": (
        "zeroshot_retrieval",
        {f"text_to_image_r{k}": f"image_retrieval_recall@{k}" for k in (1, 5, 10)}
        | {f"image_to_text_r{k}": f"text_retrieval_recall@{k}" for k in (1, 5, 10)},
    ),
    "probe": ("linear_probe", _PROBE),
    "fewshot": ("linear_probe", _PROBE),
    "winoground": (
        "image_caption_selection",
        {"image": "image_acc", "text": "text_acc", "group": "acc"},
    ),
    "sugarcrepe": ("image_caption_selection", {"accuracy": "text_acc"}),
}


def to_clip_benchmark(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what CLIP_benchmark would have written for each task of a result that it knows.

    One entry is one of its files: `clip_benchmark build` takes files of one entry each. Tasks it
    has no name for (kNN) are left out, and so are values that are no finite number.
    """
    model, pretrained = _model_name(result["model"])
    entries = []
    for task in result["tasks"]:
        kind, names = _NAMES.get(task["task"], ("", {}))
        metrics = {
            theirs: task["metrics"][ours]["value"]
            for ours, theirs in names.items()
            if _is_finite(task["metrics"].get(ours, {}).get("value"))
        }
        if task["task"] == "sugarcrepe" and metrics:
            metrics["acc"] = metrics["text_acc"]
        if task["task"] == "fewshot" and metrics and "shots" in task["settings"]["arguments"]:
            metrics["fewshot_k"] = task["settings"]["arguments"]["shots"]
        if metrics:
            entries.append(
                {
                    "dataset": _dataset_name(task),
                    "model": model,
                    "pretrained": pretrained,
                    "task": kind,
                    "metrics": metrics,
                    "language": "en",
                }
            )
    return entries


def save_clip_benchmark(result: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Write each entry of `to_clip_benchmark` to a file of its own and return the files."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for entry in to_clip_benchmark(result):
        words = (entry[key] for key in ("dataset", "pretrained", "model", "language", "task"))
        stem = re.sub(r"[^\w.+-]+", "-", "_".join(words))
        same = sum(
            re.fullmatch(rf"{re.escape(stem)}(-\d+)?", path.stem) is not None for path in paths
        )
        path = Path(folder) / f"{stem}{f'-{same + 1}' if same else ''}.json"
        path.write_text(json.dumps(entry, allow_nan=False), encoding="utf-8")
        paths.append(path)
    return paths


def _model_name(model: Mapping[str, Any]) -> tuple[str, str]:
    spec, digest = str(model["spec"]), str(model.get("weights") or "")[:12]
    library, _, rest = spec.partition(":")
    # The opened model's name is MODEL/TAG as open_clip writes them, whatever was typed.
    name, _, tag = str(model.get("name") or rest).rpartition("/")
    if library == "open_clip" and name and not os.path.exists(rest):
        return name, tag
    return str(model.get("name") or spec), digest or spec


def _dataset_name(task: Mapping[str, Any]) -> str:
    name = str(task["set"])
    if match := re.fullmatch(r"[\w.-]+/wds_(.+)", str(task["data"].get("id"))):
        return "wds/" + re.sub(r"^vtab-", "vtab/", match[1])
    return f"sugar_crepe/{name}" if task["task"] == "sugarcrepe" else name


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
