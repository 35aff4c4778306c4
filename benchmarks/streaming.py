"""Rows a second of a stream: clipkit's, that of `datasets`, and rows in any order.

python -m benchmarks.streaming [--rows 4000] [--workers 0 2] [--rounds 10]
python -m benchmarks.streaming --rows 200 --workers 0 --rounds 1   # to see it work

One pass through parquet files of JPEGs, decoded, cropped and tokenised alike, nothing trained.
`datasets` is an IterableDataset with a shuffle buffer of the window's size, in a DataLoader; its
pictures are decoded by clipkit, since its own decoding ends the stream at the first broken one.
`map-style` reads the same files by clipkit, in any order.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.interleaved import parser, race, ratio, record, shown, spread, table
from clipkit.data import Augmentation, HuggingFacePairs
from clipkit.data.identity import image_id
from clipkit.data.samples import PairCollate, Sample
from clipkit.data.streaming import Streaming
from clipkit.tokenizer import Tokenizer

SIDE, FILES = 256, 8
SIDES = ("clipkit", "datasets", "map-style")


def write(folder: Path, rows: int) -> None:
    """Write pictures that compress about as photographs do."""
    rng = np.random.default_rng(0)
    for file in range(FILES):
        pictures = []
        for _ in range(rows // FILES):
            coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
            buffer = io.BytesIO()
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=90)
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        captions = [f"picture {row} of file {file}" for row in range(len(pictures))]
        pq.write_table(
            pa.table({"image": pictures, "caption": captions}),
            folder / f"train-{file:02d}.parquet",
            row_group_size=256,
        )


def of_clipkit(
    folder: Path, options: argparse.Namespace, workers: int, streaming: Streaming | bool
) -> Iterable[Any]:
    """Return clipkit's own batches."""
    data = HuggingFacePairs(
        str(folder), streaming=streaming, batch_size=options.batch, num_workers=workers,
        image_size=224, tokenizer=Tokenizer("english"), seed=0,
    )  # fmt: skip
    data.setup("fit")
    return data.train_dataloader()


def sample(row: dict[str, Any], *, augment: Augmentation) -> Sample:
    """Return what clipkit makes of a row."""
    encoded = row["image"]["bytes"]
    pixels = augment(encoded, 224, "bicubic", np.random.default_rng(image_id(encoded) % 2**63))
    return Sample(pixels, row["caption"], image_id(encoded), 0)


def of_datasets(folder: Path, options: argparse.Namespace, workers: int) -> Iterable[Any]:
    """Return the batches of an IterableDataset."""
    import datasets

    files = sorted(map(str, folder.glob("*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    rows = rows.shuffle(seed=0, buffer_size=options.window)
    make = partial(sample, augment=Augmentation())
    return DataLoader(
        _Mapped(rows, make), batch_size=options.batch, num_workers=workers, drop_last=True,
        collate_fn=PairCollate(Tokenizer("english")), persistent_workers=workers > 0,
    )  # fmt: skip


class _Mapped(torch.utils.data.IterableDataset[Sample]):
    # Not `IterableDataset.map`, which would turn each sample to a dict and back.

    def __init__(self, rows: Any, make: Callable[[dict[str, Any]], Sample]) -> None:
        self._rows = rows
        self._make = make

    def __iter__(self) -> Any:
        return map(self._make, self._rows)


def consume(batches: Iterable[Any]) -> None:
    """Look at every batch."""
    for batch in batches:
        batch["images"].shape  # noqa: B018


def main() -> None:
    options_of = parser(__doc__, rounds=10, threads=1)
    options_of.add_argument("--rows", type=int, default=4000)
    options_of.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    options_of.add_argument("--batch", type=int, default=64)
    options_of.add_argument("--window", type=int, default=512)
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, options.rows)
        streaming = Streaming(shuffle_window=options.window, max_validation_pairs=8)
        for workers in options.workers:
            loaders = {
                "clipkit": of_clipkit(folder, options, workers, streaming),
                "datasets": of_datasets(folder, options, workers),
                "map-style": of_clipkit(folder, options, workers, False),
            }
            contenders = {side: partial(consume, loader) for side, loader in loaders.items()}
            seconds = race(contenders, rounds=options.rounds, device="cpu")
            found[f"{workers} workers"] = {
                "rows_per_second": {
                    side: spread([options.rows / value for value in seconds[side]])
                    for side in SIDES
                },
                "datasets_to_clipkit": ratio(seconds["datasets"], seconds["clipkit"]),
            }
    rows = [["", *SIDES, "datasets / clipkit, seconds"]]
    for workers, of in found.items():
        speeds = [shown(of["rows_per_second"][side]) for side in SIDES]
        rows.append([workers, *speeds, shown(of["datasets_to_clipkit"])])
    table(rows)
    print(record("streaming", options, {"question": "streaming", "found": found}))


if __name__ == "__main__":
    main()
