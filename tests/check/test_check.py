"""`clipkit check` through the command line: what it finds, what it catches, what it leaves."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import clipkit.compiling
import clipkit.module

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(__file__).parents[2]),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
RANKS = ["--trainer.devices=2", "--trainer.strategy=ddp"]
ROWS = [
    *("model", "data", "batch", "precision", "verdict", "largest difference", "compared"),
    *("one process has", "pairs a second", "waiting for data", "to the end", "peak memory"),
    *("largest micro-batch", "captions cut", "captions repeated", "pictures repeated", "seen"),
]

# Parts of a user's own, some of them wrong.
MY_CODE = """\
import torch
import clipkit.module
from clipkit.distributed import gather, world_size
from clipkit.encoders import ConvNet
from clipkit.heads import LinearHead
from clipkit.losses import InfoNCELoss


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.factor * gradient, None


class ScaleTooLarge(InfoNCELoss):  # as many times as there are ranks
    def forward(self, *arguments, scale, **keywords):
        return super().forward(*arguments, scale=Scaled.apply(scale, world_size()), **keywords)


class WithoutGradient(ConvNet):
    def __init__(self):
        super().__init__(image_size=16, widths=(8, 8), feature_dim=16)
        clipkit.module.gather = lambda rows: gather(rows.detach())


class Unused(LinearHead):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__(in_dim, out_dim)
        self.forgotten = torch.nn.Parameter(torch.ones(3))


class Noise(LinearHead):
    size = 1e-7  # as float32 would round

    def forward(self, features):
        found = super().forward(features)
        return found * (1 + self.size * torch.randn_like(found))


class MuchNoise(Noise):
    size = 1e-2


class CutMatters(LinearHead):  # the mean of what lies in the same micro-batch
    def forward(self, features):
        return super().forward(features - features.mean(0))
