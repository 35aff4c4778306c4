"""Trains as well: the statistic, and both loops in a short form."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.models import has_peers_training
from benchmarks.trains_as_well import difference, verdict

THEIRS, OURS = [40.1, 41.3, 39.5, 42.0, 40.6], [40.4, 40.2, 41.9, 41.1, 42.2]


def test_both_intervals_are_students():
    stats = pytest.importorskip("scipy.stats")
    found = difference({"open_clip": THEIRS, "clipkit": OURS})
    welch = stats.ttest_ind(OURS, THEIRS, equal_var=False).confidence_interval()
    paired = stats.ttest_rel(OURS, THEIRS).confidence_interval()
    assert found["welch"] == pytest.approx([welch.low, welch.high], abs=2e-3)
    assert found["paired"] == pytest.approx([paired.low, paired.high], abs=2e-3)


def test_the_claim_rests_on_the_lower_ends():
    assert verdict(difference({"open_clip": THEIRS, "clipkit": OURS})) is True
    worse = [value - 2.5 for value in OURS]
    assert verdict(difference({"open_clip": THEIRS, "clipkit": worse})) is False
    assert verdict(difference({"open_clip": THEIRS[:1], "clipkit": OURS[:1]})) is None


@pytest.mark.slow
def test_a_short_form_runs_and_goes_on(tmp_path, shared_data):
    if not has_peers_training():
        pytest.skip("open_clip's training loop wants webdataset (extra peers)")
    root = Path(__file__).parents[2]
    words = [sys.executable, "-m", "benchmarks.trains_as_well", "--epochs=1", "--limit=48"]
    words += ["--batch=16", "--threads=1", f"--work={tmp_path}", f"--output={tmp_path}/found.json"]
    words += [f"--data={shared_data}"]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for seeds in (1, 2):
        done = subprocess.run(
            [*words, f"--seeds={seeds}"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": kept from") == 2
    found = json.loads((tmp_path / "found.json").read_text())
    assert {side: len(values) for side, values in found["scores"].items()} == {
        "open_clip": 2, "clipkit": 2,
    }  # fmt: skip
    assert all(0 <= value <= 100 for values in found["scores"].values() for value in values)
    with (tmp_path / "train.tsv").open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["filepath", "title"]
    assert len(rows) == 49
