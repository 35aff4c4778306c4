"""Epochs of a stream; what is left of it when it ends; what is refused."""

import gc
import logging
import multiprocessing
import os
import pickle
import threading
import weakref

import pytest

from clipkit.data import HuggingFacePairs
from clipkit.data.streaming import Streaming
from clipkit.data.streaming.ahead import ReadAhead
from clipkit.data.streaming.reading import Cursor
from clipkit.data.streaming.sampler import Place
from clipkit.data.streaming.state import Pass, StreamState
from clipkit.errors import UserError

from .conftest import windows


def epochs_of(data, number):
    loader = data.train_dataloader()
    for epoch in range(number):
        loader.sampler.set_epoch(epoch)
        yield [batch["rows"].tolist() for batch in loader]


def test_epochs_of_a_fixed_length_go_on(pairs, write, caplog):
    """Two and a half epochs are a pass; the next begins where it ends, which is said once."""
    caplog.set_level(logging.INFO, logger="clipkit")
    path = write("parquet", [30, 25])  # 50 are trained: 12 batches of 4
    data = pairs(path, steps_per_epoch=5)
    assert len(data.train_dataloader()) == 5
    epochs = list(epochs_of(data, 6))
    data.teardown("fit")
    assert [len(epoch) for epoch in epochs] == [5] * 6
    batches = [batch for epoch in epochs for batch in epoch]
    once = pairs(path)
    (first, second) = epochs_of(once, 2)
    once.teardown("fit")
    assert batches[:12] == first
    assert batches[12:24] == second
    assert caplog.text.count("its pairs come again, in another order") == 1
    assert "ended after 12 steps" in caplog.text


def test_augmentation_depends_on_the_row_alone(pairs, write):
    """Not on the window, nor on how many shards are open."""
    path = write("parquet", [30, 25])
    found = []
    for options in ({}, {"shuffle_window": 64, "open_shards": 4}):
        data = pairs(path, batch_size=1, **options)
        found.append(
            {int(b["rows"]): (b["images"].sum().item(), b["tokens"].tolist())
             for b in data.train_dataloader()}
        )  # fmt: skip
        data.teardown("fit")
    assert found[0] == found[1]


def test_every_caption_makes_a_pair(pairs, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from .conftest import encoded

    pictures = [{"bytes": encoded(0, row), "path": None} for row in range(40)]
    texts = [[f"{row} {n}" for n in range(row % 4)] for row in range(40)]
    pq.write_table(pa.table({"image": pictures, "captions": texts}), tmp_path / "a.parquet")
    data = pairs(str(tmp_path), captions="all", batch_size=1)
    rows = [row for w in windows(data.stream()) for row in w.rows]
    data.teardown("fit")
    held = len(data.load("validation"))
    assert held == 4
    found = [text for row in rows for text in row.captions]
    assert len(found) == len(set(found))
    kept = {text for texts in data.load("validation").all_captions() for text in texts}
    assert set(found) == {text for several in texts for text in several} - kept


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "clipkit-stream"]


