"""Data larger than memory: time to the first step, memory, what is written, rows a second.

python -m benchmarks.large_data FOLDER [--data ../shared/data] [--rows 1000000] [--gigabytes 2]

FOLDER takes what is made: a table of a million rows of small pictures, and pictures of 64 kB as
parquet and as tar shards; each as pyarrow and tarfile write them by default. Then `clipkit fit`
trains a small model for some steps on each, with four loader processes, and on the first 10,000
rows of each: seconds from the end of the imports to the end of the first step, the memory of all
processes at the last step (`pss` counts shared pages once, `rss` in every process), and what the
run wrote: all files that it left outside of its checkpoints, or what its processes gave to the disk
more than those of the small run, if that is more (MLflow's database is written many times over).
At last rows are read in order and at random, beside `datasets`, which first writes a copy. Caches
lie in FOLDER, and the system's page cache is warm: it is the reading that is measured.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.decode import photos
from benchmarks.interleaved import add_data, parser, record, table
from benchmarks.tokens import captions_of

GOALS = {"seconds_to_first_step": 30.0, "pss_above_mb": 300.0, "rss_above_mb": 300.0,
         "share_written": 0.01}  # fmt: skip
FEW = 10_000  # rows that memory is compared with
SMALL = 32  # pixels a side of the million
WORKERS, BATCH, STEPS = 4, 64, 60
MB = 1e6


# --- Data ----------------------------------------------------------------------------------------


def small_pictures(data: Path) -> list[bytes]:
    """Return crops of photos, of about 1 kB."""
    rng = np.random.default_rng(0)
    encoded = []
    for photo in photos(data / "coco_mini", 0.0):
        with Image.open(io.BytesIO(photo)) as image:
            whole = image.resize((160, 120))
        for _ in range(20):
            left, top = rng.integers(0, 160 - SMALL), rng.integers(0, 120 - SMALL)
            stream = io.BytesIO()
            part = whole.crop((left, top, left + SMALL, top + SMALL))
            part.save(stream, "JPEG", quality=75)
            encoded.append(stream.getvalue())
    return encoded


def rows_of(
    pictures: Sequence[bytes], captions: Sequence[str], rows: range
) -> Iterator[tuple[str, bytes, str]]:
    """Yield name, picture and caption of rows that all differ."""
    for row in rows:
        # What follows the end of a JPEG is not decoded.
        picture = pictures[row % len(pictures)] + row.to_bytes(8, "little")
        first, second = captions[row % len(captions)], captions[row // 7 % len(captions)]
        yield f"{row:08d}", picture, f"{first} {second} {row}"


def write_parquet(path: Path, rows: Iterator[tuple[str, bytes, str]]) -> None:
    """Write a file as pyarrow does by default; row groups hold what fits 256 MB here."""
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image, "caption": pa.string()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema) as writer:
        images: list[dict[str, Any]] = []
        captions: list[str] = []

        def flush() -> None:
            arrays = [pa.array(images, image), pa.array(captions, pa.string())]
            writer.write_table(pa.table(arrays, schema=schema))
            images.clear()
            captions.clear()

        size = 0
        for name, picture, caption in rows:
            images.append({"bytes": picture, "path": f"{name}.jpg"})
            captions.append(caption)
            size += len(picture)
            if size > 256 << 20 or len(images) == 100_000:
                flush()
                size = 0
        flush()


def write_tar(path: Path, rows: Iterator[tuple[str, bytes, str]]) -> None:
    """Write a shard of .jpg and .txt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, picture, caption in rows:
            for kind, content in (("jpg", picture), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{name}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def make(folder: Path, data: Path, rows: int, gigabytes: float) -> dict[str, tuple[Path, Path]]:
    """Return for each kind of data where all of it is, and its first rows."""
    captions = captions_of(data)
    made = {}
    small = small_pictures(data)
    large = photos(data / "coco_mini", 0.0)
    number = int(gigabytes * 1e9 / np.mean([len(picture) for picture in large]))
    kinds: tuple[tuple[str, Callable[..., None], list[bytes], int, int, str], ...] = (
        ("table", write_parquet, small, rows, rows, "parquet"),
        ("parquet", write_parquet, large, number, FEW, "parquet"),
        ("tar", write_tar, large, number, FEW // 5, "tar"),
    )
    for kind, write, pictures, count, a_file, ending in kinds:
        for part, total in (("all", count), ("few", min(FEW, count))):
            done = folder / kind / part / "done"
            if done.exists():
                continue
            for start in range(0, total, a_file):
                chosen = range(start, min(start + a_file, total))
                path = folder / kind / part / f"train-{start:08d}.{ending}"
                write(path, rows_of(pictures, captions, chosen))
            done.touch()
        made[kind] = (folder / kind / "all", folder / kind / "few")
    return made


def pattern(folder: Path) -> str:
    """Return what names the files of a folder to clipkit and to `datasets`."""
    kinds = {path.suffix for path in folder.iterdir() if path.suffix}
    return f"{folder}/*{kinds.pop()}"


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- A run ---------------------------------------------------------------------------------------


class Watch(L.Callback):
    """Writes down when the first step ended, and at the last what the processes hold.

    Args:
        path: where it is written.
        began: when the imports had ended, by `time.time`.
    """

    def __init__(self, path: str, began: float) -> None:
        self.path = path
        self.began = began
        self.first: float | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if self.first is None:
            self.first = time.time() - self.began
        if trainer.global_step == trainer.max_steps:
            found = {"seconds_to_first_step": self.first, **memory()}
            Path(self.path).write_text(json.dumps(found))


def memory() -> dict[str, float]:
    """Return what this process and its children hold, and have written to disk, in MB."""
    mine = os.getpid()
    children = Path(f"/proc/{mine}/task/{mine}/children").read_text().split()
    total = {"pss_mb": 0.0, "rss_mb": 0.0, "to_disk_mb": 0.0}
    for process in (str(mine), *children):
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        for name in ("pss", "rss"):
            total[f"{name}_mb"] += _kilobytes(rollup, name.capitalize()) * 1024 / MB
        total["to_disk_mb"] += (
            _kilobytes(Path(f"/proc/{process}/io").read_text(), "write_bytes") / MB
        )
    return {**total, "processes": 1 + len(children)}


def _kilobytes(text: str, name: str) -> int:
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


def train_here(dataset: str, output: str) -> None:
    """Train in this process, which has imported everything before."""
    import datasets  # noqa: F401
    import mlflow  # noqa: F401
    import timm  # noqa: F401

    from clipkit import callbacks, encoders, heads, losses, module  # noqa: F401
    from clipkit.cli import main as command
    from clipkit.tracking import logger, run_folder  # noqa: F401

    watch = {"class_path": "benchmarks.large_data.Watch",
             "init_args": {"path": output, "began": time.time()}}  # fmt: skip
    model = Path(__file__).with_name("first_step.yaml")
    sys.argv = [
        "clipkit", "fit", "-c", "base", "-c", str(model), "--data", "HuggingFacePairs",
        f"--data.dataset={dataset}", f"--data.batch_size={BATCH}", f"--data.num_workers={WORKERS}",
        f"--trainer.max_steps={STEPS}", f"--trainer.callbacks+={json.dumps(watch)}",
    ]  # fmt: skip
    command()


def train(folder: Path, dataset: Path) -> dict[str, float]:
    """Return what a run of its own process took and wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {"HOME": "home", "XDG_CACHE_HOME": "cache", "HF_HOME": "hub", "TMPDIR": "tmp"}
    for name in ("work", *places.values()):
        (folder / name).mkdir(exist_ok=True)
    output = folder / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.large_data", "--train", pattern(dataset), str(output)],
        cwd=folder / "work", check=False, capture_output=True, text=True,
        env={**os.environ, **{name: str(folder / place) for name, place in places.items()},
             "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the run ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(output.read_text())
    files = [path for path in folder.rglob("*") if path.is_file() and path != output]
    kept = [path for path in files if "checkpoints" not in path.parts]
    return {**found, "files_mb": sum(path.stat().st_size for path in kept) / MB}


# --- Rows ----------------------------------------------------------------------------------------


def rows_a_second(read: Callable[[int], object], length: int, seconds: float = 4.0) -> Any:
    """Return how many rows a second are read in order, and at random once places are known."""
    found = {}
    orders = {
        "in_order": np.arange(length),
        "at_random": np.random.default_rng(1).permutation(length),
    }
    for name, order in orders.items():
        began, count = time.perf_counter(), 0
        for row in order.tolist():
            read(row)
            count += 1
            if time.perf_counter() - began > seconds:
                break
        found[name] = round(count / (time.perf_counter() - began))
    return found


def reading(dataset: Path, folder: Path) -> dict[str, Any]:
    """Return the rows a second of clipkit, and of `datasets` where it reads such files by row."""
    from clipkit.data.layouts import open_layout

    began = time.perf_counter()
    rows = open_layout(pattern(dataset)).split("train")
    ours: dict[str, Any] = {"seconds_to_open": time.perf_counter() - began}
    for row in np.linspace(0, len(rows) - 1, 3000).astype(int).tolist():
        rows.image(row)  # so that the places of most pages are known
    found = {"clipkit": ours | rows_a_second(rows.image, len(rows))}
    if "tar" in dataset.parts:
        return found
    import datasets

    datasets.disable_progress_bars()
    copied = folder / "datasets"
    shutil.rmtree(copied, ignore_errors=True)
    began = time.perf_counter()
    theirs = datasets.load_dataset(
        "parquet", data_files=pattern(dataset), split="train", cache_dir=str(copied)
    )
    theirs = theirs.cast_column("image", datasets.Image(decode=False))
    opened = time.perf_counter() - began
    found["datasets"] = {
        "seconds_to_open": opened,
        **rows_a_second(lambda row: theirs[row]["image"]["bytes"], len(theirs)),
        "copied_mb": size_of(copied) / MB,
    }
    shutil.rmtree(copied)
    return found


def main() -> None:
    """Make the data, run, compare, and write one dated file."""
    if sys.argv[1:2] == ["--train"]:
        train_here(*sys.argv[2:])
        return
    options_of = parser(__doc__, rounds=1, threads=1)
    add_data(options_of)
    options_of.add_argument("folder", type=Path, help="for what is made; several gigabytes")
    options_of.add_argument("--rows", type=int, default=1_000_000)
    options_of.add_argument("--gigabytes", type=float, default=2.0)
    options = options_of.parse_args()
    result = measure(options)
    path = record("large-data", options, result)
    rows = [("data", "seconds to first step", "PSS above MB", "RSS above MB", "written")]
    rows += [
        (kind, *(f"{found[name]:.3g}" for name in GOALS)) for kind, found in result["runs"].items()
    ]
    table(rows)
    for kind, sides in result["rows_a_second"].items():
        print(kind, sides)
    print(path)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return what each kind of data took, and the worst of each figure."""
    made = make(options.folder.resolve(), options.data, options.rows, options.gigabytes)
    runs: dict[str, Any] = {}
    for kind, (whole, few) in made.items():
        scratch = options.folder.resolve() / "runs" / f"{kind}-{time.time():.0f}"
        large, small = train(scratch / "all", whole), train(scratch / "few", few)
        size = size_of(whole)
        above = large["to_disk_mb"] - small["to_disk_mb"]
        runs[kind] = {
            "seconds_to_first_step": large["seconds_to_first_step"],
            "pss_above_mb": large["pss_mb"] - small["pss_mb"],
            "rss_above_mb": large["rss_mb"] - small["rss_mb"],
            "share_written": max(large["files_mb"], above) * MB / size,
            "megabytes": size / MB,
            "all": large,
            "few": small,
        }
    return {
        **{name: max(found[name] for found in runs.values()) for name in GOALS},
        "runs": runs,
        "rows_a_second": {
            kind: reading(whole, options.folder.resolve() / "runs")
            for kind, (whole, _) in made.items()
        },
        "must_show": GOALS,
    }


if __name__ == "__main__":
    main()
