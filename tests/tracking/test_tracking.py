"""What MLflow and the other loggers receive; the run folder."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from clipkit.tracking.config import flatten
from clipkit.tracking.journal import Journal
from clipkit.tracking.logger import MLflowLogger


@pytest.fixture
def fit(workdir, pictures, command):
    def run(*words):
        return command("fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures, *words)

    return run


def client(uri=None):
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri or os.environ["MLFLOW_TRACKING_URI"])


def only_run(uri=None, experiment="tiny"):
    mlflow = client(uri)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    return mlflow, run


def history(mlflow, run):
    return {
        (metric.key, metric.step, metric.value)
        for key in run.data.metrics
        for metric in mlflow.get_metric_history(run.info.run_id, key)
    }


def journal(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def journal_points(folder):
    return {
        (name, line["step"], value)
        for line in journal(folder) for name, value in line.items() if "/" in name
    }  # fmt: skip


def test_a_run_in_mlflow(fit, workdir):
    assert fit("--trainer.max_epochs=2", "--model.loss.label_smoothing=0.1") == 0
    mlflow, run = only_run()
    name = "pictures-max_epochs=2-label_smoothing=0.1"
    assert run.info.run_name == name
    assert run.info.status == "FINISHED"
    params = run.data.params
    assert params["model.loss"] == "InfoNCELoss"
    assert params["model.loss.label_smoothing"] == "0.1"
    assert params["model.optimizer.lr"] == "0.001"
    tags = run.data.tags
    for tag in ("clipkit.data_fingerprint", "clipkit.version.torch", "clipkit.version.python"):
        assert tags[tag]
    assert [a.path for a in mlflow.list_artifacts(run.info.run_id)] == ["config.yaml"]
    folder = workdir / "runs" / "tiny" / name
    points = {point for point in history(mlflow, run) if point[0] != "epoch"}
    assert points == journal_points(folder)
    assert {step for key, step, _ in history(mlflow, run) if key == "epoch"} == {0, 1, 2, 3}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["loss"]["init_args"]["label_smoothing"] == 0.1


def test_a_taken_name_gets_a_number(fit):
    assert fit("--trainer.limit_train_batches=1") == 0
    assert fit("--trainer.limit_train_batches=1") == 0
    assert sorted(p.name for p in Path("runs/tiny").iterdir()) == ["pictures", "pictures-2"]
    mlflow = client()
    runs = mlflow.search_runs([mlflow.get_experiment_by_name("tiny").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["pictures", "pictures-2"]


def test_the_configuration_of_a_run_runs_it_again(fit, command):
    assert fit("--trainer.max_epochs=2") == 0
    config = "runs/tiny/pictures-max_epochs=2/config.yaml"
    assert command("fit", "-c", config, "--run_name=again") == 0
    losses = [
        [line["train/loss"] for line in journal(f"runs/tiny/{n}") if "train/loss" in line]
        for n in ("pictures-max_epochs=2", "again")
    ]
    assert losses[0] == losses[1]


def test_another_logger_instead(fit, workdir):
    csv = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
    assert fit(csv, "--trainer.logger.save_dir=logs") == 0
    (metrics,) = (workdir / "logs").rglob("metrics.csv")
    assert "val/loss" in metrics.read_text()
    assert (workdir / "runs/tiny/pictures/metrics.jsonl").is_file()
    assert not client().get_experiment_by_name("tiny")


def test_another_logger_beside(fit, workdir):
    (workdir / "both.yaml").write_text(
        "trainer:\n  logger:\n    - class_path: MLflowLogger\n"
        "    - class_path: lightning.pytorch.loggers.CSVLogger\n      init_args: {save_dir: logs}\n"
    )
    assert fit("-c", "both.yaml") == 0
    assert list((workdir / "logs").rglob("metrics.csv"))
    _, run = only_run()
    assert "val/loss" in run.data.metrics


def test_a_server(fit, tmp_path_factory, free_port):
    store = tmp_path_factory.mktemp("server")
    uri = f"http://127.0.0.1:{free_port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{store}/db",
         "--artifacts-destination", str(store), "--host", "127.0.0.1", "--port", str(free_port),
         "--workers", "1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip
    try:
        wait_for(f"{uri}/health")
        assert fit(f"--trainer.logger.tracking_uri={uri}") == 0
        mlflow, run = only_run(uri)
        assert run.info.status == "FINISHED"
        assert {p for p in history(mlflow, run) if p[0] != "epoch"} == journal_points(
            "runs/tiny/pictures"
        )
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


def test_flatten_names_classes_and_their_arguments():
    flat = flatten(
        {
            "model": {"loss": {"class_path": "a.b.Loss", "init_args": {"x": 1, "y": [1, 2]}}},
            "trainer": {"callbacks": [{"class_path": "c.D", "init_args": {"z": None}}]},
        }
    )
    assert flat == {
        "model.loss": "Loss",
        "model.loss.x": 1,
        "model.loss.y": [1, 2],
        "trainer.callbacks.0": "D",
        "trainer.callbacks.0.z": None,
    }


def test_the_journal_is_strict_json_and_waits_for_its_folder(tmp_path):
    log = Journal()
    log.log_metrics({"a/b": float("nan"), "epoch": 0}, step=3)
    log.open(tmp_path)
    log.log_metrics({"a/b": 1.0}, step=4)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (first["a/b"], first["epoch"], first["step"]) == ("nan", 0, 3)
    assert second["a/b"] == 1.0


def test_an_interrupted_run_that_cannot_be_closed_is_one_warning(workdir, caplog):
    """Ctrl-C in the midst of a write leaves sqlite locked: here another connection holds it."""
    import sqlite3

    file = workdir / "mlflow.db"
    logger = MLflowLogger(tracking_uri=f"sqlite:///{file}")
    logger.begin(experiment="tiny", run_name="run", params={"a": "b"}, tags={})
    logger.interrupted = True
    with sqlite3.connect(file) as other:
        other.execute("BEGIN EXCLUSIVE")
        logger.finalize()
        other.rollback()
    assert "MLflow was not told that the run has ended" in caplog.text
