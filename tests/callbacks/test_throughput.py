"""What a run's speed is said to be, by a clock that the tests move."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.callbacks import Throughput
from clipkit.callbacks import throughput as throughput_module
from clipkit.callbacks.evaluation import Evaluation
from clipkit.callbacks.peak_flops import peak_flops
from clipkit.callbacks.throughput import FETCH, SAVE, _Counts, _Listening
from clipkit.data.samples import PairCollate, PairDataset, Sample
from clipkit.encoders import BagOfTokens, ConvNet, TextEncoder, TextTransformer
from clipkit.encoders.flops import image_operations
from clipkit.errors import UserError
from clipkit.heads import LinearHead
from clipkit.losses import InfoNCELoss
from clipkit.module import CLIPModule
from clipkit.temperature import Temperature
from clipkit.tokenizer import Tokenizer

THROUGHPUT = "--trainer.callbacks+=Throughput"
CAPTIONS = ["a", "two red circles and a small green square", "a cat", "a dog on a green sofa", "a"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves where something is slow: `clock.slow(owner, method, seconds)`."""
    clock = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr("clipkit.callbacks.throughput.time", fake)
    monkeypatch.setattr("clipkit.callbacks.schedule.time", fake)

    def slow(owner, method, seconds):
        original = getattr(owner, method)

        def slowly(*arguments, **keywords):
            clock.now += seconds
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, method, slowly)

    clock.slow = slow
    return clock


def values(lines, name):
    return [line[f"throughput/{name}"] for line in lines if f"throughput/{name}" in line]


def test_time_is_that_of_data_and_steps(fit, clock):
    clock.slow(PairDataset, "__getitem__", 3 / 8)
    clock.slow(CLIPModule, "training_step", 5)
    lines = fit(THROUGHPUT, "--trainer.max_epochs=3")
    assert values(lines, "pairs_per_second") == [1.0] * 6
    assert values(lines, "data_wait") == [3 / 8] * 6
    # On the line of the step's other metrics; a CPU has no stated peak and no memory of its own.
    assert all("train/loss" in line for line in lines if "throughput/padding" in line)
    assert not values(lines, "mfu")
    assert not values(lines, "peak_memory")


def test_what_interrupts_the_training_does_not_count(fit, clock, monkeypatch):
    from lightning.pytorch.strategies import SingleDeviceStrategy

    clock.slow(CLIPModule, "training_step", 4)
    clock.slow(CLIPModule, "validation_step", 1000)
    clock.slow(Evaluation, "_evaluate_set", 2000)
    clock.slow(SingleDeviceStrategy, "save_checkpoint", 5000)
    lines = fit(
        THROUGHPUT, "--trainer.max_epochs=3", "--trainer.val_check_interval=1",
        "--trainer.callbacks+=ZeroShotRetrieval",
        "--trainer.callbacks.datasets={own: {split: train}}", "--trainer.callbacks.every_n_steps=1",
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=1", "--trainer.callbacks.save_weights_only=true",
    )  # fmt: skip
    assert values(lines, "pairs_per_second") == [2.0] * 6
    assert clock.now > 20_000


def test_an_interval_of_several_steps_and_batches(fit, clock):
    clock.slow(CLIPModule, "training_step", 4)
    lines = fit(
        THROUGHPUT, "--trainer.max_epochs=2", "--data.batch_size=4",
        "--trainer.log_every_n_steps=2", "--trainer.accumulate_grad_batches=2",
    )  # fmt: skip
    # Of five batches an epoch two make a step, and the last alone.
    logged = [line["step"] for line in lines if "throughput/padding" in line]
    assert logged == [line["step"] for line in lines if "train/grad_norm" in line]
    assert values(lines, "pairs_per_second") == [1.0] * len(logged)


