"""kill -9 of a real run, of all its ranks at once, and the same command with --ckpt_path last."""

import json
import os
import random
import signal
import time

import pytest

from tests.resume.conftest import Run

EVERY_STEP = ["--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps=1"]
RANKS = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def steps_logged(run):
    journal = run / "metrics.jsonl"
    lines = journal.read_text().splitlines() if journal.is_file() else []
    return len([line for line in lines if "train/loss" in line])


def has_logged(run, steps):
    return lambda: steps_logged(run) >= steps


def kill_when(process, condition, *, later=0.0):
    """SIGKILL to every process of the run once the condition holds; False where it had ended."""
    deadline = time.monotonic() + 200
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(later)
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    assert running or process.returncode == 0, output
    return running


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def assert_goes_on_after_a_kill(start, workdir, words, *, steps, before=()):
    """A run that is killed and goes on is the one that was not disturbed.

    Args:
        start: starts a fit.
        workdir: where.
        words: of all of them.
        steps: that are logged before it is killed.
        before: further words of the run that is killed.
    """
    finish(start("--run_name=whole", *words))
    folder = workdir / "runs" / "again" / "killed"
    process = start("--run_name=killed", *words, *before, *EVERY_STEP)
    assert kill_when(process, has_logged(folder, steps))
    assert json.loads((folder / "status.json").read_text())["status"] == "unfinished"
    output = finish(start("--run_name=killed", *words, "--ckpt_path=last"))
    assert "going on" in output
    Run(folder).assert_same(Run(workdir / "runs" / "again" / "whole"))


def history_in_mlflow(workdir, name):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{workdir}/mlflow.db")
    experiment = client.get_experiment_by_name("again")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`mlflow.runName` = '{name}'")
    assert run.info.status == "FINISHED"
    points = [
        (key, metric.step, metric.value)
        for key in run.data.metrics
        if not key.startswith("throughput/")
        for metric in client.get_metric_history(run.info.run_id, key)
    ]
    assert len({point[:2] for point in points}) == len(points)
    return set(points)


def test_killed_within_an_epoch(start, workdir):
    """With two workers before and none after; dropout, dropped patches and crops on."""
    assert_goes_on_after_a_kill(start, workdir, [], steps=7, before=["--data.num_workers=2"])
    assert history_in_mlflow(workdir, "killed") == history_in_mlflow(workdir, "whole")


@pytest.mark.slow
def test_two_ranks_killed(start, workdir):
    assert_goes_on_after_a_kill(start, workdir, RANKS, steps=7)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_twenty_kills(start, workdir, ranks, workers):
    """At random moments, from before the first step to after the last; no life is undisturbed."""
    words = [f"--data.num_workers={workers}", *(RANKS if ranks == 2 else [])]
    words += ["--trainer.max_epochs=12"]
    finish(start("--run_name=whole", *words))
    whole = Run(workdir / "runs" / "again" / "whole")
    draw = random.Random(10 * ranks + workers)
    kills = number = 0
    while kills < 20:
        number += 1
        name = f"killed{number}"
        folder = workdir / "runs" / "again" / name
        again = []
        while True:
            process = start(f"--run_name={name}", *words, *EVERY_STEP, *again)
            if kills == 20:
                finish(process)
                break
            done = steps_logged(folder)
            target = done + draw.randint(1, max(2, (whole.steps - done) // 2))
            if not kill_when(process, has_logged(folder, target), later=draw.uniform(0, 0.1)):
                break
            kills += 1
            again = ["--ckpt_path=last"] if list(folder.glob("checkpoints/*.ckpt")) else []
            if not again:
                break  # before its first checkpoint: nothing to go on from
        if list(folder.glob("checkpoints/*.ckpt")):
            Run(folder).assert_same(whole)
            assert history_in_mlflow(workdir, name) == history_in_mlflow(workdir, "whole")
    print(f"{ranks} ranks, {workers} workers: {kills} kills in {number} runs, all bit-equal")


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_another_number_of_ranks(start, workdir, before, after):
    """The same rows in the same order; losses differ by rounding."""
    words = ["--model.text_encoder.dropout=0", "--model.image_encoder.patch_drop_ratio=0"]
    ranks = {1: [], 2: RANKS}
    finish(start("--run_name=whole", *words))
    folder = workdir / "runs" / "again" / "killed"
    process = start("--run_name=killed", *words, *EVERY_STEP, *ranks[before])
    assert kill_when(process, has_logged(folder, 7))
    finish(start("--run_name=killed", *words, *ranks[after], "--ckpt_path=last"))
    whole = Run(workdir / "runs" / "again" / "whole").points
    expected = {(name, step): value for name, step, value in whole}
    found = {(name, step): value for name, step, value in Run(folder).points}
    assert found.keys() == expected.keys()
    for point, value in found.items():
        assert value == pytest.approx(expected[point], abs=1e-4, rel=1e-4), point
    first = min(step for name, step in found if name == "train/loss" and step > 7)
    assert found["train/loss", first] == pytest.approx(expected["train/loss", first], abs=1e-5)
