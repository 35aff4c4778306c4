"""Hostile files import, run, read and write nothing that they should not, and cost little."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.hostile import alone
from tests.hostile.crafted import CASES
from tests.hostile.running import meet, place_of
from tests.hostile.watching import watched

ROOT = Path(__file__).parents[2]

cases = pytest.mark.parametrize("name", CASES)


@cases
def test_the_first_commands_that_meet_a_hostile_file(
    name, tmp_path, whole_checkpoint, pictures, mlflow_template, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/inside/mlflow.db")
    place = place_of(tmp_path, whole_checkpoint, pictures, TINY)
    (place.inside / "mlflow.db").write_bytes(mlflow_template.read_bytes())
    for words in _first_doors(CASES[name](place)):
        ending = meet(place, words)
        assert not ending.complaints, f"{words}: {ending}"


def _first_doors(doors):
    """`load` for checkpoints, which all commands read alike; one file of what has other doors."""
    loads = [words for words in doors if words[0] == "load"]
    return loads[:6] or doors[:1]


@pytest.mark.slow
@cases
def test_every_command_in_a_process_of_its_own(name, tmp_path, whole_checkpoint, pictures):
    words = [sys.executable, "-m", alone.__name__, name, str(tmp_path / "place")]
    process = subprocess.run(
        [*words, str(whole_checkpoint), str(pictures)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"RUST_BACKTRACE": "0"},
        check=False,
    )
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    begun = [line["begins"] for line in lines if "begins" in line]
    ended = [line for line in lines if "words" in line]
    assert process.returncode == 0, f"crash or hang at {begun[-1:]}: {process.stderr[-2000:]}"
    assert begun
    assert len(ended) == len(begun)
    wrong = [line for line in ended if line["complaints"]]
    assert not wrong, json.dumps(wrong, indent=1)


# --- The watch sees what it is there to see ------------------------------------------------------


def place_with_bait(tmp_path):
    place = place_of(tmp_path, tmp_path / "none.ckpt", tmp_path / "none", TINY)
    return place.inside, place.outside


def test_the_watch_sees_files_imports_and_processes(tmp_path, monkeypatch):
    inside, outside = place_with_bait(tmp_path)
    monkeypatch.syspath_prepend(str(inside))
    with watched(inside, outside) as crimes:
        (inside / "harmless.txt").write_text("")
        (outside / "secret.txt").read_text()
        (outside / "new").mkdir()
        subprocess.run(["true"], check=True)
        __import__("evil")
    del sys.modules["evil"]
    text = "\n".join(crimes)
    assert "secret.txt" in text
    assert "os.mkdir" in text
    assert "subprocess.Popen true" in text
    assert "imports evil" in text
    assert "runs code of" in text
    assert "harmless" not in text


def test_the_watch_sees_what_a_library_in_c_opens(tmp_path):
    import pyarrow as pa

    inside, outside = place_with_bait(tmp_path)
    with watched(inside, outside) as crimes:
        pa.OSFile(str(outside / "secret.json")).read()
    assert [crime for crime in crimes if crime.startswith("touches") and "secret.json" in crime]


def test_the_watch_sees_who_asks_the_hub_and_lets_nobody_out(tmp_path, monkeypatch):
    import huggingface_hub
    import transformers

    # No pauses between its attempts, and no attempt more than one.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for fetch in (
        lambda: huggingface_hub.hf_hub_download("evil/tower", "config.json"),
        lambda: huggingface_hub.snapshot_download("evil/tower"),
        lambda: transformers.AutoConfig.from_pretrained("evil/tower"),
    ):
        place = place_with_bait(tmp_path / str(id(fetch)))
        # The hub's errors differ by version, and are all such.
        with watched(*place) as crimes, suppress(OSError):
            fetch()
        assert [crime for crime in crimes if crime.startswith("socket.")]
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_quiet_command_is_no_criminal(tmp_path):
    inside, outside = place_with_bait(tmp_path)
    with watched(inside, outside) as crimes:
        (inside / "a.txt").write_text("a")
    assert crimes == []
