"""Gloo ranks through the command line: the curve, val/loss and the outcomes of one."""

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
            assert shared[name] == pytest.approx(alone[name], abs=1e-8, rel=1e-8), name
    assert sorted(p.name for p in (workdir / "runs" / "tiny").iterdir()) == ["one", "two"]
    # Rank zero speaks for all.
    assert output.count("run: ") == 1


# Real pictures; a ViT without dropout, in float64.
EMOJI = """\
model:
  embed_dim: 64
  image_encoder:
    class_path: TimmImageEncoder
    init_args: {name: test_vit, image_size: 32}
  text_encoder:
    class_path: TextTransformer
    init_args: {width: 64, depth: 2, heads: 2}
  loss.duplicates: positive
data:
  class_path: HuggingFacePairs
  init_args: {caption_column: captions, batch_size: 64, num_workers: 0}
trainer:
  accelerator: cpu
  precision: 64-true
  log_every_n_steps: 1
  limit_val_batches: 0
"""


def emoji_curve(workdir, data, *, ranks, micro_batch, steps):
    """The loss of every step."""
    name = f"{ranks}-{micro_batch}"
    (workdir / "emoji.yaml").write_text(EMOJI)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "clipkit.cli", "fit", "-c", "base", "-c", "./emoji.yaml"),
            *(f"--data.dataset={data / 'emoji_vendors'}", f"--run_name={name}"),
            *("--experiment=ranks", f"--trainer.max_steps={steps}"),
            *(f"--trainer.devices={ranks}", "--trainer.strategy=ddp"),
            f"--model.micro_batch={'null' if micro_batch is None else micro_batch}",
        ],
        capture_output=True, text=True, cwd=workdir, env=ENVIRONMENT, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (workdir / "runs" / "ranks" / name / "metrics.jsonl").read_text().splitlines()
    losses = [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]
    assert len(losses) == steps
    return losses


def largest_difference(workdir, data, others, *, steps):
    alone = emoji_curve(workdir, data, ranks=1, micro_batch=None, steps=steps)
    return max(
        abs(found - expected)
        for ranks, micro_batch in others
        for found, expected in zip(
            emoji_curve(workdir, data, ranks=ranks, micro_batch=micro_batch, steps=steps),
            alone,
            strict=True,
        )
    )


@pytest.mark.slow
def test_the_row_of_ranks(workdir, shared_data):
    """30 steps of emoji on 1, 2 and 4 ranks, with and without micro-batches: one curve."""
    others = [(1, 8), (2, None), (2, 8), (4, None), (4, 8)]
    difference = largest_difference(workdir, shared_data, others, steps=30)
    print(f"largest difference of any loss: {difference:.1e}")
    assert difference < 1e-8
