"""A run sent from its folder: what is left of it, none twice, and runs that nobody ended."""

import json
import os
import shutil
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from clipkit.errors import UserError
from clipkit.tracking import recording
from clipkit.tracking.left_running import end_those
from clipkit.tracking.logger import MLflowLogger
from clipkit.tracking.run_record import read_record
from clipkit.tracking.shipment import Shipment
from tests.tracking.harness import Trainer, points_of, rows_of_metrics, runs_of, wait_until

CONFIG = yaml.safe_dump({"seed_everything": 0, "model": {"optimizer": {"lr": 0.1}}})


@pytest.fixture
def uri(workdir):
    return os.environ["MLFLOW_TRACKING_URI"]


@pytest.fixture
def database(workdir):
    return workdir / "mlflow.db"


def recorded(name="run", steps=3, start=0):
    """A run being written, of which MLflow knows nothing yet."""
    run = recording.begin(Path("runs"), "drawn", name, CONFIG)
    run.describe(tags={"mine": "yes"})
    log(run, steps, start)
    return run


def log(run, steps, start=0):
    for step in range(start, start + steps):
        run.journal.append({"train/loss": 1.0 / (step + 1), "train/scale": 14.0, "epoch": 0}, step)


def shipment(run, uri):
    return Shipment(run.path, uri, read_record(run.path))


def only_run(uri):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("drawn").experiment_id])
    return client, run


def test_a_run_that_no_logger_sent(command, uri, database, capsys):
    run = recorded()
    run.end("finished", steps=3, chosen={"step": 2})
    run.close()
    (run.path / "outcomes").mkdir()
    (run.path / "outcomes" / "zeroshot-own-last.parquet").write_text("rows")
    assert command("sync", "runs/drawn/run") == 0
    assert "6 points sent" in capsys.readouterr().out
    assert rows_of_metrics(database) == points_of(run.path / "metrics.jsonl")
    client, sent = only_run(uri)
    assert sent.info.status == "FINISHED"
    assert sent.data.params == {"seed_everything": "0", "model.optimizer.lr": "0.1"}
    tags = sent.data.tags
    assert (tags["mine"], tags["clipkit.chosen_step"]) == ("yes", "2")
    assert tags["clipkit.id"] == run.record.id
    files = [file.path for file in client.list_artifacts(sent.info.run_id)]
    assert files == ["config.yaml", "outcomes"]
    assert command("sync", "drawn/run", "runs/drawn") == 0
    assert capsys.readouterr().out.count("nothing was left") == 2


def test_a_batch_is_taken_once_if_its_receipt_is_lost(command, uri, database):
    """Killed between MLflow's answer and the note of it: at whatever point, the rows are the same.

    NaN, infinity and a value twice at different times are points as others are.
    """
    run = recorded(steps=600)
    run.journal.append({"train/loss": float("nan")}, 2000)
    run.journal.append({"train/loss": float("inf")}, 2001)
    notes = [None]

    class Noting(Shipment):
        def _note(self, **changes):
            super()._note(**changes)
            notes.append((run.path / "shipped.json").read_text())

    Noting(run.path, uri, read_record(run.path)).send(ended=False)
    rows = rows_of_metrics(database)
    assert set(rows.values()) == {1}
    assert len(rows) == 600 * 3 + 2
    assert len(notes) > 5
    for note in notes:
        if note is None:  # also the run's own id there: no second run
            (run.path / "shipped.json").unlink()
        else:
            (run.path / "shipped.json").write_text(note)
        shipment(run, uri).send(ended=False)
        assert rows_of_metrics(database) == rows
    assert runs_of(database) == [("run", "RUNNING")]
    _, sent = only_run(uri)
    assert sent.data.tags["clipkit.first_non_finite"] == "train/loss nan at step 2000"
    run.close()


def test_a_run_that_was_made_twice_is_one_in_the_end(command, uri, database):
    """A server answers too late: the call that was given up has made a run all the same."""
    run = recorded()
    shipment(run, uri).send(ended=False)
    client, sent = only_run(uri)
    client.create_run(sent.info.experiment_id, tags={"clipkit.id": run.record.id}, run_name="twin")
    run.end("finished")
    run.close()
    (run.path / "shipped.json").unlink()  # not even known which of the two it was
    assert command("sync", run.path) == 0
    _, only = only_run(uri)
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "SELECT key, step, value FROM metrics WHERE run_uuid = ?", (only.info.run_id,)
        ).fetchall()
    connection.close()
    assert Counter(rows) == points_of(run.path / "metrics.jsonl")


