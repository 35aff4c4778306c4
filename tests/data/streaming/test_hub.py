"""What `datasets` streams, as a data set of the hub would come: the same rows from its shards."""

import io
import json

import pytest

from clipkit.data.layouts.request import Request
from clipkit.data.streaming import Streaming, opening
from clipkit.data.streaming.opening import stream_of_hub
from clipkit.data.streaming.reading import SHARD_CANNOT_BE_READ, Cursor
from clipkit.data.streaming.state import Pass
from clipkit.data.streaming.stream import Stream
from clipkit.errors import UserError

from .conftest import captions_of, windows

SIZES = [30, 70, 20]
PATTERNS = {"parquet": "*.parquet", "webdataset": "*.tar", "arrow": "*.arrow"}


@pytest.fixture
def streamed(write, monkeypatch, pairs):
    """A data module that finds at an id what lies in local files."""
    import datasets

    def made(builder, sizes, **options):
        layout = {"webdataset": "tar"}.get(builder, builder)
        folder = write(layout, sizes, f"local {builder}", **options.pop("damage", {}))
        loaded = datasets.load_dataset(
            builder, data_files=f"{folder}/{PATTERNS[builder]}", streaming=True
        )
        monkeypatch.setattr(opening, "_load", lambda request: loaded)
        return pairs("somebody/pictures", **options), folder

    return made


@pytest.mark.parametrize("builder", PATTERNS)
def test_the_rows_are_those_of_the_files(streamed, pairs, builder):
    data, folder = streamed(builder, SIZES)
    stream, local = data.stream(), pairs(folder).stream()
    assert len(stream.shards) == 3
    assert "data set of the hub, streamed" in data.describe()
    for world_size in (1, 2, 4):
        read = [
            row
            for rank in range(world_size)
            for window in windows(stream, rank, world_size)
            for row in window.rows
        ]
        numbers = [row.number for row in read]
        assert len(numbers) == len(set(numbers))
        expected = {text for w in windows(local) for text in captions_of(w.rows)}
        assert set(captions_of(read)) == expected
        assert all(isinstance(row.picture, bytes) for row in read)
    reader = stream.of_rank(0, 2, Pass(0, stream.nothing))
    whole = list(reader.windows(Cursor()))
    assert list(reader.windows(whole[1].start)) == whole[1:]
    assert next(iter(data.train_dataloader()))["images"].shape == (4, 3, 8, 8)


def test_a_connection_that_is_lost(streamed, monkeypatch):
    """It is tried again, from the row on where it was lost; in the end the shard is given up."""
    from clipkit.data.streaming import reading
    from clipkit.data.streaming.shards import HubShard

    monkeypatch.setattr(reading.time, "sleep", lambda seconds: None)
    data, _ = streamed("parquet", [90, 90], shuffle_window=16)
    stream = data.stream()
    whole = windows(stream)
    chunks = HubShard.chunks
    lost = []

    def unsteady(shard, first):
        for number, chunk in enumerate(chunks(shard, first)):
            if number == 1 and len(lost) < times:
                lost.append(first)
                raise ConnectionError("reset by peer")
            yield chunk

    monkeypatch.setattr(HubShard, "chunks", unsteady)
    times = 2
    assert windows(stream) == whole
    assert lost
    monkeypatch.setattr(HubShard, "chunks", lambda shard, first: chunks(shard, first) if first == 0
                        and shard._number == 0 else _fail())  # fmt: skip
    rows = [row for window in windows(stream) for row in window.rows]
    assert [row.fault[0] for row in rows if row.fault] == [SHARD_CANNOT_BE_READ]
    assert len({row.number for row in rows}) > 80


def hub_of_addresses(monkeypatch, rows, failures):
    """A shard of which one row names its picture's address; opening that fails so many times."""
    import datasets
    from datasets.utils import file_utils

    def generated():
        for row in range(rows):
            address = {"bytes": None if row == 6 else b"%d" % row, "path": f"hf://x/{row}"}
            yield {"image": address, "caption": f"c{row}"}

    class LostError(Exception):
        """No OSError, as those of the hub's client are none."""

    def opened(address, mode):
        tried.append(address)
        if len(tried) <= failures:
            raise LostError("network is down")
        return io.BytesIO(b"late")

    tried = []
    monkeypatch.setattr(file_utils, "xopen", opened)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    loaded = datasets.IterableDataset.from_generator(generated, features=kinds)
    return stream_of_hub(Request(path="somebody/x"), {"train": loaded}), tried


@pytest.mark.parametrize("failures", [1, 3, 4])
def test_a_picture_that_does_not_come_at_once(monkeypatch, failures):
    """It is asked for again, is that row's fault in the end, and doubles no other."""
    streamed, tried = hub_of_addresses(monkeypatch, 10, failures)
    rows = [row for window in windows(_stream(streamed)) for row in window.rows]
    assert sorted(row.row for row in rows) == list(range(10))
    assert len(tried) == min(failures + 1, 4)
    broken = [row for row in rows if row.fault]
    if failures < 4:
        assert not broken
        assert next(row.picture for row in rows if row.row == 6) == b"late"
    else:
        assert [(row.shard, row.row) for row in broken] == [("shard 0 of 1", 6)]
        assert "network is down" in broken[0].fault[1]


def test_what_was_handed_out_does_not_come_again(monkeypatch):
    """Where a shard fails in the middle of what it gives."""
    from clipkit.data.streaming import reading

    failed = []
    streamed, _ = hub_of_addresses(monkeypatch, 10, 0)
    made_of = reading.made_of

    def unsteady(chunk, place, shard, number):
        if chunk.first + place == 5 and len(failed) < 2:
            failed.append(place)
            raise ConnectionError("reset by peer")
        return made_of(chunk, place, shard, number)

    monkeypatch.setattr(reading, "made_of", unsteady)
    rows = [row for window in windows(_stream(streamed)) for row in window.rows]
    assert len(failed) == 2
    assert sorted(row.row for row in rows) == list(range(10))


def _stream(streamed):
    return Stream(streamed.splits["train"], Streaming(), seed=0)


def _fail():
    raise ConnectionError("no route to host")


def test_paths_without_pictures_are_refused(tmp_path):
    import datasets

    file = tmp_path / "list.jsonl"
    file.write_text("".join(json.dumps({"image": f"{n}.png", "text": "x"}) + "\n" for n in "123"))
    loaded = datasets.load_dataset("json", data_files=str(file), streaming=True)
    with pytest.raises(UserError, match="holds paths, and the pictures themselves do not come"):
        stream_of_hub(Request(path="somebody/list"), loaded)


def test_no_hub(pairs):
    with pytest.raises(UserError, match=r"data.dataset 'nobody/nothing'.*the hub cannot give"):
        pairs("nobody/nothing")


@pytest.mark.parametrize("address", ["file:///etc/passwd", "/etc/passwd", "zip://a::/etc/passwd"])
def test_addresses_lead_to_the_hub_alone(address):
    import pyarrow as pa

    from clipkit.data.streaming.shards import TableChunk

    table = pa.table({"image": [{"bytes": None, "path": address}]})
    with pytest.raises(OSError, match="no address on the hub"):
        TableChunk(table, "image", {}, None).image(0)