"""


@pytest.fixture
def folder(workdir):
    (workdir / "my_code.py").write_text(MY_CODE)
    return workdir


@pytest.fixture
def check(folder, pictures, command, capsys, monkeypatch):
    """Runs the command in this process, for a short time; gives its exit code and its page."""
    monkeypatch.setattr("clipkit.check.memory.SECONDS", 1.0)
    monkeypatch.setattr("clipkit.check.speed.SECONDS", 1.0)

    def run(*words, data=pictures):
        before = sorted(folder.rglob("*"))
        code = command("check", "-c", "base", "-c", "tiny.yaml", "--data.dataset", data, *words)
        left = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
        assert sorted(left) == before, "nothing is written"
        return code, capsys.readouterr()

    return run


def in_processes(folder, pictures, *words):
    """Runs the real command."""
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "clipkit.cli", "check", "-c", "base", "-c", "tiny.yaml",
         "--data.dataset", str(pictures), *words],
        capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=300, check=False,
    )  # fmt: skip
    left = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    assert sorted(left) == before
    assert "Traceback" not in done.stderr, done.stderr
    return done


def value(page, label):
    """What stands behind a label."""
    (line,) = [line for line in page.splitlines() if line.strip().startswith(f"{label}  ")]
    return line.strip().removeprefix(label).strip()


def test_a_run_that_is_well(check):
    code, (page, error) = check("--model.micro_batch=3", "--trainer.max_epochs=8")
    assert code == 0, page + error
    assert error == ""
    assert [line.split("  ")[1] for line in page.splitlines() if line.startswith("  ")] == ROWS
    assert "the run and one process agree" in page
    assert value(page, "batch") == "8 pairs a step over 1 rank, 3 at a time"
    # The towers' batch norm, which depends on the micro-batch, is held still.
    assert value(page, "compared").endswith("on 8 pairs in float64; held still: batch norm")
    assert float(value(page, "largest difference").split()[0]) < 1e-8
    assert float(value(page, "pairs a second").split()[0]) > 0
    assert " for 16 steps of 8 pairs" in value(page, "to the end")
    assert value(page, "captions cut") == "0.0 % are longer than 77 tokens"


def test_two_ranks_that_are_well(folder, pictures):
    dropout = "--model.text_encoder.dropout=0.5"
    done = in_processes(
        folder, pictures, *RANKS, "--model.micro_batch=3", dropout, "--trainer.max_epochs=2"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = done.stdout
    assert "2 ranks and one process agree" in page
    assert value(page, "compared").endswith("held still: batch norm, dropout")
    # Rank zero speaks for all.
    assert [line.split("  ")[1] for line in page.splitlines() if line.startswith("  ")] == ROWS
    assert value(page, "seen") == "32 training pairs"


@pytest.mark.parametrize(
    ("words", "parameter", "hint"),
    [
        ("--model.image_encoder=my_code.WithoutGradient", "", "a gather that carries no gradient"),
        ("--model.loss=my_code.ScaleTooLarge", "temperature.log_scale", "2 times the gradient"),
        ("--model.text_head=my_code.Unused", "text_head.forgotten", "for whose gradient DDP waits"),
    ],
)
def test_two_ranks_that_are_not(folder, pictures, words, parameter, hint):
    done = in_processes(folder, pictures, *RANKS, words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert parameter in done.stdout
    assert hint in done.stdout
    assert "not to be trained" in done.stdout
    assert "pairs a second" not in done.stdout


def test_a_gradient_of_the_scale_that_is_too_large(check, monkeypatch):
    """In clipkit's own loss, whose reference is the paper's formula."""
    from clipkit.losses.info_nce import _TiledInfoNCE

    backward = _TiledInfoNCE.backward

    def wrong(ctx, *upstream):
        rows, columns, scale, settings = backward(ctx, *upstream)
        return rows, columns, 4 * scale, settings

    monkeypatch.setattr(_TiledInfoNCE, "backward", staticmethod(wrong))
    code, (page, _) = check()
    assert code == 1
    assert value(page, "verdict").endswith("DIFFER: 1 of 40 parameters")
    difference = value(page, "largest difference")
    assert difference.endswith("of temperature.log_scale (up to 1e-08 is rounding)")
    assert "temperature.log_scale has 4 times the gradient" in page


def test_a_tower_whose_result_depends_on_the_cut(check):
    words = ["--model.image_head=my_code.CutMatters"]
    assert check(*words)[0] == 0
    code, (page, _) = check(*words, "--model.micro_batch=3")
    assert code == 1
    assert "depends on how the batch is cut" in page


@pytest.mark.parametrize("tower", ["image", "text"])
def test_compiled_towers_are_those_that_are_checked(check, monkeypatch, tower):
    monkeypatch.setattr(clipkit.compiling, "BACKEND", "eager")
    assert check("--model.compile=true")[0] == 0

    def without_gradient(encoder):
        return lambda *inputs: encoder(*inputs).detach()

    monkeypatch.setattr(clipkit.module, f"compiled_{tower}_tower", without_gradient)
    code, (page, _) = check("--model.compile=true")
    assert code == 1
    assert "DIFFER" in value(page, "verdict")


def test_pictures_that_grow_are_checked_at_their_largest(check):
    sizes = ["--data.image_sizes={0: 8, 1: 16, 9: 32}", "--trainer.max_epochs=4"]
    code, (page, error) = check(*sizes)
    assert code == 0, page + error
    assert value(page, "pictures").startswith("16 px, the largest of data.image_sizes")
    assert value(page, "to the end").startswith("at most ")


def test_a_model_that_rounds_is_allowed_as_much(check):
    code, (page, _) = check("--model.text_head=my_code.Noise")
    assert code == 0, page
    assert "as far as the model's own rounding lets them" in page
    code, (page, _) = check("--model.text_head=my_code.MuchNoise")
    assert code == 1, page


def test_a_parameter_that_nothing_uses_is_named(check):
    code, (page, _) = check("--model.text_head=my_code.Unused")
    assert code == 0
    assert value(page, "without a gradient") == "text_head.forgotten"


@pytest.mark.parametrize(
    "words",
    [
        ["--model.loss=SigLIPLoss", "--model.temperature.bias=prior"],
        ["--trainer.accumulate_grad_batches=2", "--model.lock_image=0"],
    ],
)
def test_other_runs_that_are_well(check, words):
    code, (page, error) = check(*words)
    assert code == 0, page + error
    assert "agree" in value(page, "verdict")


def test_repeats_and_cut_captions_are_counted(check, folder, pictures):
    lines = [f"{pictures}/{n:04d}.png,{'a ' * 100 if n % 4 else 'short'}" for n in range(16)]
    (folder / "pairs.csv").write_text("\n".join(["filepath,caption", *lines]) + "\n")
    words = ["--data.augment=false", "--trainer.max_epochs=4", f"--data.image_folder={pictures}"]
    code, (page, _) = check(*words, data="pairs.csv")
    assert code == 0
    cut = float(value(page, "captions cut").split()[0])
    assert 50 < cut < 100
    assert value(page, "captions repeated").startswith("100.0 % within their batch")
    assert value(page, "pictures repeated").startswith("0.0 %")


def test_a_checkpoint_is_checked_where_it_stands(check, folder, pictures, command, capsys):
    fit = ["-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures, "--run_name=run"]
    assert command("fit", *fit) == 0
    capsys.readouterr()
    last = "runs/tiny/run/checkpoints/last.ckpt"
    code, (page, _) = check("--ckpt_path", last, "--trainer.max_epochs=3")
    assert code == 0
    assert " for 4 steps of 8 pairs" in value(page, "to the end")


@pytest.mark.parametrize(
    "words",
    [
        ["--model.optimzer.lr=1"],
        ["--data.batch_size=64"],
        ["--data.caption_column=captoin"],
        ["-c", "emojy"],
        ["--trainer.callbacks+=ZeroShotRetrieval",
         "--trainer.callbacks.datasets={own: {split: x}}"],
        ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
         "--trainer.callbacks.monitor=val/lss"],
    ],
)  # fmt: skip
def test_what_fit_refuses_is_refused_in_the_same_words(check, command, capsys, pictures, words):
    code, (_, error) = check(*words)
    assert code == 2
    assert error.startswith("clipkit: ")
    assert error.count("\n") == 1
    fit = ["-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures]
    assert command("fit", *fit, *words) == 2
    assert capsys.readouterr().err == error


@pytest.mark.filterwarnings("ignore:.*the warm-up.*")
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--trainer.limit_train_batches=0"], "makes no step"),
        (["--trainer.strategy=ddp_spawn", "--trainer.devices=2"], "trainer.strategy"),
    ],
)
def test_what_cannot_be_checked(check, words, part):
    code, (_, error) = check(*words)
    assert code == 2
    assert part in error
    assert error.count("\n") == 1


def test_an_error_is_not_taken_for_other_gradients(check, monkeypatch):
    def broken(self):
        raise RuntimeError("out of paper")

    monkeypatch.setattr("clipkit.check.command.Check._check", broken)
    code, (_, error) = check()
    assert code == 70
    assert error.endswith("RuntimeError: out of paper\n")


def test_ctrl_c_ends_it_and_its_ranks(folder, pictures):
    process = subprocess.Popen(
        [sys.executable, "-m", "clipkit.cli", "check", "-c", "base", "-c", "tiny.yaml",
         "--data.dataset", str(pictures), "--trainer.max_epochs=10000", *RANKS],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=folder,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), start_new_session=True,
    )  # fmt: skip
    try:
        page = ""
        while "verdict" not in page and process.poll() is None:
            page += process.stdout.readline()
        time.sleep(3)  # into the training
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, page + output
    assert "nothing was written" in output
    assert "Traceback" not in output
    with pytest.raises(ProcessLookupError):  # no rank is left
        os.killpg(process.pid, 0)