def test_a_trainer_that_is_killed(command, workdir, uri, database, capsys):
    # One that was killed before it, and that the store believes to be running.
    before = recording.begin(Path("runs"), "harness", "before", CONFIG)
    before.describe(tags={})
    shipment(before, uri).send(ended=False)
    before.close()
    fit = Trainer(workdir, uri)
    try:
        fit.send()
        fit.reach(40)
        wait_until(lambda: ("before", "KILLED") in runs_of(database), "the run before is ended")
        assert command("sync", fit.run) == 2
        assert "it is being written just now" in capsys.readouterr().err
        fit.kill()
    finally:
        fit.close()
    for _ in range(2):
        assert command("sync", "runs/harness/run") == 0
    assert "nothing was left" in capsys.readouterr().out
    assert rows_of_metrics(database) == points_of(fit.journal)
    assert dict(runs_of(database)) == {"before": "KILLED", "run": "KILLED"}


def test_runs_left_running_are_ended(uri, database, workdir):
    killed, finished, alive, elsewhere = (
        recorded(name) for name in ("killed", "finished", "alive", "elsewhere")
    )
    for run in (killed, finished, alive, elsewhere):
        shipment(run, uri).send(ended=False)
    finished.end("finished", steps=3)
    for run in (killed, finished, elsewhere):
        run.close()
    with sqlite3.connect(database) as connection:
        connection.execute(
            "UPDATE tags SET value = 'another' WHERE key = 'clipkit.host' AND run_uuid IN "
            "(SELECT run_uuid FROM runs WHERE name = 'elsewhere')"
        )
    connection.close()
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    ended = end_those(client, client.get_experiment_by_name("drawn").experiment_id)
    assert sorted(ended) == ["finished", "killed"]
    assert dict(runs_of(database)) == {
        "killed": "KILLED", "finished": "FINISHED", "alive": "RUNNING", "elsewhere": "RUNNING",
    }  # fmt: skip
    alive.close()
    shutil.rmtree(alive.path)
    assert end_those(client, client.get_experiment_by_name("drawn").experiment_id) == ["alive"]


def test_what_mlflow_refuses_is_left_out(uri, database, command, capsys):
    run = recorded()
    run.journal.append({"b" * 300: 1.0, "train/ok": 2.0, "a@b": 3.0}, 5)
    run.end("failed")
    run.close()
    assert command("sync", str(run.path)) == 0
    assert "MLflow refused bbb" in capsys.readouterr().out
    rows = rows_of_metrics(database)
    assert ("train/ok", 5, 2.0) in rows
    assert ("ab", 5, 3.0) in rows
    assert len(rows) == 3 * 3 + 2
    assert runs_of(database) == [("run", "FAILED")]


def test_a_run_that_was_deleted_there_stays_deleted(uri, database, command, capsys):
    run = recorded()
    shipment(run, uri).send(ended=False)
    client, sent = only_run(uri)
    client.delete_run(sent.info.run_id)
    log(run, 2, start=10)
    run.close()
    assert command("sync", str(run.path)) == 2
    assert "the run was deleted there" in capsys.readouterr().err
    assert len(runs_of(database)) == 1


def test_a_copy_in_another_store(uri, database, workdir, command, mlflow_template):
    run = recorded()
    run.end("finished")
    run.close()
    shutil.copy(mlflow_template, workdir / "other.db")
    for store in (uri, "sqlite:///other.db", uri):
        assert command("sync", "runs/drawn/run", "--tracking_uri", store) == 0
    for store in (database, workdir / "other.db"):
        assert rows_of_metrics(store) == points_of(run.path / "metrics.jsonl")
        assert len(runs_of(store)) == 1


# --- Folders from elsewhere ----------------------------------------------------------------------


def from_elsewhere(**places):
    """A run that has ended, whose folder names places of its writer's choice."""
    run = recorded()
    run.describe(tags={}, **places)
    run.end("finished")
    run.close()
    return run.path


def test_an_address_that_only_the_folder_names_is_not_used(command, database, workdir, capsys):
    there = f"sqlite:///{workdir}/there.db"
    path = from_elsewhere(tracking_uri=there)
    assert command("sync", path) == 2
    said = capsys.readouterr().err
    assert "its run.json names a place" in said
    assert f"add --tracking_uri {there}" in said
    assert not (workdir / "there.db").exists()
    assert command("sync", path, "--tracking_uri", os.environ["MLFLOW_TRACKING_URI"]) == 0
    assert runs_of(database) == [("run", "FINISHED")]


def test_nor_is_a_place_for_files(command, uri, database, workdir, capsys):
    path = from_elsewhere(tracking_uri=uri, artifact_location=str(workdir / "there"))
    assert command("sync", path) == 2
    assert f"add --artifact_location {workdir}/there" in capsys.readouterr().err
    assert command("sync", path, "--artifact_location", str(workdir / "mine")) == 0
    assert not (workdir / "there").exists()
    assert list((workdir / "mine").rglob("config.yaml"))


