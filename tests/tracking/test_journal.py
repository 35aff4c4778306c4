"""metrics.jsonl: what it holds, who may write it, what a full disk and a kill leave of it."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from clipkit.errors import UserError
from clipkit.tracking.journal import Journal
from clipkit.tracking.journal_file import JournalFile, lines_after, points_after
from clipkit.tracking.locks import is_held


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_is_strict_json_and_waits_for_its_folder(tmp_path):
    log = Journal()
    log.log_metrics({"a/b": float("nan"), "epoch": 0}, step=3)
    log.open(JournalFile(tmp_path))
    log.log_metrics({"a/b": 1.0}, step=4)
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in text)
    assert (first["a/b"], first["epoch"], first["step"]) == ("nan", 0, 3)
    assert second["a/b"] == 1.0
    log.finalize("success")


def test_a_line_is_one_write(tmp_path, monkeypatch):
    journal = JournalFile(tmp_path)
    calls = []
    for name in ("write", "open", "fsync", "close"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    for step in range(10):
        journal.append({"train/loss": 0.1 * step, "epoch": 0}, step)
    monkeypatch.undo()
    assert calls == ["write"] * 10
    assert len(lines(tmp_path)) == 10


def test_the_same_by_the_next_logger_stands_there_once(tmp_path):
    journal = JournalFile(tmp_path)
    for _ in range(2):
        journal.append({"a": float("nan"), "epoch": 0}, 1)
    journal.append({"a": 2.0, "epoch": 0}, 1)
    journal.append({"a": 2.0, "epoch": 0}, 2)
    assert [(line["step"], line["a"]) for line in lines(tmp_path)] == [
        (1, "nan"), (1, 2.0), (2, 2.0),
    ]  # fmt: skip


# --- Continued -----------------------------------------------------------------------------------


def test_continued_it_mends_its_end_and_repeats_nothing(tmp_path):
    first = JournalFile(tmp_path)
    for step in range(5):
        first.append({"train/loss": float(step), "epoch": 0}, step)
    first.append({"val/loss": 9.0}, 3)
    first.close()
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + b'{"time": 1.5, "step": 5, "train/lo')
    assert points_after(file) == 6
    second = JournalFile(tmp_path, continued=True)
    for step in range(3, 7):
        second.append({"train/loss": float(step), "new": 1.0, "epoch": 0}, step)
    second.append({"val/loss": 9.0}, 3)
    second.append({"val/loss": 8.0}, 6)
    assert [(name, line.step, value) for line in lines_after(file) for name, value in
            line.values.items()] == [
        *(("train/loss", step, float(step)) for step in range(5)),
        ("val/loss", 3, 9.0),
        ("new", 3, 1.0), ("new", 4, 1.0),
        ("train/loss", 5, 5.0), ("new", 5, 1.0),
        ("train/loss", 6, 6.0), ("new", 6, 1.0),
        ("val/loss", 6, 8.0),
    ]  # fmt: skip


@pytest.mark.parametrize("end", [b"\x00" * 64, b"\x00" * 64 + b"\n", b"{]\n", b'{"step": 2}\n'])
def test_what_a_machine_that_died_left_is_cut_off(tmp_path, end):
    first = JournalFile(tmp_path)
    first.append({"a": 1.0}, 1)
    first.close()
    file = tmp_path / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + end)
    assert points_after(file) == 1
    JournalFile(tmp_path, continued=True)
    assert file.read_bytes() == whole


def test_a_damaged_line_costs_no_other(tmp_path):
    first = JournalFile(tmp_path)
    for step in range(6):
        first.append({"a": float(step)}, step)
    first.close()
    file = tmp_path / "metrics.jsonl"
    content = file.read_bytes().split(b"\n")
    for place, text in ((1, b'{"step": 1e400, "time": 1, "a": 0}'), (3, b"\xff" + content[3])):
        content[place] = text
    file.write_bytes(b"\n".join(content))
    second = JournalFile(tmp_path, continued=True)
    second.append({"a": 5.0}, 5)
    second.append({"a": 6.0}, 6)
    assert [line.step for line in lines_after(file)] == [0, 2, 4, 5, 6]


def test_a_line_that_was_cut_off_by_a_full_disk_stays_alone(tmp_path):
    journal = JournalFile(tmp_path)
    journal.append({"a": 1.0}, 1)
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'{"time": 1')
    journal.append({"a": 2.0}, 2)
    journal.append({"a": 3.0}, 3)
    assert [line.step for line in lines_after(journal.path)] == [1, 2, 3]


# --- One process alone ---------------------------------------------------------------------------

HOLDING = """
import sys, os, time
from pathlib import Path
from clipkit.tracking.journal_file import JournalFile
journal = JournalFile(Path(sys.argv[1]))
journal.append({"a": 1.0}, 1)
if os.fork() == 0:  # a data worker, which lives on after the trainer
    time.sleep(20)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


def test_two_processes_do_not_write_one_run(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        assert is_held(tmp_path / "metrics.jsonl")
        with pytest.raises(UserError, match=r"is being written by another process"):
            JournalFile(tmp_path, continued=True)
        process.kill()
        process.wait()
        assert not is_held(tmp_path / "metrics.jsonl")
        JournalFile(tmp_path, continued=True).close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_lock_is_let_go_of_at_the_end(tmp_path):
    journal = JournalFile(tmp_path)
    assert is_held(journal.path)
    journal.close()
    assert not is_held(journal.path)
    journal.append({"a": 1.0}, 1)  # a test after a fit
    assert is_held(journal.path)
    del journal
    assert not is_held(tmp_path / "metrics.jsonl")


# --- A disk that takes nothing -------------------------------------------------------------------


def test_lines_wait_while_the_disk_is_full(tmp_path, caplog):
    """A limit on the size of files: the kernel takes a part of a line, then nothing."""
    journal = JournalFile(tmp_path)
    journal.append({"a": 0.0}, 0)
    size = journal.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
    try:
        for step in range(1, 4):
            journal.append({"a": float(step)}, step)
        assert journal.path.stat().st_size == size + 10
        assert points_after(journal.path) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("training goes on, the metrics wait in memory") == 1
    journal.append({"a": 4.0}, 4)
    assert [line["a"] for line in lines(tmp_path)] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_what_the_disk_never_took_is_counted(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    journal = JournalFile(tmp_path)
    for step in range(3):
        journal.append({"a": 1.0}, step)
    journal.close()
    assert "No space left on device" in caplog.text
    assert "3 lines of metrics could not be written and are lost" in caplog.text
