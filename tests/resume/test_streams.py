"""A run on a stream that ends anywhere and goes on: bit by bit the run that did not end."""

import json

import pytest

from tests.data.streaming.conftest import WRITERS, pairs, tokenizer, windows, write  # noqa: F401
from tests.data.streaming.ranks import assert_even, of_ranks, own_rows
from tests.resume.conftest import Run
from tests.resume.test_kill import (
    EVERY_STEP,
    RANKS,
    assert_goes_on_after_a_kill,
    finish,
    has_logged,
    kill_when,
)
from tests.resume.test_positions import HOOKS, assert_goes_on_alike, fit  # noqa: F401

SIZES = [9, 1, 17, 4, 8]
STREAM = [
    "--data.streaming=true", "--data.streaming.shuffle_window=7", "--data.streaming.open_shards=2",
]  # fmt: skip
PASSES = [*STREAM, "--trainer.max_steps=1000"]
# Longer than a pass, so that each epoch begins and ends within one.
STEPS = [*STREAM, "--data.streaming.steps_per_epoch=11"]


@pytest.fixture
def words(tmp_path):
    def of(layout, options):
        folder = tmp_path / layout
        folder.mkdir()
        WRITERS[layout](folder, SIZES)
        return [f"--data.dataset={folder}", *options]

    return of


@pytest.mark.parametrize("options", [PASSES, STEPS], ids=["passes", "steps"])
def test_the_run_is_the_same(fit, words, options):  # noqa: F811
    given = [*words("parquet", options), "--data.num_workers=1"]
    assert_goes_on_alike(fit, given, [("on_train_batch_end", 0.5), ("on_validation_end", 2 / 3)])


def test_the_run_is_the_same_with_rows_left_out_and_negatives(fit, words):  # noqa: F811
    chosen = [
        "--data.caption_column=id", "--data.filters.max_characters=3",
        "--data.negative_column=caption",
    ]  # fmt: skip
    given = [*words("parquet", PASSES), *chosen]
    assert_goes_on_alike(fit, given, [("on_train_batch_end", 0.5)])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parquet", "arrow", "tar"])
@pytest.mark.parametrize("options", [PASSES, STEPS], ids=["passes", "steps"])
@pytest.mark.parametrize(
    "more",
    [
        [], ["--trainer.accumulate_grad_batches=2", "--data.batch_size=2"],
        ["--trainer.val_check_interval=2"], ["--data.captions=all", "--data.shrink_pictures=true"],
    ],
    ids=["plain", "accumulated", "validated within", "all captions"],
)  # fmt: skip
def test_the_run_is_the_same_in_every_hook(fit, words, layout, options, more):  # noqa: F811
    assert_goes_on_alike(fit, [*words(layout, options), *more], HOOKS)


def test_killed(start, words, workdir):
    before = ["--data.num_workers=2"]
    assert_goes_on_after_a_kill(start, workdir, words("tar", PASSES), steps=12, before=before)


@pytest.mark.slow
@pytest.mark.parametrize("options", [PASSES, STEPS], ids=["passes", "steps"])
def test_two_ranks_killed(start, words, workdir, options):
    given = [*words("parquet", options), *RANKS]
    before = ["--data.num_workers=1"]
    assert_goes_on_after_a_kill(start, workdir, given, steps=7, before=before)


@pytest.mark.slow
def test_killed_and_gone_on_with_on_two_ranks(start, words, workdir):
    given = words("parquet", PASSES)
    folder = workdir / "runs" / "again" / "killed"
    process = start("--run_name=killed", *given, *EVERY_STEP)
    assert kill_when(process, has_logged(folder, 6))
    output = finish(start("--run_name=killed", *given, *RANKS, "--ckpt_path=last"))
    assert "read by 1 ranks and goes on with 2" in output
    assert "none comes again" in output
    assert json.loads((folder / "status.json").read_text())["status"] == "finished"
    assert Run(folder).points


@pytest.fixture
def rows_of_stream(pairs):  # noqa: F811
    """The numbers of all rows that are trained in a pass."""
    return lambda path: {row.number for w in windows(pairs(path).stream()) for row in w.rows}


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2), (2, 1)])
def test_another_number_of_ranks(write, rows_of_stream, tmp_path, before, after):  # noqa: F811
    """None comes again, and what is skipped is what windows had read and not handed out."""
    path = write("parquet", [30, 21, 64, 5, 40])
    case = {"path": path, "batch": 2, "options": {"shuffle_window": 8}}
    listed = [{**case, "stop": [0, stop]} for stop in (1, 4, 9)]
    for stopped in zip(listed, of_ranks(before, tmp_path / "before", listed), strict=True):
        (first, ended) = stopped
        state = ended[0]["state"]
        assert all(rank["state"] == state for rank in ended)
        again = {**case, "start": first["stop"], "state": state, "epochs": 1}
        (gone_on,) = of_ranks(after, tmp_path / f"after {first['stop'][1]}", [again])
        assert_even(gone_on)
        seen = [row for rank in ended for batch in rank["epochs"][0] for row in own_rows(batch)]
        then = [row for rank in gone_on for batch in rank["epochs"][0] for row in own_rows(batch)]
        assert not set(seen) & set(then)
        bound = sum(size - done for _, _, size, done in state["places"] if done)
        assert bound <= before * 8
        # What is left at the end: less than a batch of each rank, and what the others had more.
        left = rows_of_stream(path) - set(seen) - set(then)
        assert len(left) <= bound + after * 2 + 64