def test_a_sentence_holds_what_a_stranger_wrote_on_one_line(command, capsys):
    path = from_elsewhere()
    said = json.loads((path / "run.json").read_text())
    for place in ("http://a\n\x1b[2Jb", ["x"], 5):
        (path / "run.json").write_text(json.dumps(said | {"tracking_uri": place}))
        assert command("sync", path) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.isprintable()


def test_links_that_lead_out_are_left_out(command, uri, workdir, capsys):
    path = from_elsewhere()
    (workdir / "secret.txt").write_text("secret")
    (path / "pictures").mkdir()
    (path / "pictures" / "mine.png").write_text("picture")
    (path / "pictures" / "within.png").symlink_to(path / "pictures" / "mine.png")
    (path / "pictures" / "secret.png").symlink_to(workdir / "secret.txt")
    (path / "config-2.yaml").symlink_to(workdir / "secret.txt")
    assert command("sync", path) == 0
    said = capsys.readouterr().out
    assert "left out, as it leads out of the folder: 'config-2.yaml', 'pictures/secret.png'" in said
    client, run = only_run(uri)
    files = [file.path for file in client.list_artifacts(run.info.run_id, "pictures")]
    assert files == ["pictures/mine.png", "pictures/within.png"]
    assert not list((workdir / "mlruns").rglob("config-2.yaml"))


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.yaml", "status.json", ".shipping", ".shipped.json.unfinished"]
)
def test_nothing_is_read_or_written_through_a_link(name, command, database, workdir, capsys):
    path = from_elsewhere()
    if (path / name).exists():
        (path / name).rename(workdir / name)
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to(workdir / name)
    there = {file.name for file in workdir.iterdir()}
    assert command("sync", path) == 2
    assert f"{name!r} is a link that leads out of it" in capsys.readouterr().err
    assert {file.name for file in workdir.iterdir()} == there
    assert runs_of(database) == []


@pytest.mark.parametrize(
    "wrong",
    [{"offset": "x"}, {"offset": -1}, {"offset": 10**30}, {"run_id": 5}, {"files": []},
     {"files": {"config.yaml": 1}}, {"epoch": 3}, {"described": None}, {"status": {}},
     "[" * 100_000],
    ids=lambda wrong: repr(wrong)[:30],
)  # fmt: skip
def test_a_note_of_other_types_is_no_note(wrong, command, uri, database, workdir, capsys):
    path = from_elsewhere()
    store = {"schema": 1, "store": uri}
    text = wrong if isinstance(wrong, str) else json.dumps(store | wrong)
    (path / "shipped.json").write_text(text)
    assert command("sync", path) == 0
    assert "6 points sent" in capsys.readouterr().out
    assert rows_of_metrics(database) == points_of(path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["nowhere"], "sync nowhere: no run folder; accepted is runs/<experiment>/<run>"),
        (["runs/drawn/old"], "it has no run.json, and an older clipkit has sent it"),
        (["runs/drawn/run", "--tracking_uri", "http://127.0.0.1:9"], "cannot be reached"),
        (["runs/drawn/run", "--tracking_uri", "file:./x"], "is a file store"),
        (["runs/drawn/run", "--tracking_uir", "x"], "did you mean --tracking_uri?"),
        (["runs/drawn/broken"], "run.json: no JSON"),
    ],
)
def test_mistakes(words, part, command, workdir, capsys):
    recorded().close()
    old = Path("runs/drawn/old")
    old.mkdir()
    (old / "metrics.jsonl").write_text('{"time": 1.0, "step": 0, "a": 1.0}\n')
    shutil.copytree(old, "runs/drawn/broken")
    Path("runs/drawn/broken/run.json").write_text("{")
    assert command("sync", *words) == 2
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [{"began": "x"}, {"tags": [1]}, {"tags": {"a": 1}}, {"run_name": None}, {"continued": 1.5},
     {"tracking_uri": 3}, {"began": 1e300}],
)  # fmt: skip
def test_a_record_of_wrong_types_is_a_sentence(wrong, command, workdir, uri, capsys):
    run = recorded()
    run.end("finished")
    run.close()
    file = run.path / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    assert command("sync", run.path) == 2
    error = capsys.readouterr().err
    assert "run.json: does not describe a run" in error
    assert error.count("\n") == 1


def test_a_run_whose_files_lead_elsewhere_is_not_continued(workdir, tmp_path_factory):
    run = recorded()
    run.close()
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "status.json"
    (run.path / ".status.json.unfinished").symlink_to(elsewhere)
    with pytest.raises(UserError, match="is a link out of it"):
        recording.go_on(run.path, "a: 1\n")
    assert not elsewhere.exists()


