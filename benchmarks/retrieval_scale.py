"""Retrieval at scale: the time, and the memory above the embeddings.

python -m benchmarks.retrieval_scale [--images 20000] [--texts 100000] [--dim 512]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from datetime import date
from pathlib import Path

import torch

from benchmarks.machine import describe
from clipkit.evaluation import pairs_of, retrieval_metrics, retrieve

RESULTS = Path(__file__).parent / "results"
GOALS = {"mib_above_the_embeddings": 1024}


def peak() -> float:
    """Return the most memory that the process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and write one dated file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.images, options.dim, generator=generator)
    texts = torch.randn(options.texts, options.dim, generator=generator)
    owners = torch.arange(options.texts) % options.images
    texts += images[owners] * 0.1
    # What the libraries themselves take at first use is not the evaluation's.
    retrieval_metrics(retrieve(images[:64], texts[:64], pairs_of(torch.arange(64))))
    before = peak()
    began = time.perf_counter()
    metrics = retrieval_metrics(retrieve(images, texts, pairs_of(owners)))
    seconds = time.perf_counter() - began
    result = {
        "schema": 1,
        "machine": {**describe(), "threads": torch.get_num_threads()},
        "images": options.images,
        "texts": options.texts,
        "dim": options.dim,
        "seconds": round(seconds, 1),
        "mib_of_embeddings": round((images.nbytes + texts.nbytes) / 2**20, 1),
        "mib_above_the_embeddings": round(peak() - before, 1),
        "text_to_image_r1": metrics["text_to_image_r1"].value,
        "must_show": GOALS,
    }
    path = options.output or RESULTS / f"{date.today()}-retrieval-scale.json"
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    print(path.read_text())


if __name__ == "__main__":
    main()
