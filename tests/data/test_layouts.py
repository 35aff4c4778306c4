"""Every way of keeping pictures with captions is read alike, and what is wrong is said."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.data.images import decode_image
from clipkit.data.layouts import open_layout
from clipkit.data.rows import Rows, group_by_picture, hold_out
from clipkit.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data"
COLORS = {"blue ball": (0, 0, 255), "gelbe Tür": (255, 255, 0), "red_car": (255, 0, 0)}


class Pair(NamedTuple):
    file: str  # its name, in the order of the pairs
    png: bytes
    label: str

    @property
    def caption(self) -> str:
        return f"a photo of a {self.label.replace('_', ' ')}."


def draw(label: str, number: int) -> bytes:
    pixels = np.full((6, 8, 3), COLORS[label], np.uint8)
    pixels[number % 6, number % 8] = number
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    labels = [label for label in sorted(COLORS) for _ in range(67)][:200]
    return [
        Pair(f"{label} {n:03d}.{'PNG' if n % 9 == 0 else 'png'}", draw(label, n), label)
        for n, label in enumerate(labels)
    ]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_images(root: Path, pairs: list[Pair]) -> Path:
    for pair in pairs:
        write(root / pair.file, pair.png)
    return root


def write_csv(path: Path, rows: list[list[str]], separator: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=separator).writerows(rows)
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def as_parquet(root: Path, pairs: list[Pair]) -> Path:
    root.mkdir()
    images = [{"bytes": pair.png, "path": pair.file} for pair in pairs]
    table = pa.table({"image": images, "caption": [pair.caption for pair in pairs]})
    pq.write_table(table[:150], root / "train-00000-of-00002.parquet", row_group_size=40)
    pq.write_table(table[150:], root / "train-00001-of-00002.parquet")
    return root


def as_metadata(root: Path, pairs: list[Pair]) -> Path:
    write_images(root, pairs)
    write_csv(
        root / "metadata.csv",
        [["file_name", "text"], *([pair.file, pair.caption] for pair in pairs)],
    )
    return root


def as_jsonl(root: Path, pairs: list[Pair]) -> Path:
    write_images(root / "train", pairs)
    lines = [json.dumps({"file_name": p.file, "captions": [p.caption]}) for p in pairs]
    write(root / "train" / "metadata.jsonl", "\n".join(lines))
    return root


def as_text_files(root: Path, pairs: list[Pair]) -> Path:
    write_images(root, pairs)
    for pair in pairs:
        write(root / Path(pair.file).with_suffix(".txt"), pair.caption + "\n")
    return root


def as_class_folders(root: Path, pairs: list[Pair]) -> Path:
    for pair in pairs:
        write(root / pair.label / pair.file, pair.png)
    return root


def as_csv(root: Path, pairs: list[Pair]) -> Path:
    write_images(root / "pictures", pairs)
    rows = [[f"pictures/{pair.file}", pair.caption] for pair in pairs]
    return write_csv(root / "list.csv", [["filepath", "title"], *rows], ";")


def as_tar(root: Path, pairs: list[Pair]) -> Path:
    for number in range(4):
        members = []
        for pair in pairs[number * 50 : number * 50 + 50]:
            name, kind = os.path.splitext(pair.file)
            members += [(name + kind, pair.png), (name + ".txt", pair.caption.encode())]
        write_tar(root / f"shards-{number:03d}.tar", members)
    return root / "shards-{000..003}.tar"


def as_saved(root: Path, pairs: list[Pair]) -> Path:
    import datasets

    rows = {
        "image": [{"bytes": pair.png, "path": pair.file} for pair in pairs],
        "caption": [pair.caption for pair in pairs],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(str(root))
    return root


LAYOUTS = [
    as_parquet,
    as_metadata,
    as_jsonl,
    as_text_files,
    as_class_folders,
    as_csv,
    as_tar,
    as_saved,
]


def pixels(rows: Rows) -> list[bytes]:
    return [decode_image(rows.image(i)).tobytes() for i in range(len(rows))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_pairs_in_every_layout(
    layout: Callable[[Path, list[Pair]], Path], pairs: list[Pair], tmp_path: Path
) -> None:
    found = open_layout(str(layout(tmp_path / "data", pairs)))
    rows = found.split("train")
    stems = [os.path.splitext(pair.file)[0] for pair in pairs]
    assert list(found.splits) == ["train"]
    assert rows.keys() == stems == [row.key for row in rows]
    assert [row.captions for row in rows] == [[pair.caption] for pair in pairs]
    assert list(rows.all_captions()) == [[pair.caption] for pair in pairs]
    assert pixels(rows) == [decode_image(pair.png).tobytes() for pair in pairs]
    train, validation = hold_out(rows)
    assert len(validation) == 10
    # Written down, so that a change of the hash, which would move pictures across, is noticed.
    assert validation.keys()[:2] == ["blue ball 023", "blue ball 029"]
    assert sorted(train.keys() + validation.keys()) == stems
    copy = pickle.loads(pickle.dumps(validation))
    assert pixels(copy) == pixels(validation)
    assert "200 pairs" in found.describe()
    assert found.fingerprint == open_layout(str(tmp_path / "data")).fingerprint
