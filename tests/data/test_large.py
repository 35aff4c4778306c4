"""Large data sets: what is read before the first step, what memory and disk they take."""

from __future__ import annotations

import csv
import gc
import io
import logging
import os
import tarfile
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.data import HuggingFacePairs, progress
from clipkit.data.layouts import open_layout
from clipkit.data.rows import hold_out
from clipkit.errors import UserError

COUNT = 20_000
BYTES = 6_000  # of a picture


def picture_of(row: int) -> bytes:
    return np.random.default_rng(row).bytes(BYTES)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rows as parquet, which pyarrow writes by default, and as tar; 120 MB each."""
    root = tmp_path_factory.mktemp("large")
    names = [f"{row:06d}" for row in range(COUNT)]
    pictures = [picture_of(row) for row in range(COUNT)]
    images = [{"bytes": p, "path": f"{n}.jpg"} for n, p in zip(names, pictures, strict=True)]
    captions = [f"the caption of {name}" for name in names]
    table = pa.table({"image": images, "caption": captions})
    pq.write_table(table[:15_000], root / "train-0.parquet", row_group_size=6000)
    pq.write_table(table[15_000:], root / "train-1.parquet")
    for shard in range(4):
        with tarfile.open(root / f"train-{shard}.tar", "w") as archive:
            for row in range(shard * COUNT // 4, (shard + 1) * COUNT // 4):
                for kind, content in (("jpg", pictures[row]), ("txt", captions[row].encode())):
                    member = tarfile.TarInfo(f"{names[row]}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return {kind: f"{root}/*.{kind}" for kind in ("parquet", "tar")}


def counted(file: str, name: str) -> int:
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def test_opening_reads_no_pictures_and_nothing_is_written(
    large: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for pattern in large.values():
        before = counted("io", "rchar")
        found = open_layout(pattern)
        rows = found.split("train")
        # The headers of the tars are 512 bytes for each 6,000, and as much goes for the text.
        assert counted("io", "rchar") - before < COUNT * BYTES / 4
        assert len(rows) == COUNT
        order = np.random.default_rng(0).permutation(COUNT)[:2000].tolist()
        assert all(rows.image(row) == picture_of(row) for row in order)
        assert rows.captions(COUNT - 1) == ["the caption of 019999"]
    assert list(tmp_path.rglob("*")) == []


def test_memory_does_not_grow_with_what_was_read(large: dict[str, str]) -> None:
    for pattern in large.values():
        rows = open_layout(pattern).split("train")
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        before = counted("status", "VmRSS")
        for row in np.random.default_rng(0).permutation(COUNT).tolist():
            assert len(rows.image(row)) == BYTES
        assert counted("status", "VmHWM") - before < 50_000  # kB, of 120,000


def test_a_digest_is_equal_for_equal_rows(large: dict[str, str], tmp_path: Path) -> None:
    digests = {open_layout(pattern).fingerprint for pattern in large.values()}
    assert len(digests) == 1
    table = pa.table({"image": [picture_of(0), b"x"], "id": [1, 2], "caption": ["a", "b"]})
    changed = {"image": [picture_of(1), b"x"], "id": [1, 3], "caption": [" a ", "c"]}
    found = []
    for columns in ({}, *({name: changed[name]} for name in changed)):
        for name, values in columns.items():
            table = table.set_column(table.column_names.index(name), name, pa.array(values))
        pq.write_table(table, tmp_path / "a.parquet")
        found.append(open_layout(str(tmp_path / "a.parquet")).fingerprint)
    assert len(set(found)) == 4


def test_sizes_are_looked_at_where_keys_repeat(tmp_path: Path) -> None:
    """Rows 0 and 1 share a name but no size; the others' row groups are not read for it."""
    count = 3000
    paths = ["same.jpg", "same.jpg", *(f"{row}.jpg" for row in range(2, count))]
    images = [{"bytes": picture_of(row)[row:], "path": path} for row, path in enumerate(paths)]
    table = pa.table({"image": images, "id": range(count), "caption": ["a"] * count})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    before = counted("io", "rchar")
    keys = open_layout(str(tmp_path / "a.parquet")).split("train").keys()
    assert keys == [str(row) for row in range(count)]
    assert counted("io", "rchar") - before < count * BYTES / 5


