"""A checkpoint file is whole or not there, and a run goes on from the newest that is whole."""

import ctypes
import errno
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch

from clipkit.errors import UserError
from clipkit.saving import NotSavedError, WholeFiles, damage
from tests.resume.conftest import ENVIRONMENT, REPOSITORY, Run

CHECKPOINT = {"state_dict": {"weight": torch.arange(10_000.0)}, "epoch": 1}


def test_written_whole(tmp_path):
    path = tmp_path / "checkpoints" / "last.ckpt"
    WholeFiles().save_checkpoint(CHECKPOINT, path)
    assert damage(path) is None
    assert os.listdir(path.parent) == ["last.ckpt"]
    loaded = WholeFiles().load_checkpoint(path, weights_only=True)
    assert torch.equal(loaded["state_dict"]["weight"], CHECKPOINT["state_dict"]["weight"])


def test_every_kind_of_damage_is_seen(tmp_path):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint(CHECKPOINT, path)
    content = path.read_bytes()
    for length in range(0, len(content), 997):
        path.write_bytes(content[:length])
        assert damage(path) is not None, length
    start = content.index(torch.arange(10_000.0).numpy().tobytes()[:64])
    for place in range(start, start + 40_000, 1_999):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert damage(path) is not None, place
        with pytest.raises(UserError, match="damaged"):
            WholeFiles().load_checkpoint(path, weights_only=True)


def test_damage_of_the_directory_is_seen_or_harmless(tmp_path):
    """Each bit of a record's entry; torch and Python go by different ones."""
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint(CHECKPOINT, path)
    content = path.read_bytes()
    entry = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    end = content.index(b"PK\x01\x02", entry + 4)
    noticed = 0
    for place in range(entry, end):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            if damage(path) is not None:
                noticed += 1
                continue
            loaded = torch.load(path, weights_only=True)
            assert torch.equal(loaded["state_dict"]["weight"], CHECKPOINT["state_dict"]["weight"])
    assert noticed > 4 * (end - entry)


