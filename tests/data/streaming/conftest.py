"""Small streamed data sets of every layout, and what ranks make of them without any training."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.data import HuggingFacePairs
from clipkit.data.streaming import Streaming
from clipkit.data.streaming.state import Pass
from clipkit.tokenizer import Tokenizer


def encoded(shard, row):
    """A picture that says which one it is."""
    buffer = io.BytesIO()
    pixels = np.full((8, 8, 3), (shard * 16 % 256, row % 256, row // 256), np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def caption(shard, row):
    return f"picture {row} of shard {shard}"


def write_parquet(folder, sizes, damage=()):
    for shard, size in enumerate(sizes):
        path = folder / f"train-{shard:03d}.parquet"
        pq.write_table(table(shard, size), path, row_group_size=5)
        if shard in damage:
            path.write_bytes(path.read_bytes()[:-20])


def table(shard, size):
    pictures = [{"bytes": encoded(shard, row), "path": None} for row in range(size)]
    captions = [caption(shard, row) for row in range(size)]
    return pa.table(
        {"image": pictures, "caption": captions, "id": [f"{shard}-{row}" for row in range(size)]}
    )


def write_arrow(folder, sizes, damage=()):
    for shard, size in enumerate(sizes):
        path = folder / f"train-{shard:03d}.arrow"
        whole = table(shard, size)
        with pa.ipc.new_stream(str(path), whole.schema) as writer:
            writer.write_table(whole, max_chunksize=5)
        if shard in damage:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_tars(folder, sizes, damage=()):
    for shard, size in enumerate(sizes):
        path = folder / f"train-{shard:03d}.tar"
        with tarfile.open(path, "w") as archive:
            for row in range(size):
                record = json.dumps({"id": row}).encode()
                for field, content in {
                    "png": encoded(shard, row), "txt": caption(shard, row).encode(), "json": record,
                }.items():  # fmt: skip
                    member = tarfile.TarInfo(f"{shard}-{row}.{field}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        if shard in damage:
            path.write_bytes(path.read_bytes()[: 3 * 2 * 3 * 512 + 700])


def write_list(folder, sizes):
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        for shard, size in enumerate(sizes):
            for row in range(size):
                (folder / f"{shard}-{row}.png").write_bytes(encoded(shard, row))
                writer.writerow([f"{shard}-{row}.png", caption(shard, row)])


WRITERS = {"parquet": write_parquet, "arrow": write_arrow, "tar": write_tars, "list": write_list}


@pytest.fixture
def write(tmp_path):
    """Writes a data set of shards of so many rows; gives its path."""

    def written(layout, sizes, name="data", **options):
        folder = tmp_path / name
        folder.mkdir()
        WRITERS[layout](folder, sizes, **options)
        return str(folder / "list.csv" if layout == "list" else folder)

    return written


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer("english")


@pytest.fixture
def pairs(tokenizer):
    """A data module on a stream, without a trainer."""

    def made(path, *, batch_size=4, num_workers=0, captions="random", **options):
        data = HuggingFacePairs(
            path, streaming=Streaming(**{"shuffle_window": 8, "open_shards": 2, **options}),
            batch_size=batch_size, num_workers=num_workers, captions=captions, image_size=8,
            tokenizer=tokenizer, seed=3,
        )  # fmt: skip
        data.setup("fit")
        return data

    return made


def windows(stream, rank=0, world_size=1, number=0):
    """All windows of a rank in a pass."""
    from clipkit.data.streaming.reading import Cursor

    present = Pass(number, stream.nothing)
    return list(stream.of_rank(rank, world_size, present).windows(Cursor()))


def captions_of(rows):
    return [text for row in rows for text in row.captions]
