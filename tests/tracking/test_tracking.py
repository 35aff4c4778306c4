"""What MLflow and the other loggers receive; the run folder."""

import json
import os
from pathlib import Path

import pytest
import yaml

from clipkit.tracking.config import flatten


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


def test_an_evaluation_with_a_logger_is_a_run_of_its_own(fit, command, workdir):
    assert fit("--run_name=trained") == 0
    last = "runs/tiny/trained/checkpoints/last.ckpt"
    assert command("validate", "--ckpt_path", last) == 0
    assert command("validate", "--ckpt_path", last, "--trainer.logger=MLflowLogger") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny", "tiny-validate"]
    (folder,) = Path("runs/tiny-validate").iterdir()
    mlflow, run = only_run(experiment="tiny-validate")
    assert run.info.status == "FINISHED"
    points = {point for point in history(mlflow, run) if point[0] != "epoch"}
    assert points == journal_points(folder)
    assert "val/loss" in {name for name, _, _ in points}


def test_a_trainer_without_a_run_folder(workdir):
    """Lightning's trainer by hand: the logger keeps a folder of its own."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    from clipkit.tracking import MLflowLogger

    class Model(BoringModel):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)["loss"]
            self.log("train/loss", loss)
            # What a user's code logs to MLflow alone is in the folder all the same.
            self.logger.log_metrics({"own/number": 2.0 * batch_idx}, step=self.global_step)
            return loss

    model = Model()
    model.save_hyperparameters({"width": 32, "inner": {"rate": 0.1}})
    trainer = Trainer(
        logger=MLflowLogger(experiment_name="by_hand", tags={"mine": "yes"}),
        max_steps=3, log_every_n_steps=1, accelerator="cpu", limit_val_batches=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(model)
    mlflow, run = only_run(experiment="by_hand")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"width": "32", "inner.rate": "0.1"}
    assert run.data.tags["mine"] == "yes"
    points = {point for point in history(mlflow, run) if point[0] != "epoch"}
    assert points == journal_points("runs/by_hand/run")
    assert ("own/number", 2, 4.0) in points
    assert len([name for name, _, _ in points if name == "train/loss"]) == 3


def test_two_places_at_once_are_refused(fit, workdir, capsys):
    (workdir / "two.yaml").write_text("trainer:\n  logger: [MLflowLogger, MLflowLogger]\n")
    assert fit("-c", "two.yaml") == 2
    assert "clipkit sync RUN --tracking_uri URI copies" in capsys.readouterr().err.replace("`", "")
