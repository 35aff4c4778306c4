"""Every row of a stream once a pass, in an order that (seed, pass, rank) decide."""

import io
import itertools
import tarfile

import pytest

from clipkit.data.layouts import open_layout
from clipkit.data.streaming.opening import open_stream
from clipkit.data.streaming.reading import SHARD_CANNOT_BE_READ
from clipkit.data.streaming.state import Pass
from clipkit.errors import UserError

from .conftest import caption, captions_of, encoded, windows

SIZES = [3, 4, 5, 6, 40]


def every_caption(sizes):
    return {caption(shard, row) for shard, size in enumerate(sizes) for row in range(size)}


def held_out(data):
    return {text for row in data.load("validation") for text in row.captions}


@pytest.mark.parametrize("layout", ["parquet", "arrow", "tar", "list"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_row_once_a_pass(write, pairs, layout, world_size):
    data = pairs(write(layout, SIZES))
    stream = data.stream()
    passes = []
    for number in range(2):
        read = [
            text
            for rank in range(world_size)
            for window in windows(stream, rank, world_size, number)
            for text in captions_of(window.rows)
        ]
        assert len(read) == len(set(read))
        assert set(read) == every_caption(SIZES) - held_out(data)
        passes.append(read)
    assert passes[0] != passes[1]
    assert len(held_out(data)) == sum(SIZES) // 10


@pytest.mark.parametrize("layout", ["parquet", "arrow", "tar", "list"])
def test_the_same_from_any_window_on(write, pairs, layout):
    stream = pairs(write(layout, SIZES)).stream()
    for rank in range(3):
        whole = windows(stream, rank, 3)
        reader = stream.of_rank(rank, 3, Pass(0, stream.nothing))
        for place, window in enumerate(whole):
            again = list(reader.windows(window.start))
            assert again == whole[place:]


def test_rows_are_shuffled_within_windows(write, pairs):
    stream = pairs(write("parquet", [400])).stream()
    first, second = windows(stream), windows(stream, number=1)
    numbers = [[row.number for row in window.rows] for window in first]
    assert all(len(window) == 8 for window in numbers[:-1])
    assert any(window != sorted(window) for window in numbers)
    assert numbers != [[row.number for row in window.rows] for window in second]


def test_windows_are_bounded_in_bytes(write, pairs, monkeypatch):
    stream = pairs(write("parquet", [40])).stream()
    reader = stream.of_rank(0, 1, Pass(0, stream.nothing))
    reader._window_bytes = 300
    from clipkit.data.streaming.reading import Cursor

    for window in itertools.islice(reader.windows(Cursor()), 3):
        sizes = [len(row.picture) for row in window.rows]
        assert sum(sizes) - max(sizes) < 300


@pytest.mark.parametrize("layout", ["parquet", "arrow", "tar"])
def test_a_shard_that_ends_early(write, pairs, layout):
    """The rows before its end come, then one row that says so, and the other shards."""
    data = pairs(write(layout, [6, 6, 6, 6], damage=[2]))
    for world_size in (1, 3):
        rows = [
            row
            for rank in range(world_size)
            for window in windows(data.stream(), rank, world_size)
            for row in window.rows
        ]
        faulty = [row for row in rows if row.fault is not None and "train-002" in row.key]
        assert [row.fault[0] for row in faulty] == [SHARD_CANNOT_BE_READ]
        read = {text for row in rows for text in row.captions}
        others = {text for text in every_caption([6, 6, 6, 6]) if "shard 2" not in text}
        assert others - held_out(data) <= read
        if layout == "tar":  # its first two samples are whole
            assert {caption(2, 0), caption(2, 1)} - held_out(data) <= read


def test_layouts_agree(write, pairs):
    """The same rows and captions, and the same keys where these are names."""
    found = {
        layout: {text for w in windows(pairs(write(layout, SIZES, layout)).stream())
                 for text in captions_of(w.rows)}
        for layout in ("parquet", "arrow", "tar")
    }  # fmt: skip
    assert found["parquet"] == found["arrow"] == found["tar"]


def test_samples_whose_files_stand_apart_are_refused(tmp_path):
    path = tmp_path / "train.tar"
    with tarfile.open(path, "w") as archive:
        for field, content in (("png", encoded(0, 0)), ("txt", b"a picture")):
            for row in range(70):
                member = tarfile.TarInfo(f"{row}.{field}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert len(open_layout(str(path)).splits["train"]) == 70
    with pytest.raises(UserError, match="in a stream the files of a sample must stand together"):
        open_stream(str(path))