def open_files():
    return [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", ["parquet", "tar"])
def test_nothing_is_left(pairs, write, workers, layout):
    path = write(layout, [90, 80, 70])
    data = pairs(path, num_workers=workers)
    batches = iter(data.train_dataloader())
    next(batches)
    assert threads()
    data.teardown("fit")
    del batches
    gc.collect()
    assert not threads()
    assert not [name for name in open_files() if name.startswith(path)]
    assert not multiprocessing.active_children() or workers


def test_an_iterator_that_is_dropped_ends_its_thread(pairs, write):
    data = pairs(write("parquet", [90]))
    batches = iter(data.train_dataloader())
    next(batches)
    del batches, data
    gc.collect()
    assert not threads()


def test_two_values_at_a_time():
    class Value:
        pass

    alive = weakref.WeakSet()

    def values():
        for _ in range(20):
            value = Value()
            alive.add(value)
            assert len(alive) <= 2
            yield value
            del value

    reader = ReadAhead(values())
    seen = 0
    for value in reader:
        seen += 1
        del value
    reader.close()
    assert seen == 20


def test_what_fails_ahead_is_raised_where_it_belongs():
    def values():
        yield 1
        raise RuntimeError("broken")

    reader = ReadAhead(values())
    found = iter(reader)
    assert next(found) == 1
    with pytest.raises(RuntimeError, match="broken"):
        next(found)
    reader.close()


def test_what_goes_to_workers_can_be_spawned(pairs, write):
    data = pairs(write("tar", [9, 9]))
    loader = data.train_dataloader()
    batch = [row for w in windows(data.stream()) for row in w.rows][:4]
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    again = collate(dataset.__getitems__(pickle.loads(pickle.dumps(batch))))
    assert again["rows"].tolist() == [row.number for row in batch]


@pytest.mark.slow
def test_spawned_workers(pairs, write, monkeypatch):
    path = write("parquet", [30, 25])
    (expected,) = epochs_of(pairs(path), 1)
    data = pairs(path, num_workers=2)
    loader = data.train_dataloader()
    loader.multiprocessing_context = "spawn"
    assert [batch["rows"].tolist() for batch in loader] == expected
    data.teardown("fit")


def test_what_is_skipped_is_said(pairs, write, caplog):
    caplog.set_level(logging.INFO, logger="clipkit")
    stream = pairs(write("parquet", [30, 25])).stream()
    whole = [windows(stream, rank, 2) for rank in range(2)]
    places = [Place(w[1].start, w[1].end, len(w[1].rows), done) for w, done in
              zip(whole, (3, 5), strict=True)]  # fmt: skip
    state = StreamState.unpacked(StreamState(Pass(0, stream.nothing), places).packed())
    present, place = stream.go_on(state, 0, 1)
    assert "at most 8 rows are skipped, and none comes again" in caplog.text
    before = {row.number for w in whole for window in w[:2] for row in window.rows}
    after = {
        row.number
        for window in stream.of_rank(0, 1, present).windows(place.start)
        for row in window.rows
    }
    assert not before & after
    assert before | after == {row.number for w in windows(stream) for row in w.rows}
    # And once more, with another number of ranks again.
    ahead = windows_of(stream, present, 0, 1)[0]
    again, _ = stream.go_on(StreamState(present, [Place(ahead.start, ahead.end, 8, 2)]), 0, 3)
    rest = {row.number for rank in range(3) for w in windows_of(stream, again, rank, 3)
            for row in w.rows}  # fmt: skip
    assert rest == after - {row.number for row in ahead.rows}


def windows_of(stream, present, rank, world_size):
    return list(stream.of_rank(rank, world_size, present).windows(Cursor()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"streaming": True, "cache_tokens": True}, "data.cache_tokens: True needs"),
        ({"streaming": True, "cache_pictures_gb": 1.0}, "data.cache_pictures_gb: 1.0 needs"),
        ({"streaming": True, "shrink_batch": True}, "data.shrink_batch: True needs"),
    ],
)
def test_what_a_stream_cannot_have(write, tokenizer, options, message):
    data = HuggingFacePairs(write("tar", [9, 9]), image_size=8, tokenizer=tokenizer, **options)
    with pytest.raises(UserError, match=message):
        data.setup("fit")


def test_options_are_above_zero():
    with pytest.raises(UserError, match=r"data.streaming.shuffle_window: 0 is not above 0"):
        Streaming(shuffle_window=0)


def test_a_batch_that_no_pass_fills(pairs, write):
    data = pairs(write("tar", [9, 9]), batch_size=64)
    with pytest.raises(UserError, match=r"data\.batch_size: in a pass through the stream"):
        list(data.train_dataloader())
    data.teardown("fit")


def test_a_run_without_a_length(workdir, command, write, capsys):
    words = ["fit", "-c", "base", "-c", "tiny.yaml", f"--data.dataset={write('tar', [9, 9])}"]
    assert command(*words, "--data.streaming=true") == 2
    error = capsys.readouterr().err
    assert error.startswith("clipkit: trainer.max_steps: nobody knows how long")
    assert error.count("\n") == 1


def test_a_missing_split(write, tokenizer):
    data = HuggingFacePairs(
        write("tar", [9, 9]), streaming=True, train_split="training2", image_size=8,
        tokenizer=tokenizer,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"has no split 'training2'; it has: train"):
        data.setup("fit")
