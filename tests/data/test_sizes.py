"""Smaller pictures first: sizes by the epoch, the same for workers, ranks and resumed runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed

import clipkit
from clipkit.data import HuggingFacePairs
from clipkit.data.images import Augmentation
from clipkit.data.sizes import SizeSchedule
from clipkit.encoders import TimmImageEncoder
from clipkit.encoders.flops import image_operations
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer

VIT = """\
model:
  image_encoder:
    class_path: TimmImageEncoder
    init_args: {name: vit_tiny_patch16_224, image_size: 48, any_size: true}
trainer: {max_epochs: 3}
data.image_sizes: {0: 32, 2: 48}
"""


def test_the_size_of_an_epoch():
    sizes = SizeSchedule({24: 224, 3: 112})
    assert [sizes.at(epoch, full=160) for epoch in (0, 2, 3, 23, 24, 99)] == [
        160, 160, 112, 112, 224, 224,
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [{-1: 32}, {0: 0}])
def test_sizes_that_are_none(sizes):
    with pytest.raises(UserError, match=r"data\.image_sizes: .* epochs from 0 and sizes above 0"):
        SizeSchedule(sizes)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_run_at_that_size(pictures, workers):
    def batches(epoch, **arguments):
        data = HuggingFacePairs(
            str(pictures), tokenizer=Tokenizer("english"), batch_size=8, seed=3, **arguments
        )
        data.setup("fit")
        loader = data.train_dataloader()
        for number in range(epoch + 1):  # the same workers from epoch to epoch
            loader.sampler.set_epoch(number)
            found = list(loader)
        return found, list(data.val_dataloader())

    for epoch, size in ((0, 8), (1, 8), (2, 16)):
        found, validation = batches(
            epoch, image_size=16, image_sizes={0: 8, 2: 16}, num_workers=workers
        )
        expected, _ = batches(epoch, image_size=size)
        assert [b["images"].shape[-1] for b in found] == [size] * len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one["images"], other["images"])
            assert torch.equal(one["tokens"], other["tokens"])
        assert {b["images"].shape[-1] for b in validation} == {16}


def test_smaller_pictures_are_decoded_smaller(monkeypatch):
    """What is saved is decoding as well: a JPEG is read at half or a quarter of its size."""
    import io

    from PIL import Image

    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, "JPEG")
    from clipkit.data import images

    decoded = []
    original = images._to_rgb
    monkeypatch.setattr(
        images, "_to_rgb", lambda image: decoded.append(image.size) or original(image)
    )
    for size in (224, 112, 56):
        Augmentation()(stream.getvalue(), size, "bicubic", np.random.default_rng(0))
    assert decoded == [(256, 256), (128, 128), (64, 64)]


# --- The tower -----------------------------------------------------------------------------------


def vit(**options):
    torch.manual_seed(0)
    return TimmImageEncoder("vit_tiny_patch16_224", image_size=48, **options)


def test_a_vit_resamples_its_positions_and_learns_all_of_them():
    encoder, fixed = vit(any_size=True), vit()
    assert encoder.state_dict().keys() == fixed.state_dict().keys()
    full = torch.rand(2, 3, 48, 48)
    assert torch.equal(encoder.eval()(full), fixed.eval()(full))
    small = torch.rand(2, 3, 32, 32)
    by_hand = TimmImageEncoder("vit_tiny_patch16_224", image_size=32)
    weights = encoder.trunk.state_dict()
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [2, 2], num_prefix_tokens=1)
    by_hand.trunk.load_state_dict(weights)
    torch.testing.assert_close(encoder(small), by_hand.eval()(small))
    encoder(small).square().sum().backward()
    assert bool((encoder.trunk.pos_embed.grad.abs().sum(dim=-1) > 0).all())


def test_a_tower_without_the_option():
    with pytest.raises(UserError, match=r"any_size: mixer_s32_224 .* accepted is false"):
        TimmImageEncoder("mixer_s32_224", any_size=True)
    TimmImageEncoder("test_resnet", any_size=True)  # any size as it is


# --- The command line ----------------------------------------------------------------------------


@pytest.fixture
def fit(workdir, pictures, command):
    def run(*words, name):
        (workdir / "vit.yaml").write_text(VIT)
        code = command(
            "fit", "-c", "base", "-c", "tiny.yaml", "-c", "vit.yaml", "--data.dataset", pictures,
            f"--run_name={name}", *words,
        )  # fmt: skip
        return code, f"runs/tiny/{name}"

    return run


def journal(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_a_run_grows_resumes_and_is_measured(fit, command, capsys):
    words = ["--trainer.callbacks+=Throughput", "--trainer.callbacks.peak_flops=1e12"]
    keep = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
            "--trainer.callbacks.filename={epoch}", "--trainer.callbacks.save_top_k=-1",
            "--trainer.callbacks.every_n_epochs=2"]  # fmt: skip
    code, whole = fit(*words, *keep, name="whole")
    assert code == 0
    said = "pictures: 32 px from epoch 0, 48 px from epoch 2 (counted from 0); evaluated at 48 px"
    assert said in capsys.readouterr().out
    lines = [line for line in journal(whole) if "throughput/mfu" in line]

    def images(line):
        """Operations a second of the image tower; the text tower is a hundredth of it."""
        return line["throughput/mfu"] * 1e12 / line["throughput/pairs_per_second"]

    small, large = (3 * image_operations(vit(any_size=True), size) for size in (32, 48))
    assert [images(line) for line in lines] == pytest.approx([small] * 4 + [large] * 2, rel=0.02)

    # Between two sizes; and a stranger's checkpoint may name its sizes.
    code, rest = fit("--ckpt_path", f"{whole}/checkpoints/epoch=1.ckpt", *words, *keep, name="rest")
    assert code == 0

    def losses(run):
        return [line["train/loss"] for line in journal(run) if "train/loss" in line]

    assert losses(rest) == losses(whole)[4:]
    assert command("validate", "--ckpt_path", f"{whole}/checkpoints/last.ckpt") == 0
    assert clipkit.load(f"{whole}/checkpoints/last.ckpt").image_encoder.image_size == 48


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--data.image_sizes={0: 40}"], "does not take 40"),
        (["--model.image_encoder.any_size=false"], "any_size=true lets a ViT"),
        (["--data.image_sizes={0: -1}"], "epochs from 0 and sizes above 0"),
        (["--data.image_sizes={a: 32}"], "data.image_sizes"),
        (["--data.image_sizes=32"], "data.image_sizes"),
    ],
)
def test_mistakes_end_in_one_sentence(fit, capsys, words, sentence):
    code, _ = fit(*words, name="wrong")
    assert code == 2
    (line,) = [t for t in capsys.readouterr().err.splitlines() if t.startswith("clipkit: ")]
    assert sentence in line
    assert "data.image_sizes" in line
