"""A recipe whose every source of randomness is on, and how two runs are compared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    # Sums of a tensor depend on the number of threads.
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
# Dropout in the text tower, dropped patches in the image tower, the mild crop, random captions.
RECIPE = """\
model:
  embed_dim: 16
  image_encoder:
    class_path: TimmImageEncoder
    init_args: {name: test_vit, image_size: 32, patch_drop_ratio: 0.25}
  text_encoder: {class_path: BagOfTokens, init_args: {width: 16, hidden_dim: 16, dropout: 0.2}}
  optimizer.lr: 1.0e-3
data:
  class_path: HuggingFacePairs
  init_args: {batch_size: 4, num_workers: 0}
trainer:
  accelerator: cpu
  max_epochs: 3
  log_every_n_steps: 1
"""


class Run:
    """What a run has come to."""

    def __init__(self, folder):
        self.folder = Path(folder)

    @property
    def steps(self):
        return json.loads((self.folder / "status.json").read_text())["steps"]

    @property
    def weights(self):
        path = self.folder / "checkpoints" / "last.ckpt"
        return torch.load(path, weights_only=True, map_location="cpu")["state_dict"]

    @property
    def points(self):
        """Every (metric, step, value) of the journal, timings left out; none stands there twice."""
        found = []
        for text in (self.folder / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            step = line.pop("step")
            del line["time"]
            line.pop("epoch", None)
            found += [(k, step, v) for k, v in line.items() if not k.startswith("throughput/")]
        assert len({point[:2] for point in found}) == len(found)
        return set(found)

    def assert_same(self, other):
        ours, theirs = self.weights, other.weights
        assert ours.keys() == theirs.keys()
        differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not differing
        assert self.points == other.points


@pytest.fixture
def recipe(workdir, pictures):
    """The words of a fit of this recipe, in a folder of its own."""
    (workdir / "again.yaml").write_text(RECIPE)
    return ["fit", "-c", "base", "-c", "again.yaml", f"--data.dataset={pictures}"]


@pytest.fixture
def start(recipe, workdir):
    """Starts the command in a process group of its own, so that all its ranks can be killed."""

    def started(*words, **environment):
        return subprocess.Popen(
            [sys.executable, "-m", "clipkit.cli", *recipe, *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=workdir,
            start_new_session=True,
            env={**ENVIRONMENT, "PYTHONPATH": f"{REPOSITORY}:{workdir}", **environment},
        )  # fmt: skip

    return started