def test_the_old_file_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint(CHECKPOINT, path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NotSavedError, match="No space left on device"):
        WholeFiles().save_checkpoint({**CHECKPOINT, "epoch": 2}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


def damaged(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    return path


@pytest.fixture
def stopped(recipe, command, workdir):
    """A run as if killed at its end; the checkpoint before is of two epochs of three."""
    assert command(*recipe, "--run_name=run") == 0
    folder = workdir / "runs" / "again" / "run"
    (folder / "status.json").unlink()
    return folder


def test_a_damaged_last_one_falls_back(stopped, recipe, command, capsys, monkeypatch):
    whole = shutil.copytree(stopped, stopped.with_name("whole"))
    last = damaged(stopped / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    assert command(*recipe, "--run_name=run", "--ckpt_path=last") == 0
    output = capsys.readouterr().out
    assert "last.ckpt is damaged" in output
    assert "going on from before_last.ckpt" in output
    # In the run's own folder, whose damaged file is now a whole one.
    assert damage(last) is None
    assert sorted(path.name for path in stopped.parent.iterdir()) == ["run", "whole"]
    Run(stopped).assert_same(Run(whole))


def test_what_is_whole_is_not_given_up_for_what_is_damaged(
    stopped, recipe, command, capsys, monkeypatch
):
    """A run that went on from the one before has nothing else until it has saved."""
    last = damaged(stopped / "checkpoints" / "last.ckpt")
    before = last.with_name("before_last.ckpt")
    content = before.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("clipkit.saving.os.fsync", full)
        words = ["--ckpt_path=last", "--trainer.max_epochs=4"]
        assert command(*recipe, "--run_name=run", *words) == 2
        output = capsys.readouterr()
        assert "before_last.ckpt of step 10 is kept" in output.out + output.err
        assert before.read_bytes() == content
    assert command(*recipe, "--run_name=run", "--ckpt_path=last") == 0
    assert damage(last) is None
    assert before.read_bytes() == content


def test_the_last_one_goes_before_the_one_before_it_whatever_the_clock_says(
    stopped, recipe, command, capsys
):
    os.utime(stopped / "checkpoints" / "last.ckpt", (0, 0))
    command(*recipe, "--run_name=run", "--ckpt_path=last", "--trainer.max_epochs=4")
    assert "going on from last.ckpt" in capsys.readouterr().out


def test_a_run_of_a_longer_name_is_another_one(stopped, recipe, command, capsys):
    """run-2 is the second run of that name, run-32 one that was called so."""
    longer = shutil.copytree(stopped, stopped.with_name("run-32"))
    configuration = (longer / "config.yaml").read_text()
    assert "run_name: run\n" in configuration
    (longer / "config.yaml").write_text(configuration.replace("run_name: run", "run_name: run-32"))
    words = ["--run_name=run", "--ckpt_path=last", "--trainer.max_epochs=4"]
    assert command(*recipe, *words) == 0
    assert "run: runs/again/run," in capsys.readouterr().out
    shutil.rmtree(stopped)
    second = shutil.copytree(longer, stopped.with_name("run-2"))
    (second / "config.yaml").write_text(configuration)
    assert command(*recipe, *words) == 0
    assert "run: runs/again/run-2," in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:the checkpoint was written with another configuration")
def test_what_is_changed_is_said(stopped, recipe, command, capsys):
    words = ["--run_name=run", "--ckpt_path=last", "--trainer.max_epochs=4"]
    assert command(*recipe, *words, "--model.temperature.init=1") == 0
    output = capsys.readouterr().out
    assert "run: other than at its beginning: model.temperature.init" in output, output
    assert "the metrics up to step 14 stay as they are" in output


def test_a_checkpoint_of_others_is_gone_on_with_by_its_counters(stopped, recipe, command, capsys):
    """It has no configuration of clipkit's, which the command line gives."""
    path = stopped.parent.parent / "foreign.ckpt"
    loaded = torch.load(stopped / "checkpoints" / "last.ckpt", weights_only=True)
    del loaded["clipkit"]
    torch.save(loaded, path)
    assert command(*recipe, "--run_name=more", f"--ckpt_path={path}") == 2
    assert "trained to its end, trainer.max_epochs is 3" in capsys.readouterr().err
    words = ["--run_name=more", f"--ckpt_path={path}", "--trainer.max_epochs=4"]
    assert command(*recipe, *words) == 0


def test_nothing_whole_is_an_error_that_lists_the_runs(stopped, recipe, command, capsys):
    assert command(*recipe, "--run_name=runn", "--ckpt_path=last") == 2
    error = capsys.readouterr().err
    assert "runs/again/runn" in error
    assert "runs/again/run" in error
    for path in (stopped / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert command(*recipe, "--run_name=run", "--ckpt_path=last") == 2
    error = capsys.readouterr().err
    assert "no run runs/again/run has a checkpoint that can be read (runs/again/run/" in error
    assert ".ckpt is damaged: it is cut short" in error
    assert "with checkpoints there are" not in error
    assert command("fit", "--ckpt_path=last") == 2
    assert "of which run?" in capsys.readouterr().err


def test_a_changed_batch_is_refused_within_an_epoch(recipe, command, workdir, capsys):
    words = [*recipe, "--run_name=run", "--trainer.max_steps=7"]
    assert command(*words) == 0
    (workdir / "runs/again/run/status.json").unlink()
    words = [*recipe, "--run_name=run", "--ckpt_path=last"]
    assert command(*words, "--data.batch_size=6") == 2
    assert "with batch size 4, not 6" in capsys.readouterr().err
    assert command(*words) == 0


def fit(folder, *words, **keywords):
    return subprocess.run(
        [sys.executable, "-m", "clipkit.cli", *words],
        capture_output=True, text=True, cwd=folder, timeout=300, check=False,
        env={**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}, **keywords,
    )  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB; a checkpoint of the recipe takes 7."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def one_line(errors):
    lines = [line for line in errors.splitlines() if line.startswith("clipkit: ")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return lines[0]


@pytest.mark.slow
def test_a_full_disk(small_disk, recipe, workdir):
    shutil.copy(workdir / "again.yaml", small_disk)
    words = [*recipe, "--run_name=run", "--trainer.max_epochs=6", "--trainer.logger=false"]
    whole = fit(small_disk, *words)
    assert whole.returncode == 0, whole.stderr
    shutil.rmtree(small_disk / "runs")
    # Room for one checkpoint and half of another.
    (small_disk / "other").write_bytes(bytes(12 << 20))
    done = fit(small_disk, *words)
    assert "cannot be written (No space left on device)" in done.stdout + done.stderr
    last = small_disk / "runs/again/run/checkpoints/last.ckpt"
    assert damage(last) is None
    assert done.returncode == 2
    assert "No space left" in one_line(done.stderr)
    (small_disk / "other").unlink()
    again = fit(small_disk, *words, "--ckpt_path=last")
    assert again.returncode == 0, again.stderr


def test_a_file_in_the_place_of_the_folder(recipe, command, workdir, capsys):
    (workdir / "runs").write_text("")
    assert command(*recipe, "--run_name=run") == 2
    assert "runs" in one_line(capsys.readouterr().err)


def test_a_folder_of_somebody_else(recipe, workdir):
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    folder = workdir / "theirs"
    folder.mkdir(mode=0o755)
    shutil.copy(workdir / "again.yaml", folder)
    os.chown(folder, 65534, 65534)

    def without_override():  # of root, who is asked for permission then as others are
        assert ctypes.CDLL(None).prctl(24, 1) == 0  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE

    done = fit(folder, *recipe, "--run_name=run", preexec_fn=without_override)
    assert done.returncode == 2, done.stderr
    assert "cannot be" in one_line(done.stderr)


@pytest.mark.slow
def test_too_little_memory(recipe, workdir, command):
    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    words = [*recipe, "--run_name=run", "--trainer.max_epochs=1"]
    assert fit(workdir, *words, preexec_fn=limited).returncode == 0
    last = workdir / "runs/again/run/checkpoints/last.ckpt"
    assert damage(last) is None
    wide = "--model.text_encoder.hidden_dim=200000000"
    done = fit(workdir, *recipe, "--run_name=wide", wide, preexec_fn=limited)
    assert done.returncode == 2, done.stderr
    assert "memory" in one_line(done.stderr)