@pytest.mark.parametrize(("where", "low", "high"), [("data", 0.7, 1), ("step", 0, 0.3)])
def test_by_the_real_clock(fit, monkeypatch, where, low, high):
    import time

    def slowed(original, seconds):
        return lambda *a, **k: (time.sleep(seconds), original(*a, **k))[1]

    if where == "data":
        monkeypatch.setattr(PairDataset, "__getitem__", slowed(PairDataset.__getitem__, 0.05))
    else:
        monkeypatch.setattr(CLIPModule, "training_step", slowed(CLIPModule.training_step, 0.4))
    shares = values(fit(THROUGHPUT, "--trainer.max_epochs=4"), "data_wait")
    # The first step is slower than the others.
    assert low <= sorted(shares)[len(shares) // 2] <= high


def test_utilisation_by_hand(fit, clock):
    clock.slow(CLIPModule, "training_step", 4)
    words = [THROUGHPUT, "--trainer.callbacks.peak_flops=1e9"]
    open_, locked = (
        fit(*words, *more, name=name)[0]
        for name, more in (("open", []), ("locked", ["--model.lock_image=0"]))
    )
    # The squares of the lengths are not logged: tokens alone come near enough for so small a tower.
    text = of_caption(open_["throughput/tokens_per_caption"])
    image = image_operations(ConvNet(image_size=16, widths=(8, 8), feature_dim=16))
    assert open_["throughput/mfu"] == pytest.approx(3 * (image + text) * 8 / 4 / 1e9, rel=0.01)
    assert locked["throughput/mfu"] == pytest.approx((image + 3 * text) * 8 / 4 / 1e9, rel=0.01)


def of_caption(length, width=16):
    """Operations of the tiny text tower; its only block is the last, for the pooled token alone."""
    return 24 * length * width**2 + 4 * length**2 * width - 18 * (length - 1) * width**2


def made(text=TextTransformer, micro_batch=None, **shape):
    return CLIPModule(
        image_encoder=ConvNet(image_size=16, widths=(4,)),
        text_encoder=lambda contract: text(contract, width=8, **shape),
        tokenizer=Tokenizer("english"), image_head=LinearHead, text_head=LinearHead,
        temperature=Temperature(), loss=InfoNCELoss(), optimizer=torch.optim.AdamW,
        schedule=lambda optimizer, total_steps: None, embed_dim=8, micro_batch=micro_batch,
    )  # fmt: skip


def batch_for(module):
    picture = torch.zeros(3, 16, 16, dtype=torch.uint8)
    samples = [Sample(picture, caption, n, n) for n, caption in enumerate(CAPTIONS)]
    return PairCollate(module.tokenizer)(samples)


class Trims(TextEncoder):
    """A user's tower, which does not see its padding and knows nothing of packing."""

    trim_is_exact = True

    def __init__(self, contract, **shape):
        super().__init__(feature_dim=8)
        self.tower = TextTransformer(contract, **shape)

    def forward(self, tokens):
        return self.tower(tokens)


def given_to(inputs):
    """How many tokens the tower's layers are given."""
    tokens, *packed = inputs
    return len(packed[0].places) if packed else tokens.numel()


@pytest.mark.parametrize("overhead", [0, 4096])
@pytest.mark.parametrize(
    ("text", "micro_batch", "shape"),
    [
        (TextTransformer, None, {"heads": 2}),
        (TextTransformer, 2, {"heads": 2}),
        (Trims, None, {"heads": 2}),
        (Trims, 2, {"heads": 2}),
        (BagOfTokens, None, {}),
        # It pools at the last place, so it takes the whole context.
        (TextTransformer, None, {"heads": 2, "pooling": "last"}),
        (TextTransformer, 2, {"heads": 2, "pooling": "last"}),
    ],
)
def test_tokens_are_those_that_the_text_tower_is_given(
    monkeypatch, overhead, text, micro_batch, shape
):
    from clipkit import module as clip_module

    monkeypatch.setitem(clip_module._GROUP_OVERHEAD, "cpu", overhead)
    module = made(text, micro_batch, **shape)
    batch = batch_for(module)
    given = []
    module.text_encoder.register_forward_pre_hook(
        lambda tower, inputs: given.append(given_to(inputs))
    )
    with torch.no_grad():
        module(batch)
    counts = _Counts()
    counts.add(batch, module)
    assert counts.computed_tokens == sum(given)
    real = [len(module.tokenizer([caption])[0]) for caption in CAPTIONS]
    assert max(real) < module.tokenizer.contract.context_length
    assert counts.tokens == sum(real)
    assert counts.squared_tokens == sum(n * n for n in real)
    assert counts.pairs == len(CAPTIONS)


def test_padding_and_tokens_are_logged(fit):
    (line, *_) = fit(THROUGHPUT, "--model.text_encoder.pooling=last")
    context = 77
    tokens, padding = (line[f"throughput/{n}"] for n in ("tokens_per_caption", "padding"))
    assert padding == pytest.approx(1 - tokens / context)


class Reads(TorchDispatchMode):
    """Counts what makes a program wait for its device: numbers read from tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_between_logging_steps(fit):
    def reads(steps, every, *words):
        with Reads() as mode:
            lines = fit(
                *words, "--data=ShapesPairs", f"--data.length={4 * steps}", "--data.batch_size=4",
                "--data.num_workers=0", "--model.optimizer.fused=true",
                f"--trainer.log_every_n_steps={every}", f"--trainer.max_steps={steps}",
                "--trainer.limit_val_batches=0", name=f"{steps}-{every}-{len(words)}",
            )  # fmt: skip
        assert len(values(lines, "padding")) == (2 if words else 0)
        return mode.count

    # The module and Lightning's own bar read a few at every step: what this callback adds counts.
    added = [reads(*run, THROUGHPUT) - reads(*run) for run in ((20, 10), (40, 20))]
    assert added[0] == added[1] > 0


def test_the_runs_own_profiler_is_told_all_and_is_there_afterwards(fit):
    lines = fit(THROUGHPUT, "--trainer.profiler=simple")
    assert values(lines, "data_wait")
    told = []
    inner = SimpleNamespace(start=told.append, stop=told.append, summary=lambda: "all", more=7)
    from contextlib import nullcontext

    entered = []
    outer = _Listening(inner, {FETCH: lambda: entered.append(1) or nullcontext()})
    for action in (FETCH, SAVE):
        with outer.profile(action):
            pass
    assert (told, entered) == ([FETCH, FETCH, SAVE, SAVE], [1])
    assert (outer.summary(), outer.more) == ("all", 7)


def test_a_tower_that_cannot_be_counted_is_trained(fit, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(throughput_module, "image_operations", refuse)
    with pytest.warns(UserWarning, match="throughput/mfu"):
        lines = fit(THROUGHPUT, "--trainer.callbacks.peak_flops=1e9")
    assert values(lines, "padding")
    assert not values(lines, "mfu")


def test_the_bar_shows_it(workdir, pictures):
    import clipkit

    module, data, trainer = clipkit.build(
        "base", "tiny.yaml",
        overrides=[f"data.dataset={pictures}", "trainer.callbacks+=Throughput", "run_name=bar"],
    )  # fmt: skip
    before = trainer.profiler
    trainer.fit(module, data)
    assert trainer.progress_bar_metrics["pairs/s"] > 0
    assert trainer.profiler is before
    logging.getLogger("clipkit").handlers.clear()


def test_a_peak_must_be_positive():
    with pytest.raises(UserError, match="peak_flops: 0"):
        Throughput(peak_flops=0)


@pytest.mark.parametrize(
    ("card", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "bf16-true", 989.4e12),
        ("NVIDIA H100 PCIe", "16-mixed", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-mixed", 312e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", 19.5e12),
        ("NVIDIA A100-SXM4-80GB", "64-true", None),
        ("NVIDIA L40S", "bf16-mixed", 362.05e12),
        ("NVIDIA L4", "bf16-mixed", 121e12),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", None),
        ("NVIDIA RTX 6000 Ada Generation", "bf16-mixed", 364.2e12),
        ("NVIDIA A10G", "bf16-mixed", None),
        ("NVIDIA Tomorrow", "bf16-mixed", None),
    ],
)
def test_stated_peaks(card, precision, expected):
    assert peak_flops(card, precision) == expected


def test_tf32_where_pytorch_is_told_to_use_it():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops("NVIDIA A100-SXM4-40GB", "32-true") == 156e12
        assert peak_flops("Tesla T4", "32-true") == 8.1e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_two_ranks_are_counted_together(workdir, pictures):
    """Under DDP on gloo: rank zero measures, alone, and nobody waits for anybody."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "clipkit.cli", "fit", "-c", "base", "-c", "tiny.yaml"),
            *("--data.dataset", str(pictures), "--run_name=two", THROUGHPUT),
            *("--trainer.callbacks.peak_flops=1e9", "--trainer.devices=2"),
            *("--trainer.strategy=ddp", "--trainer.max_epochs=2"),
        ],
        capture_output=True, text=True, cwd=workdir, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1",
             "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    text = (workdir / "runs" / "tiny" / "two" / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    speeds, used = values(lines, "pairs_per_second"), values(lines, "mfu")
    assert len(speeds) == len(used) == 4
    image = image_operations(ConvNet(image_size=16, widths=(8, 8), feature_dim=16))
    tokens = values(lines, "tokens_per_caption")
    for speed, share, length in zip(speeds, used, tokens, strict=True):
        # A device has half of the pairs, and its own peak.
        pair = 3 * (image + of_caption(length))
        assert share == pytest.approx(pair * speed / 2 / 1e9, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(fit, monkeypatch):
    import time

    words = ["--trainer.accelerator=gpu", "--trainer.devices=1", "--data.num_workers=0"]
    original = PairDataset.__getitem__
    monkeypatch.setattr(PairDataset, "__getitem__", lambda *a: (time.sleep(0.05), original(*a))[1])
    lines = fit(THROUGHPUT, *words, "--trainer.max_epochs=4")
    assert max(values(lines, "data_wait")) <= 1
    assert values(lines, "data_wait")[-1] > 0.5
    assert all(memory > 0 for memory in values(lines, "peak_memory"))
