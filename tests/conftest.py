"""What the tests share: an offline environment, a folder, a small data set and recipe."""

import csv
import logging
import os
import shutil
import sys
from pathlib import Path

# Before any library reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest

TINY = """\
model:
  embed_dim: 16
  image_encoder: {class_path: ConvNet, init_args: {image_size: 16, widths: [8, 8], feature_dim: 16}}
  text_encoder: {class_path: TextTransformer, init_args: {width: 16, depth: 1, heads: 2}}
  optimizer.lr: 1.0e-3
data:
  class_path: HuggingFacePairs
  init_args: {batch_size: 8}
trainer:
  accelerator: cpu
  max_epochs: 1
  log_every_n_steps: 1
"""


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory):
    """An empty MLflow database: making one takes seconds, copying it none."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def workdir(tmp_path, monkeypatch, mlflow_template):
    """An empty folder to run commands in, with an MLflow database ready."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(mlflow_template, tmp_path / "mlflow.db")
    # Absolute, because MLflow keeps one store a URI and process, whatever the current folder.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture(autouse=True)
def modules_of_this_test(tmp_path_factory):
    """Another test's my_code.py is another module, in whichever folder of the tests it lies."""
    path = list(sys.path)  # clipkit appends the current folder
    yield
    sys.path[:] = path
    folder = tmp_path_factory.getbasetemp()
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder):
            del sys.modules[name]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """24 drawn pictures with metadata.csv: columns file_name, caption, label."""
    from PIL import Image

    from clipkit.data.drawing import CLASS_NAMES, captions, draw, sample

    folder = tmp_path_factory.mktemp("data") / "pictures"
    folder.mkdir()
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption", "label"])
        for index in range(24):
            drawing = sample(0, "test", index)
            Image.fromarray(draw(drawing, 20)).save(folder / f"{index:04d}.png")
            writer.writerow([f"{index:04d}.png", captions(drawing)[-1], CLASS_NAMES[drawing.label]])
    return folder


@pytest.fixture(autouse=True)
def logger_as_it_was():
    """The command line takes clipkit's logger over; the next test finds it as a library has it."""
    logger = logging.getLogger("clipkit")
    yield
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def command():
    """Runs the command line in this process: `command("fit", ...)` gives the exit code."""
    from clipkit.cli import main

    return lambda *words: main([str(word) for word in words])


@pytest.fixture(scope="session")
def shared_data():
    """Real data sets, where they lie beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets of ../shared/data are not here")
    return folder
