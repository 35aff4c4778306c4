"""Does it train as well? The same small recipe through open_clip's loop and through ours.

python -m benchmarks.trains_as_well [--seeds 5] [--minutes 4] [--work trains-as-well]

Emoji of three vendors, scored on a fourth by clipkit's evaluation for both: the mean of R@10 of
both directions on `test`. The lower end of the 95 % interval of ours minus theirs must lie above -3
points. A run's score is kept in the work folder, as is what it printed; started again, what is
there is not run again.

The same on both sides: architecture (a ViT of 64 patches, CLIP's text transformer, one matrix
each), CLIP's vocabulary and a context of 32, one caption a picture, JPEG files of 160 x 160 pixels,
a random crop of 0.9 to 1 of the area to 64 x 64, batch, epochs, AdamW and its settings, a warm-up
of 50 steps and half a cosine to zero, gradients clipped at norm 1, float32, no share of a last
batch, the distributions that first weights are drawn from. Ours with its switches on: compiled
towers, captions without padding, the loss by tiles, pictures shrunk once, tokens and pictures from
caches, JPEGs decoded at half their size where the crop allows it; an equal caption in a batch is a
negative, as theirs is.

Not the same: the random numbers (so that equal seeds pair nothing, and both intervals are stated);
theirs decays the text tower's position table, ours does not.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.interleaved import add_data, parser, record, table
from benchmarks.models import has_peers_training
from benchmarks.small_vit import VISION
from benchmarks.tokens import definition
from clipkit.evaluation.comparison import configuration_difference
from clipkit.evaluation.statistics import student_quantile

ROOT = Path(__file__).parents[1]
GOALS = {"difference_low": -3.0}
SIDES = ("open_clip", "clipkit")
EPOCHS_A_MINUTE = 3.5  # of one core
POINTS = 5  # of a curve
BATCH, RATE, DECAY, WARM_UP = 128, 1e-3, 0.2, 50
EMBED_DIM = 128
TEXT = {"context_length": 32, "width": 128, "heads": 2, "layers": 2}
SIZE, QUALITY = 160, 90
SUITE = """\
tasks:
  - task: retrieval
    set: emoji_test
    data: {path: pictures, split: test, caption_column: caption}
"""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# --- Data and recipes, written once --------------------------------------------------------------


def write_pictures(data: Path, folder: Path, limit: int | None) -> None:
    """Write a folder a split with metadata.csv, and the training list that open_clip reads."""
    from datasets import load_dataset

    for split in ("train", "validation", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        rows = load_dataset(str(data / "emoji_vendors"), split=split)
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        names = [f"{number:04d}.jpg" for number in range(len(rows))]
        for name, row in zip(names, rows, strict=True):
            (folder / split / name).write_bytes(on_white(row["image"]))
        captions = rows["caption"]
        _write_csv(folder / split / "metadata.csv", ("file_name", "caption"), names, captions, ",")
        if split == "train":
            paths = [str((folder / split / name).resolve()) for name in names]
            _write_csv(folder.parent / "train.tsv", ("filepath", "title"), paths, captions, "\t")


def _write_csv(
    path: Path, head: tuple[str, str], names: Sequence[str], captions: Sequence[str], separator: str
) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=separator)
        writer.writerows([head, *zip(names, captions, strict=True)])


def on_white(image: Any) -> bytes:
    """Return a picture as a JPEG without transparency, larger than either side trains on."""
    from PIL import Image

    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    large = Image.alpha_composite(white, image).convert("RGB").resize((SIZE, SIZE), 3)
    buffer = io.BytesIO()
    large.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_recipes(work: Path) -> None:
    """Write the model as open_clip reads it, ours as YAML, and what both are scored on."""
    text = {"vocab_size": 49_408, **TEXT}
    model = {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": text}
    (work / "small.json").write_text(json.dumps(model), encoding="utf-8")
    (work / "words.json").write_text(definition(), encoding="utf-8")
    (work / "suite.yaml").write_text(SUITE, encoding="utf-8")
    (work / "small.yaml").write_text(OURS, encoding="utf-8")


OURS = f"""\
model:
  embed_dim: {EMBED_DIM}
  tokenizer: {{path: words.json, context_length: {TEXT["context_length"]}}}
  image_encoder: benchmarks.small_vit.SmallViT
  text_encoder:
    class_path: TextTransformer
    init_args: {{width: {TEXT["width"]}, depth: {TEXT["layers"]}, heads: {TEXT["heads"]}}}
  loss: {{class_path: InfoNCELoss, init_args: {{duplicates: negative}}}}
  compile: true
  optimizer.lr: {RATE}
  optimizer.weight_decay: {DECAY}
  schedule: {{class_path: WarmupCosine, init_args: {{warmup_steps: {WARM_UP}}}}}
