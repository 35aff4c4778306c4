"""Parquet, arrow, tar, jsonl and csv files of pictures, mutated, opened and read to the last row.

python -m tests.fuzz.containers [--number 10000] [--seed 0] [--workers 2]

Pictures are PNG, whose checksums tell damage; captions and names tell by themselves which row they
are of, so that no damage turns one into another. Every row is the pair it was, is broken with a
reason, or has a caption that there never was, since text has no checksum. A picture with the
caption of another is wrong, and so is whatever ends otherwise than in a sentence. Lists are text:
bytes that are taken out between two lines make one line of them, which nothing can tell.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipkit.data.broken import BrokenRowError
from clipkit.data.caption_choice import CaptionChoice
from clipkit.data.layouts import open_layout
from clipkit.data.rows import StoredRows
from clipkit.data.samples import PairDataset, Pixels
from clipkit.errors import UserError
from tests.fuzz import campaign, mutations
from tests.fuzz.blocks import Block
from tests.fuzz.mutations import Victim

ROWS = 24
SIDE = 16
MUTATIONS = (
    mutations.flipped_bits,
    mutations.overwritten_bytes,
    mutations.removed_bytes,
    mutations.inserted_bytes,
    mutations.cut_off,
    mutations.spliced,
)


@cache
def pictures(seed: int = 0) -> list[bytes]:
    """Noise, so that no two are alike and nothing is compressed away."""
    rng = np.random.default_rng(seed)
    files = []
    for _ in range(ROWS):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(stream, "PNG")
        files.append(stream.getvalue())
    return files


@cache
def word(row: int) -> str:
    """What names a row: far from the word of any other."""
    return blake2b(str(row).encode(), digest_size=6).hexdigest()


def caption(row: int) -> str:
    return f"picture {word(row)} of many"


def _table(files: list[bytes]) -> pa.Table:
    images = [{"bytes": data, "path": f"{word(row)}.png"} for row, data in enumerate(files)]
    return pa.table({"image": images, "caption": [caption(row) for row in range(len(files))]})


def _parquet(files: list[bytes], **options: object) -> bytes:
    stream = io.BytesIO()
    pq.write_table(
        _table(files),
        stream,
        row_group_size=10,
        data_page_size=2_000,
        write_batch_size=4,
        **options,
    )
    return stream.getvalue()


def _arrow(files: list[bytes]) -> bytes:
    stream = io.BytesIO()
    table = _table(files)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return stream.getvalue()


def _tar(files: list[bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for row, data in enumerate(files):
            for name, content in _members(row, data):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def _members(row: int, data: bytes) -> tuple[tuple[str, bytes], tuple[str, bytes]]:
    return (f"{word(row)}.png", data), (f"{word(row)}.txt", caption(row).encode())


def _jsonl(files: list[bytes]) -> bytes:
    lines = [
        json.dumps({"file_name": f"{word(row)}.png", "caption": caption(row)})
        for row in range(len(files))
    ]
    return "\n".join(lines).encode()


def _csv(files: list[bytes]) -> bytes:
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(["path", "caption"])
    writer.writerows([f"{word(row)}.png", caption(row)] for row in range(len(files)))
    return stream.getvalue().encode()


MAKERS: dict[str, tuple[str, Callable[[list[bytes]], bytes]]] = {
    "parquet": ("data.parquet", lambda files: _parquet(files, compression="none")),
    "snappy": ("data.parquet", lambda files: _parquet(files, data_page_version="2.0")),
    "checked": ("data.parquet", lambda files: _parquet(files, write_page_checksum=True)),
    "zstd": ("data.parquet", lambda files: _parquet(files, compression="zstd")),
    "arrow": ("data.arrow", _arrow),
    "tar": ("data.tar", _tar),
    "jsonl": ("list.jsonl", _jsonl),
    "csv": ("list.csv", _csv),
}
FORMS = tuple(MAKERS)
LISTS = ("jsonl", "csv")


@cache
def victim(form: str) -> Victim:
    _, make = MAKERS[form]
    data, other = make(pictures()), make(pictures(1))
    return Victim(form, data, [Block(0, len(data))], other)


def mutate(number: int, seed: int) -> tuple[str, str, bytes]:
    """Return the format, the name of the mutation and the file after it."""
    form = FORMS[number % len(FORMS)]
    rng = random.Random(f"{seed} {number}")
    mutation = rng.choice(MUTATIONS)
    return form, mutation.__name__.replace("_", " "), mutation(victim(form), rng)


@cache
def _known() -> dict[bytes, tuple[int, int]]:
    """Which row of which set of pictures some pixels are."""
    return {
        np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1).tobytes(): (seed, row)
        for seed in (0, 1)
        for row, data in enumerate(pictures(seed))
    }


def judge(form: str, data: bytes, folder: Path) -> str:
    """Open a file and read all its rows; AssertionError where anything is silently wrong."""
    name, _ = MAKERS[form]
    (folder / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows, sentence = _opened(folder / name)
        assert "\n" not in sentence
        if rows is None:
            return "refused"
        pairs = PairDataset(
            rows,
            pixels=Pixels(SIDE, "shortest", "bicubic"),
            augment=None,
            captions=CaptionChoice("first"),
            seed=0,
        )
        kinds = [_judge_row(pairs, row) for row in range(len(pairs))]
    assert len(kinds) == len(rows)
    assert "other" not in kinds or form in LISTS, "a picture stands with the caption of another"
    if "other" in kinds:
        return "lines made one"
    if "broken" in kinds:
        return "broken rows"
    return "other captions" if "caption" in kinds else "same rows"


def _opened(path: Path) -> tuple[StoredRows | None, str]:
    try:
        return open_layout(str(path)).split("train"), ""
    except UserError as error:
        return None, str(error)


def _judge_row(pairs: PairDataset, row: int) -> str:
    try:
        sample = pairs.sample(row, 0)
    except BrokenRowError:
        return "broken"
    found = _known().get(sample.image.numpy().tobytes())
    assert found is not None, f"row {row} shows a picture that there never was"
    if sample.caption not in map(caption, range(ROWS)):
        return "caption"
    return "same" if sample.caption == caption(found[1]) else "other"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    tally = campaign.run(
        options.number, seed=options.seed, workers=options.workers,
        module="tests.fuzz.container_worker", forms=FORMS,
    )  # fmt: skip
    print(campaign.table(tally, FORMS))
    print("\n".join(tally.wrong) or f"{tally.total} mutations, none wrong")
    return 1 if tally.wrong else 0


def with_pictures() -> tempfile.TemporaryDirectory[str]:
    """A folder with the pictures that lists name."""
    folder = tempfile.TemporaryDirectory()
    for row, data in enumerate(pictures()):
        (Path(folder.name) / f"{word(row)}.png").write_bytes(data)
    return folder


if __name__ == "__main__":
    sys.exit(main())
