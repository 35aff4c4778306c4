"""Pictures of what the model mixes up: in the run folder and with the loggers."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from clipkit.evaluation.classification import ClassificationOutcomes
from clipkit.suite.pictures import most_confused


def outcomes(labels, predicted, num_classes):
    labels, predicted = torch.tensor(labels), torch.tensor(predicted)
    right = (labels == predicted).double()
    return ClassificationOutcomes(
        labels=labels, predicted=predicted, top1=right, top5=None, strict_top1=right.bool(),
        tied=torch.zeros_like(labels).bool(), prior=torch.full((num_classes,), 1 / num_classes),
    )  # fmt: skip


def test_most_confused_counts_only_what_is_wrong():
    found = most_confused(outcomes([0, 0, 0, 1, 2, 2], [1, 1, 0, 1, 0, 2], 3))
    assert [tuple(one) for one in found] == [
        (0, 1, 2, pytest.approx(2 / 3)), (2, 0, 1, pytest.approx(1 / 2)),
    ]  # fmt: skip
    assert most_confused(outcomes([0, 1], [0, 1], 2)) == []


def test_pictures_of_a_run(workdir, pictures, command):
    assert command(
        "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures, "--run_name=run",
        "--trainer.callbacks+=EvaluationPictures",
        "--trainer.callbacks.datasets={own: {split: train, label_column: label}}",
    ) == 0  # fmt: skip
    files = sorted(Path("runs/tiny/run/pictures").iterdir())
    assert [file.name for file in files] == [
        f"own-{kind}-000002.png" for kind in ("calibration", "confusions", "similarity")
    ]
    for file in files:
        with Image.open(file) as picture:
            assert picture.size > (400, 100)
    from mlflow.tracking import MlflowClient

    mlflow = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("tiny").experiment_id])
    assert len(mlflow.list_artifacts(run.info.run_id, "pictures")) == 3
    assert json.loads(Path("runs/tiny/run/status.json").read_text())["status"] == "finished"
