"""Whole paths from YAML, in this process: what a run writes, repeats, resumes and refuses."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch

import clipkit
from clipkit.errors import UserError
from tests.test_pieces import made


def journal(run="runs/tiny/run"):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def losses(run="runs/tiny/run"):
    return [line["train/loss"] for line in journal(run) if "train/loss" in line]


@pytest.fixture
def fit(workdir, pictures, command):
    """Runs `fit` on the small data set as `runs/tiny/run`; gives the exit code."""

    def run(*words, name="run"):
        return command(
            "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures,
            f"--run_name={name}", *words,
        )  # fmt: skip

    return run


def test_every_promised_metric_is_logged(fit):
    assert fit("--model.temperature.bias=-1") == 0
    names = {name for line in journal() for name in line}
    both = {"loss", "loss_image_to_text", "loss_text_to_image", "accuracy_image_to_text"}
    both |= {"accuracy_text_to_image", "scale", "bias"}
    training = {"lr_image", "lr_text", "grad_norm", "samples_seen", "duplicates", "truncated"}
    assert {f"train/{name}" for name in both | training} <= names
    assert {f"val/{name}" for name in both} <= names
    assert [line["train/samples_seen"] for line in journal() if "train/loss" in line] == [8, 16]


def test_same_seed_same_losses_also_with_workers(fit):
    assert fit("--trainer.max_epochs=2", name="a") == 0
    assert fit("--trainer.max_epochs=2", name="b") == 0
    assert fit("--trainer.max_epochs=2", "--data.num_workers=2", name="workers") == 0
    assert losses("runs/tiny/a") == losses("runs/tiny/b") == losses("runs/tiny/workers")
    assert len(losses("runs/tiny/a")) == 4


def test_caches_do_not_change_a_run(fit, workdir, capsys):
    words = ["--trainer.max_epochs=2", "--data.shrink_pictures=17"]
    kept = ["--data.cache_tokens=true", "--data.cache_pictures_gb=1", "--data.cache_folder=kept"]
    assert fit(*words, name="plain") == 0
    assert fit(*words, *kept, name="built") == 0
    assert fit(*words, *kept, "--data.num_workers=2", name="found") == 0
    printed = capsys.readouterr().out
    for done in ("now in", "read from"):
        assert f"data: tokens of train, 23 captions: {done} kept/tokens-" in printed
        assert f"data: pictures of train, 23 of 23: {done} kept/pictures-" in printed

    def numbers(name):
        return [
            {k: v for k, v in line.items() if k != "time"} for line in journal(f"runs/tiny/{name}")
        ]

    assert numbers("plain") == numbers("built") == numbers("found")


def test_a_resumed_run_equals_an_uninterrupted_one(fit, command):
    assert fit("--trainer.max_epochs=4", name="whole") == 0
    checkpoints = Path("runs/tiny/kept/checkpoints")
    keep = [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.filename={epoch}", "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.every_n_epochs=2",
    ]  # fmt: skip
    assert fit("--trainer.max_epochs=4", *keep, name="kept") == 0
    stopped = checkpoints / "epoch=1.ckpt"
    assert fit("--trainer.max_epochs=4", *keep, "--ckpt_path", stopped, name="rest") == 0
    assert losses("runs/tiny/rest") == losses("runs/tiny/whole")[4:]
    whole, rest = (
        clipkit.load(f"runs/tiny/{name}/checkpoints/last.ckpt").state_dict()
        for name in ("whole", "rest")
    )
    assert all(torch.equal(whole[name], rest[name]) for name in whole)


def test_patch_dropout_repeats(fit):
    """With the same seed, in micro-batches that run twice."""
    words = [
        "--model.image_encoder=TimmImageEncoder", "--model.image_encoder.name=test_vit",
        "--model.image_encoder.image_size=32", "--model.image_encoder.patch_drop_ratio=0.5",
        "--model.micro_batch=4",
    ]  # fmt: skip
    for name in ("a", "b"):
        assert fit(*words, name=name) == 0
    assert losses("runs/tiny/a") == losses("runs/tiny/b")


def test_val_loss_does_not_depend_on_the_training_batch(fit, command, workdir, capsys):
    assert fit() == 0
    values = []
    for batch in (2, 7, 16):
        capsys.readouterr()
        words = ["--ckpt_path", "runs/tiny/run/checkpoints/last.ckpt", f"--data.batch_size={batch}"]
        assert command("validate", *words) == 0
        values += [printed(capsys.readouterr().out)["val/loss"]]
    assert values == pytest.approx([values[0]] * 3, abs=1e-6)


def printed(text):
    pairs = [line.split() for line in text.splitlines()]
    return {pair[0]: float(pair[1]) for pair in pairs if len(pair) == 2 and "/" in pair[0]}


def test_the_sigmoid_loss_with_a_prior_bias(fit):
    words = ["--model.loss=SigLIPLoss", "--model.temperature.init=0.1"]
    assert fit(*words, "--model.temperature.bias=prior") == 0
    first = journal()[0]
    assert first["train/bias"] == pytest.approx(-math.log(7), abs=0.01)
    assert "train/loss_image_to_text" not in first
    state = torch.load("runs/tiny/run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert state["temperature.bias"].isfinite()


def test_locked_towers_do_not_move(fit):
    assert fit("--model.lock_image=0", "--model.lock_text=0") == 0
    trained = clipkit.load("runs/tiny/run/checkpoints/last.ckpt")
    initial, _, _ = clipkit.build(
        "base", "tiny.yaml", overrides=["data.dataset=.", "model.lock_image=0", "model.lock_text=0"]
    )
    moved = {
        name for name, value in trained.state_dict().items()
        if not torch.equal(value, initial.state_dict()[name])
    }  # fmt: skip
    assert moved
    assert all(name.startswith(("image_head", "text_head", "temperature")) for name in moved)


def test_rates_per_tower(fit):
    assert (
        fit("--model.image_lr=0.5", "--model.text_lr=0.25", "--model.schedule.warmup_steps=0") == 0
    )
    line = journal()[0]
    assert (line["train/lr_image"], line["train/lr_text"]) == (0.5, 0.25)


def test_a_warmup_that_outlasts_the_run_is_warned_of(fit):
    with pytest.warns(UserWarning, match="the warm-up of 500 steps outlasts the run of 2"):
        fit("--model.schedule.warmup_steps=500")


def test_nan_stops_at_the_next_logging_step_and_keeps_the_last_good_checkpoint(fit, capsys):
    words = ["--model.optimizer.lr=1e30", "--trainer.max_epochs=6", "--trainer.log_every_n_steps=5"]
    words += ["--model.schedule.warmup_steps=4"]
    assert fit(*words, "--model.optimizer.class_path=torch.optim.SGD") in (0, 2)
    assert fit(*words, name="bad") == 2
    assert "the loss became non-finite at step" in capsys.readouterr().err
    for checkpoint in Path("runs/tiny/bad").rglob("*.ckpt"):
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


def test_weights_that_are_bad_are_not_saved():
    """A gradient can be bad where the loss is good, which tells of it a step later."""
    module = made()
    module.on_save_checkpoint({})
    next(module.image_encoder.parameters()).data[0] = float("inf")
    with pytest.raises(UserError, match="a weight became non-finite"):
        module.on_save_checkpoint({})


def test_samples_seen_are_those_that_were_trained_on(fit):
    """Where gradients are added up, an epoch's last step is made of what is left: here of one."""
    words = ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=3"]
    words += ["--data.batch_size=5"]
    assert fit(*words, "--trainer.max_epochs=2", name="sum") == 0
    journal = Path("runs/tiny/sum/metrics.jsonl").read_text()
    lines = map(json.loads, journal.splitlines())
    seen = [line["train/samples_seen"] for line in lines if "train/samples_seen" in line]
    assert seen[-1] == 2 * 3 * 5