data:
  class_path: HuggingFacePairs
  init_args:
    dataset: pictures
    batch_size: {BATCH}
    num_workers: 1
    shrink_pictures: true
    cache_tokens: true
    cache_pictures_gb: 1
    cache_folder: cache
trainer:
  accelerator: cpu
  gradient_clip_val: 1.0
  limit_val_batches: 0
  logger: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args:
        save_top_k: -1
        filename: "at-{{epoch:03d}}"
        auto_insert_metric_name: false
"""


# --- Runs ----------------------------------------------------------------------------------------


def run_ours(seed: int, epochs: int, every: int, options: argparse.Namespace) -> dict[int, str]:
    """Train through `clipkit fit`; return what to open after how many epochs."""
    name = f"clipkit-{seed}"
    words = ["-m", "clipkit.cli", "--trust", "benchmarks", "fit", "-c", "base", "-c", "small.yaml"]
    words += [f"--run_name={name}", f"--seed_everything={seed}", f"--trainer.max_epochs={epochs}"]
    words += [f"--trainer.callbacks.every_n_epochs={every}"]
    words += [f"--data.batch_size={options.batch}"]
    _run(name, words, options)
    found = (options.work / "runs" / "small").glob(f"{name}*/checkpoints/at-*.ckpt")
    newest = sorted(found, key=lambda path: path.stat().st_mtime)
    return {int(path.stem.removeprefix("at-")) + 1: str(path.resolve()) for path in newest}


THEIR_LOOP = """\
import sys
import open_clip
from open_clip_train.main import main
open_clip.add_model_config("small.json")
main(sys.argv[1:])
"""


def run_theirs(seed: int, epochs: int, every: int, options: argparse.Namespace) -> dict[int, str]:
    """Train through open_clip's own loop on a csv file; return what to open after which epoch."""
    name = f"open_clip-{seed}-{time.time_ns()}"
    words = ["-c", THEIR_LOOP, "--model", "small", "--device", "cpu", "--precision", "fp32"]
    words += ["--train-data", "train.tsv", "--dataset-type", "csv", "--workers", "1"]
    words += ["--batch-size", str(options.batch), "--epochs", str(epochs), "--seed", str(seed)]
    words += ["--lr", str(RATE), "--wd", str(DECAY), "--beta1", "0.9", "--beta2", "0.98"]
    words += ["--eps", "1e-6", "--warmup", str(WARM_UP), "--grad-clip-norm", "1.0"]
    words += ["--save-frequency", str(every), "--logs", "logs", "--name", name]
    _run(f"open_clip-{seed}", words, options)
    found = (options.work / "logs" / name / "checkpoints").glob("epoch_*.pt")
    return {
        int(path.stem.removeprefix("epoch_")): str(as_folder(path, options.work)) for path in found
    }