def test_what_is_held_out_is_decided_by_keys_alone(large: dict[str, str]) -> None:
    rows = open_layout(large["parquet"]).split("train")
    train, validation = hold_out(rows)
    expected = sorted(rows.keys(), key=lambda key: blake2b(key.encode(), digest_size=8).digest())
    assert sorted(validation.keys()) == sorted(expected[:1000])
    data = HuggingFacePairs(large["tar"])
    assert data.load("validation").keys() == validation.keys()
    assert data.load("train").keys() == train.keys()


def test_rows_without_a_picture_are_found_by_footers_or_levels(tmp_path: Path) -> None:
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images: list[dict[str, object] | None] = [
        {"bytes": picture_of(row), "path": f"{row}.jpg"} for row in range(400)
    ]
    images[7], images[301] = None, {"bytes": None, "path": "gone.jpg"}
    table = pa.table({"image": pa.array(images, struct), "caption": ["a"] * 400})
    for statistics in (True, False):
        pq.write_table(
            table, tmp_path / "a.parquet", write_statistics=statistics, row_group_size=100
        )
        found = open_layout(str(tmp_path / "a.parquet"))
        assert len(found.split("train")) == 398
        assert "2 of 400 pairs without a picture (row 8, row 302)" in found.describe()


# --- Nothing outside of the folders that were named --------------------------------------------


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """A folder of lists, and pictures beside it."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "pictures").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path / "lists"


def write_list(path: Path, names: list[str]) -> str:
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            csv.writer(stream).writerows([["file", "caption"], *([name, "x"] for name in names)])
    elif "struct" in path.name:
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        images = pa.array([{"bytes": None, "path": name} for name in names], kind)
        pq.write_table(pa.table({"image": images, "caption": ["x"] * len(names)}), path)
    else:
        pq.write_table(pa.table({"file": names, "caption": ["x"] * len(names)}), path)
    return str(path)


@pytest.mark.parametrize("name", ["list.csv", "list.parquet", "struct.parquet"])
def test_lists_name_pictures_of_their_folder(name: str, lists: Path) -> None:
    pictures = lists.parent / "pictures"
    for outside in ("../pictures/a.png", str(pictures / "a.png"), "x/../../pictures/a.png"):
        path = write_list(lists / name, [outside, "../pictures/b.png"])
        with pytest.raises(UserError) as caught:
            open_layout(path)
        message = str(caught.value)
        assert f"{name} names '{outside}', which lies outside of '{lists}'" in message
        assert "name the folder that holds them all with data.image_folder" in message
        for folder in (lists.parent, pictures):
            if folder == lists.parent and outside[0] != "/":
                continue  # relative to another folder, these lead elsewhere
            path = write_list(lists / name, [str(pictures / "a.png"), str(pictures / "b.png")])
            rows = open_layout(path, image_folder=str(folder)).split("train")
            assert [rows.image(0), rows.image(1)] == [str(pictures / f"{n}.png") for n in "ab"]
    rows = open_layout(write_list(lists / name, ["a.png", "b.png"]), image_folder=str(pictures))
    assert rows.split("train").image(1) == str(pictures / "b.png")
    with pytest.raises(UserError, match=r"data.image_folder 'nowhere' is no folder"):
        open_layout(path, image_folder="nowhere")


def test_links_of_the_folder_are_followed(lists: Path) -> None:
    (lists / "linked").symlink_to(lists.parent / "pictures", target_is_directory=True)
    rows = open_layout(write_list(lists / "list.csv", ["linked/a.png", "./linked/b.png"]))
    assert os.path.isfile(rows.split("train").image(1))
    # Behind a link `..` would be the folder that it leads to.
    write_list(lists / "list.csv", ["linked/../../pictures/a.png"])
    with pytest.raises(UserError, match="lies outside of"):
        open_layout(str(lists / "list.csv"))


# --- Progress -----------------------------------------------------------------------------------


def test_a_long_preparation_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert list(progress.progress(range(3), "counting", 3, "number")) == [0, 1, 2]
        assert not caplog.records
        monkeypatch.setattr(progress, "_SECONDS", 0.0)
        assert list(progress.progress(range(1500), "counting", 1500, "number"))[-1] == 1499
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "data: counting, 1 of 1,500 numbers so far"
