"""`clipkit sweep`: the grid, one process a run, what is finished and what fails."""

import os
from pathlib import Path

import pytest

from clipkit.errors import UserError
from clipkit.sweep import combinations


def test_every_combination_once_in_the_order_given():
    grid = combinations(["model.loss=A,B", "data.augment={scale: [0.9, 1]},false"], 2)
    assert len(grid) == len(set(map(tuple, grid))) == 8
    assert grid[0] == [
        "--model.loss=A", "--data.augment={scale: [0.9, 1]}", "--seed_everything=0",
    ]  # fmt: skip
    assert grid[1][-1] == "--seed_everything=1"
    assert grid[-1] == ["--model.loss=B", "--data.augment=false", "--seed_everything=1"]


@pytest.mark.parametrize(
    ("over", "seeds", "part"),
    [
        (["model.loss"], 1, "KEY=VALUE1,VALUE2"),
        (["model.loss=A,,B"], 1, "KEY=VALUE1,VALUE2"),
        (["a=1", "a=2"], 1, "given twice"),
        (["seed_everything=1,2"], 1, "seed_everything is given twice"),
        ([], 0, "--seeds: 0"),
    ],
)
def test_mistakes(over, seeds, part):
    with pytest.raises(UserError, match=part):
        combinations(over, seeds)


def test_a_failed_run_does_not_end_the_rest_and_finished_ones_are_skipped(
    workdir, pictures, command, capfd
):
    sweep = [
        *("sweep", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures),
        *("--over", "data.batch_size=9999,8", "--group", "sizes"),
    ]
    assert command(*sweep, "--print") == 0
    printed = capfd.readouterr().out.splitlines()
    assert len(printed) == 2
    assert all(line.startswith("clipkit fit -c base -c tiny.yaml") for line in printed)
    assert command(*sweep) == 1
    said = capfd.readouterr().out
    assert "1 of 2 runs failed" in said
    assert "data.batch_size: 9999 is more than" in said
    (finished,) = Path("runs").rglob("status.json")
    assert finished.parent.name == "pictures-batch_size=8-seed_everything=0"
    from mlflow.tracking import MlflowClient

    mlflow = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("tiny").experiment_id])
    assert run.data.tags["clipkit.group"] == "sizes"
    assert command(*sweep, "--print") == 0
    assert [line for line in capfd.readouterr().out.splitlines() if "batch_size=8" in line] == []


def test_a_mistake_of_every_run_is_said_once(workdir, pictures, command, capsys):
    sweep = ["sweep", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures]
    assert command(*sweep, "--over", "model.los=A,B") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path("runs").exists()
