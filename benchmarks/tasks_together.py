"""Two tasks on the same pictures: clipkit's benchmark against one clip-benchmark run per task.

python -m benchmarks.tasks_together [--pictures 500] [--classes 20] [--templates 80] [--rounds 2]

Zero-shot classification and retrieval with five captions a picture, the same random ViT-B/32 and
the same pictures. Loading the model is counted for neither. The rounds are interleaved, so that a
busy machine is busy for both; the metrics of both must be the same.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.classifier import MODEL
from benchmarks.interleaved import RESULTS, spread
from benchmarks.machine import describe
from clipkit.data.drawing import CLASS_NAMES, captions, draw, sample
from clipkit.interop import OpenedModel, open_model
from clipkit.interop.open_clip import OpenClipModel
from clipkit.suite import EvalData
from clipkit.suite.benchmark import benchmark
from clipkit.suite.suite_file import Suite, TaskSpec

GOALS = {"times_as_fast": 2.0, "largest_difference": 1e-6}
SAME = {
    ("zeroshot", "top1"): "acc1",
    ("zeroshot", "top5"): "acc5",
    ("zeroshot", "mean_class_top1"): "mean_per_class_recall",
    ("retrieval", "text_to_image_r1"): "image_retrieval_recall@1",
    ("retrieval", "text_to_image_r5"): "image_retrieval_recall@5",
    ("retrieval", "image_to_text_r1"): "text_retrieval_recall@1",
    ("retrieval", "image_to_text_r5"): "text_retrieval_recall@5",
}


def write_pictures(folder: Path, number: int, classes: int) -> list[dict[str, Any]]:
    """Draw pictures of 256 pixels as JPEG files, with a class and five captions each."""
    rows = []
    for index in range(number):
        drawing = sample(11, "test", index)
        name = f"{index:05d}.jpg"
        Image.fromarray(draw(drawing, 256)).save(folder / name, quality=90)
        # Numbered, so that no two texts are equal: equal ones are ties, which the peer splits by
        # their order.
        texts = [f"{text}, number {index}" for text in (captions(drawing) * 5)[:5]]
        texts = [f"{text} {'abcde'[place]}" for place, text in enumerate(texts)]
        rows.append({"file_name": name, "captions": texts, "label": index % classes})
    lines = "\n".join(json.dumps(row) for row in rows)
    (folder / "metadata.jsonl").write_text(lines + "\n", encoding="utf-8")
    return rows


class Pictures(Dataset[Any]):
    """The same pictures as clip-benchmark takes them."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], key: str, transform: Any) -> None:
        self.folder, self.rows, self.key, self.transform = folder, rows, key, transform
        self.classes = sorted({row["label"] for row in rows})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self.rows[index]
        return self.transform(Image.open(self.folder / row["file_name"])), row[self.key]


def theirs(
    adapter: OpenClipModel, folder: Path, rows: list[dict[str, Any]], names: list[str],
    templates: list[str],
) -> dict[str, float]:  # fmt: skip
    """Run clip-benchmark's two evaluations, with its defaults but for half precision."""
    from clip_benchmark.datasets.builder import image_captions_collate_fn
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    zeroshot_classification.accuracy = _accuracy

    def loader(key: str, collate: Any = None) -> DataLoader[Any]:
        pictures = Pictures(folder, rows, key, adapter.transform)
        return DataLoader(pictures, batch_size=64, num_workers=4, collate_fn=collate)

    found = zeroshot_classification.evaluate(
        adapter.model, loader("label"), adapter.tokenizer, names, templates, "cpu", amp=False
    )
    return found | zeroshot_retrieval.evaluate(
        adapter.model, loader("captions", image_captions_collate_fn), adapter.tokenizer, "cpu",
        amp=False, recall_k_list=[1, 5],
    )  # fmt: skip


def _accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[float]:
    """Do what clip-benchmark's own does, which NumPy 2.4 refuses to convert."""
    right = output.topk(max(topk), 1, True, True).indices == target[:, None]
    return [right[:, :k].any(1).double().mean().item() for k in topk]


def ours(
    opened: OpenedModel, folder: Path, names: list[str], templates: list[str]
) -> dict[str, float]:
    """Run both tasks as `clipkit benchmark` does."""
    data = EvalData(
        path=str(folder), split="train", caption_column="captions", class_names=names,
        templates=templates,
    )  # fmt: skip
    suite = Suite(
        "together",
        [
            TaskSpec(task="zeroshot", set="drawn", data=data, metric="top1"),
            TaskSpec(
                task="retrieval", set="drawn", data=data, metric="text_to_image_r1",
                arguments={"merge_captions": False},
            ),
        ],
    )  # fmt: skip
    result = benchmark(opened, suite)
    assert not result["failed"], result["failed"]
    metrics = {entry["task"]: entry["metrics"] for entry in result["tasks"]}
    return {peer: metrics[task][name]["value"] for (task, name), peer in SAME.items()}


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    from open_clip import zero_shot_metadata

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--classes", type=int, default=20)
    parser.add_argument("--templates", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    every = [template("{c}") for template in zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES]
    templates, names = every[: options.templates], CLASS_NAMES[: options.classes]
    opened = open_model(f"open_clip:{MODEL}", device="cpu")
    adapter = opened.model
    assert isinstance(adapter, OpenClipModel)
    seconds: dict[str, list[float]] = {"clip_benchmark": [], "clipkit": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_pictures(folder, options.pictures, options.classes)
        for _ in range(options.rounds):
            began = time.perf_counter()
            peer = theirs(adapter, folder, rows, list(names), templates)
            middle = time.perf_counter()
            own = ours(opened, folder, list(names), templates)
            seconds["clip_benchmark"].append(middle - began)
            seconds["clipkit"].append(time.perf_counter() - middle)
    pairs = zip(seconds["clip_benchmark"], seconds["clipkit"], strict=True)
    result = {
        "schema": 1,
        "machine": {
            **describe(),
            "threads": torch.get_num_threads(),
            "version.open_clip_torch": metadata.version("open_clip_torch"),
            "version.clip_benchmark": metadata.version("clip_benchmark"),
        },
        "model": f"open_clip {MODEL}, random weights, float32",
        "pictures": options.pictures,
        "classes": options.classes,
        "templates": len(templates),
        "captions_a_picture": 5,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast": spread([slow / fast for slow, fast in pairs]),
        "metrics": {"clip_benchmark": {n: peer[n] for n in SAME.values()}, "clipkit": own},
        "largest_difference": max(abs(peer[n] - own[n]) for n in SAME.values()),
        "must_show": GOALS,
    }
    path = options.output or RESULTS / f"{date.today()}-tasks-together.json"
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(path.read_text())


if __name__ == "__main__":
    main()