def test_a_database_that_is_locked_is_one_warning(workdir, uri, database, caplog):
    """Training ends in time, and says what is left."""
    run = recorded()
    logger = MLflowLogger(tracking_uri=uri, wait_at_end=1)
    with sqlite3.connect(database) as other:
        other.execute("BEGIN EXCLUSIVE")
        logger.begin(run)
        began = time.monotonic()
        logger.finalize("success")
        assert time.monotonic() - began < 60  # sqlite itself would wait for a minute and more
        other.rollback()
    other.close()
    assert "they are sent by: clipkit sync runs/drawn/run" in caplog.text
    run.close()


@pytest.mark.slow
def test_ctrl_c(workdir, uri, database):
    fit = Trainer(workdir, uri)
    try:
        fit.reach(40)
        fit.interrupt()
        code, said = fit.end()
    finally:
        fit.close()
    assert code == 130, said
    assert rows_of_metrics(database) == points_of(fit.journal)
    assert runs_of(database) == [("run", "KILLED")]


def test_a_password_is_written_nowhere(workdir, caplog, command, capsys):
    run = recorded()
    secret = "http://me:secret@127.0.0.1:9"
    logger = MLflowLogger(tracking_uri=secret, wait_at_end=0)
    logger.begin(run)
    logger.finalize("success")
    run.close()
    assert command("sync", run.path, "--tracking_uri", secret) == 2
    written = "".join(path.read_text() for path in run.path.iterdir())
    assert "secret" not in written + caplog.text + capsys.readouterr().err + logger.where


# --- Continued -----------------------------------------------------------------------------------


def continued(words, folder, checkpoint):
    """A fit that goes on with a run's folder, as `--ckpt_path last` does."""
    import clipkit
    from clipkit.tracking import RunFolder, callbacks_of

    module, data, trainer = clipkit.build("base", "tiny.yaml", overrides=words)
    (callback,) = (c for c in callbacks_of(trainer) if isinstance(c, RunFolder))
    callback.continued = folder
    trainer.fit(module, datamodule=data, ckpt_path=str(checkpoint))


def history(database, run):
    with sqlite3.connect(database) as connection:
        rows = connection.execute(
            "SELECT key, step, value FROM metrics JOIN runs USING (run_uuid) WHERE name = ?", (run,)
        ).fetchall()
    connection.close()
    return sorted(rows)


def test_a_continued_run_is_one_run_with_the_history_of_an_undisturbed_one(
    command, workdir, database, uri, pictures
):
    words = [
        f"data.dataset={pictures}", "trainer.max_epochs=3",
        "trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "trainer.callbacks.filename={epoch:03d}", "trainer.callbacks.save_top_k=-1",
        "trainer.callbacks.auto_insert_metric_name=false",
    ]  # fmt: skip
    fit = ["fit", "-c", "base", "-c", "tiny.yaml", *(f"--{word}" for word in words)]
    assert command(*fit, "--run_name=whole") == 0
    assert command(*fit, "--run_name=run", "--trainer.logger=false") == 0
    folder = Path("runs/tiny/run")
    # Killed in the second epoch: no end, a torn line, and the last checkpoint is of the first.
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({"id": status["id"], "status": "unfinished"}))
    journal = folder / "metrics.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    cut = next(place for place, line in enumerate(lines) if json.loads(line)["step"] == 3)
    journal.write_text("".join(lines[:cut]) + lines[cut][:20])
    assert command("sync", folder) == 0
    assert runs_of(database) == [("whole", "FINISHED"), ("run", "KILLED")]
    checkpoint = folder / "checkpoints" / "000.ckpt"
    more = [*words, "run_name=run", "trainer.gradient_clip_val=1000.0"]
    for _ in range(2):
        continued(more, folder, checkpoint)
    assert history(database, "run") == history(database, "whole")
    assert runs_of(database) == [("whole", "FINISHED"), ("run", "FINISHED")]
    with sqlite3.connect(database) as connection:
        tags = dict(
            connection.execute(
                "SELECT key, value FROM tags JOIN runs USING (run_uuid) WHERE name = 'run' "
                "AND key LIKE 'clipkit.resumed.%'"
            ).fetchall()
        )
    connection.close()
    assert tags == {"clipkit.resumed.trainer.gradient_clip_val": "1000.0"}
    first = yaml.safe_load((folder / "config.yaml").read_text())
    assert first["trainer"]["gradient_clip_val"] is None
    assert [path.name for path in folder.glob("config-*.yaml")] == ["config-2.yaml"]
    assert json.loads((folder / "run.json").read_text())["id"] == status["id"]


def test_a_run_that_is_being_written_is_not_continued(workdir, pictures):

    run = recorded()
    with pytest.raises(UserError, match="is being written by another process"):
        continued([f"data.dataset={pictures}"], run.path, "none.ckpt")
    run.close()
