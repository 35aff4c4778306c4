"""Ranks that read a stream of uneven shards: the same number of steps, no sample twice, no hang."""

import itertools

import pytest

from .ranks import assert_even, of_ranks, rows_of

UNEVEN = {
    "more workers than shards": [23],
    "fewer shards than ranks": [30, 17],
    "uneven": [3, 4, 5, 6],
    "one large": [2, 70, 3, 5, 1],
    "seven": [9, 1, 33, 4, 12, 8, 20],
}


def cases(write, layouts, workers, batch=2):
    paths = [
        write(layout, sizes, f"{layout} {name}")
        for layout, (name, sizes) in itertools.product(layouts, UNEVEN.items())
    ]
    return [
        {"path": path, "batch": batch, "workers": number, "epochs": 2}
        for path, number in itertools.product(paths, workers)
    ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_make_the_same_steps(write, tmp_path, world_size):
    listed = cases(write, ["parquet"], [0])[1:4] + cases(write, ["tar"], [2])[:2]
    for case, ranks in zip(listed, of_ranks(world_size, tmp_path / "ranks", listed), strict=True):
        assert_even(ranks)
        assert all(ranks[0]["epochs"]), case
        assert ranks[0]["epochs"][0] != ranks[0]["epochs"][1]


def test_workers_change_nothing(write, tmp_path):
    path = write("parquet", [9, 1, 33])
    listed = [{"path": path, "batch": 4, "epochs": 2, "workers": n} for n in (0, 1, 3)]
    (none,), (one,), (three,) = of_ranks(1, tmp_path / "ranks", listed)
    assert none["epochs"] == one["epochs"] == three["epochs"]
    assert_even([none])


def test_each_rank_has_its_share_of_few_shards(write, tmp_path):
    """Two shards of as many rows, three ranks: all rows but what fills no batch."""
    case = {"path": write("parquet", [30, 30]), "batch": 2}
    (ranks,) = of_ranks(3, tmp_path / "ranks", [case])
    assert_even(ranks)
    assert len(rows_of([rank["epochs"][0] for rank in ranks])) >= 54 - 3 * 2 - 6


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_whole_grid(write, tmp_path, world_size):
    """1 to 7 shards, 0, 2 and 4 workers, every layout."""
    # A rank may have a tar of one row, and none of the others.
    listed = cases(write, ["parquet", "arrow", "tar", "list"], [0, 2, 4], batch=1)
    found = of_ranks(world_size, tmp_path / "ranks", listed)
    for ranks in found:
        assert_even(ranks)
    slowest = max(rank["seconds"] for ranks in found for rank in ranks)
    print(f"{world_size} ranks: {len(listed)} streams, two epochs each, slowest {slowest:.1f} s")
