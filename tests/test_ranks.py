"""Two gloo ranks through the command line: the curve, val/loss and the outcomes of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
# A tower without batch statistics, in float64, so that the curves differ by rounding alone.
VIT = """\
model:
  image_encoder:
    class_path: TimmImageEncoder
    init_args: {name: test_vit, image_size: 32}
trainer:
  precision: 64-true
  max_epochs: 2
"""


def fit(workdir, pictures, name, *words):
    (workdir / "vit.yaml").write_text(VIT)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "clipkit.cli", "fit", "-c", "base", "-c", "tiny.yaml"),
            *("-c", "vit.yaml", "--data.dataset", str(pictures), f"--run_name={name}"),
            "--trainer.callbacks+=ZeroShotRetrieval",
            "--trainer.callbacks.datasets={own: {split: train}}",
            *words,
        ],
        capture_output=True, text=True, cwd=workdir, env=ENVIRONMENT, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (workdir / "runs" / "tiny" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], done.stdout


@pytest.mark.parametrize(
    "loss", ["InfoNCELoss", pytest.param("SigLIPLoss", marks=pytest.mark.slow)]
)
def test_two_ranks_are_one_run(workdir, pictures, loss):
    words = [f"--model.loss={loss}", "--model.temperature.bias=-1"]
    one, _ = fit(workdir, pictures, "one", *words)
    two, output = fit(
        workdir,
        pictures,
        "two",
        *words,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--model.micro_batch=3",
    )
    assert len(one) == len(two)
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys()
        for name in alone.keys() - {"time"}:
            assert shared[name] == pytest.approx(alone[name], abs=1e-6, rel=1e-6), name
    assert sorted(p.name for p in (workdir / "runs" / "tiny").iterdir()) == ["one", "two"]
    # Rank zero speaks for all.
    assert output.count("run: ") == 1