def test_a_run_that_ends_within_an_epoch_says_so(fit, capsys):
    assert fit("--trainer.max_steps=1", "--trainer.max_epochs=3") == 0
    assert "epoch 1/3, ended at batch 1/2  0:0" in capsys.readouterr().out
    assert fit("--trainer.max_epochs=1", name="whole") == 0
    assert "ended at" not in capsys.readouterr().out


def test_no_learning_is_warned_of_once(fit):
    # Dropout this high leaves nothing of a caption.
    words = ["--model.optimizer.lr=0", "--trainer.max_epochs=60", "--trainer.limit_val_batches=0"]
    words += ["--trainer.log_every_n_steps=20", "--model.temperature.init=1"]
    words += ["--model.text_encoder.dropout=0.99", "--model.embed_dim=256"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fit(*words) == 0
    assert sum("of chance (ln 8" in str(w.message) for w in caught) == 1, losses()


def test_a_class_of_ones_own_in_the_current_folder(fit, workdir):
    Path("my_code.py").write_text(
        "from torch import nn\n"
        "from clipkit.encoders import ImageEncoder\n"
        "class MyEncoder(ImageEncoder):\n"
        "    def __init__(self, width: int = 8, image_size: int = 16) -> None:\n"
        "        super().__init__(feature_dim=width, image_size=image_size)\n"
        "        self.layers = nn.Sequential(nn.Conv2d(3, width, 4, 4), nn.AdaptiveAvgPool2d(1),\n"
        "                                    nn.Flatten())\n"
        "    def forward(self, images):\n"
        "        return self.layers(self.normalise(images))\n"
    )
    assert fit("--model.image_encoder=my_code.MyEncoder", "--model.image_encoder.width=12") == 0
    path = "runs/tiny/run/checkpoints/last.ckpt"
    with pytest.raises(UserError, match="--trust my_code"):
        clipkit.load(path)
    assert clipkit.load(path, trust=["my_code"]).image_encoder.feature_dim == 12


def test_switching_a_class_keeps_arguments_of_the_same_name(fit):
    """jsonargparse's way, good for ablations: the size stays the recipe's."""
    assert (
        fit("--model.image_encoder=TimmImageEncoder", "--model.image_encoder.name=test_resnet") == 0
    )
    assert clipkit.load("runs/tiny/run/checkpoints/last.ckpt").image_encoder.image_size == 16


def test_build_is_what_fit_would_run(workdir, pictures):
    module, data, trainer = clipkit.build(
        "base", "tiny.yaml", overrides=[f"data.dataset={pictures}", "model.loss=SigLIPLoss"]
    )
    assert type(module.loss).__name__ == "SigLIPLoss"
    assert data.batch_size == 8
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    clipkit.load("runs/tiny/pictures-loss=SigLIPLoss/checkpoints/last.ckpt")


def test_what_micro_batches_and_accumulation_mean_is_said(fit, capsys):
    assert fit("--model.micro_batch=4", "--trainer.limit_train_batches=1", name="micro") == 0
    assert "its statistics are those of a micro-batch of 4" in capsys.readouterr().out
    words = ["--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=2"]
    assert fit(*words, name="sum") == 0
    said = capsys.readouterr()
    assert "adds up gradients and no negatives" in said.out + said.err


def test_micro_batches_train_as_the_whole_batch(fit, workdir):
    """A tower without batch statistics: the curves differ by rounding."""
    (workdir / "vit.yaml").write_text(
        "model: {image_encoder: {class_path: TimmImageEncoder,"
        " init_args: {name: test_vit, image_size: 32}}}\n"
        "trainer: {precision: 64-true, max_epochs: 2}\n"
    )
    curves = []
    for name, words in (("whole", []), ("micro", ["--model.micro_batch=3"])):
        assert fit("-c", "vit.yaml", *words, name=name) == 0
        lines = Path(f"runs/tiny/{name}/metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line) for line in lines])
    for whole, micro in zip(*curves, strict=True):
        for key in whole.keys() - {"time"}:
            assert micro[key] == pytest.approx(whole[key], abs=1e-8), key