def as_folder(checkpoint: Path, work: Path) -> Path:
    """Write what open_clip's loop saved as a folder in its own layout, which `benchmark` opens."""
    import torch

    folder = checkpoint.with_suffix("")
    folder.mkdir(exist_ok=True)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    config = {
        "model_cfg": json.loads((work / "small.json").read_text()),
        "preprocess_cfg": {"mean": MEAN, "std": STD},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _run(name: str, words: Sequence[str], options: argparse.Namespace) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(options.threads),
    }
    with (options.work / f"{name}.log").open("w", encoding="utf-8") as log:
        subprocess.run(
            [sys.executable, *words], cwd=options.work, env=environment, stdout=log,
            stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip


RUNNERS = {"open_clip": run_theirs, "clipkit": run_ours}


# --- Scores --------------------------------------------------------------------------------------


def score(spec: str, work: Path) -> float:
    """Return the mean R@10 of both directions on `test`, in per cent, by clipkit's evaluation."""
    from clipkit.interop import open_model
    from clipkit.suite.benchmark import benchmark
    from clipkit.suite.suite_file import read_suite

    opened = open_model(spec, trust=["benchmarks"], device="cpu")
    (task,) = benchmark(opened, read_suite(work / "suite.yaml"))["tasks"]
    directions = ("image_to_text_r10", "text_to_image_r10")
    return round(100 * fmean(task["metrics"][name]["value"] for name in directions), 3)


def one_run(side: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train and score one run, or read what is known of it."""
    path = options.work / f"{side}-seed{seed}.json"
    settings = {"epochs": options.epochs, "batch": options.batch, "limit": options.limit}
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            print(f"{side}, seed {seed}: kept from {path}", flush=True)
            return found
    every = max(1, options.epochs // POINTS)
    began = time.perf_counter()
    specs = RUNNERS[side](seed, options.epochs, every, options)
    seconds = time.perf_counter() - began
    curve = [{"epoch": epoch, "r10": score(specs[epoch], options.work)} for epoch in sorted(specs)]
    found = {"settings": settings, "side": side, "seed": seed, "seconds": round(seconds, 1),
             "curve": curve, "r10": curve[-1]["r10"]}  # fmt: skip
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{side}, seed {seed}: {found['r10']} in {seconds:.0f} s", flush=True)
    return found


def difference(scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return ours minus theirs in points, with Welch's interval and the one of pairs of seeds."""
    theirs, ours = scores["open_clip"], scores["clipkit"]
    welch = configuration_difference(theirs, ours)
    pairs = [own - their for own, their in zip(ours, theirs, strict=True)]
    found: dict[str, Any] = {"value": round(fmean(pairs), 3), "welch": None, "paired": None}
    if welch is not None:
        found["welch"] = [round(end, 3) for end in welch.interval]
    if len(pairs) > 1:
        half = student_quantile(len(pairs) - 1) * stdev(pairs) / sqrt(len(pairs))
        found["paired"] = [round(found["value"] - half, 3), round(found["value"] + half, 3)]
    return found


def verdict(found: Mapping[str, Any]) -> bool | None:
    """Whether both intervals lie above the goal; None with too few seeds to say."""
    ends = [found[kind][0] for kind in ("welch", "paired") if found[kind] is not None]
    return min(ends) > GOALS["difference_low"] if ends else None


def options_from() -> argparse.Namespace:
    """Read the options."""
    options_of = parser(__doc__, rounds=1)
    add_data(options_of)
    options_of.add_argument("--work", type=Path, default=Path("trains-as-well"))
    options_of.add_argument("--seeds", type=int, default=5, help="a side")
    options_of.add_argument("--minutes", type=float, default=4, help="a run, about")
    options_of.add_argument("--epochs", type=int, default=None, help="instead of minutes")
    options_of.add_argument("--batch", type=int, default=BATCH)
    options_of.add_argument("--limit", type=int, default=None, help="pictures of each split")
    options = options_of.parse_args()
    if not has_peers_training():
        options_of.error("open_clip's training loop is not installed (extra `peers`)")
    options.epochs = options.epochs or max(1, round(options.minutes * EPOCHS_A_MINUTE))
    options.data, options.work = options.data.resolve(), options.work.resolve()
    return options


def main() -> None:
    """Run what is missing, compare, and write one dated file."""
    options = options_from()
    options.work.mkdir(parents=True, exist_ok=True)
    write_recipes(options.work)
    if not (options.work / "train.tsv").is_file():
        write_pictures(options.data, options.work / "pictures", options.limit)
    # In turn, so that what is stopped early has as many of both.
    runs = [one_run(side, seed, options) for seed in range(options.seeds) for side in SIDES]
    scores = {side: [run["r10"] for run in runs if run["side"] == side] for side in SIDES}
    found = difference(scores)
    result = {
        "metric": "mean R@10 of both directions, emoji_vendors test, per cent",
        "recipe": {"epochs": options.epochs, "batch": options.batch, "rate": RATE},
        "runs": runs,
        "scores": scores,
        "difference": found,
        "difference_low": None if found["welch"] is None else found["welch"][0],
        "must_show": GOALS,
        "met": verdict(found),
    }
    path = record("trains-as-well", options, result)
    rows = [("side", "mean", "each seed", "seconds a run")]
    for side in SIDES:
        seconds = fmean(run["seconds"] for run in runs if run["side"] == side)
        each = " ".join(f"{value:.1f}" for value in scores[side])
        rows.append((side, f"{fmean(scores[side]):.2f}", each, f"{seconds:.0f}"))
    table(rows)
    print("ours minus theirs, points:", found, "above -3:", result["met"])
    print(path)


if __name__ == "__main__":
    main()
