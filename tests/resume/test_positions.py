"""A run that ends in any hook, at any step, and goes on: bit by bit the run that did not end."""

from pathlib import Path

import pytest

from tests.resume.conftest import Run

CRASH = """\
from lightning.pytorch.callbacks import Callback


class Crash(Callback):
    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self.maybe)

    def maybe(self, trainer, *_, **__):
        if trainer.global_step >= self.step and trainer.state.fn == "fit":
            raise RuntimeError("crash")
"""
EVERY_STEP = ["--trainer.callbacks+=LastCheckpoint", "--trainer.callbacks.every_n_steps=1"]
RETRIEVAL = [
    "--trainer.callbacks+=ZeroShotRetrieval", "--trainer.callbacks.datasets={own: {split: train}}",
    "--trainer.callbacks.every_n_epochs=2",
]  # fmt: skip
CHOOSING = [
    *RETRIEVAL,
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.monitor=retrieval/own/text_to_image_r1",
    "--trainer.callbacks.mode=max", "--trainer.callbacks.filename=best",
]  # fmt: skip


@pytest.fixture
def fit(recipe, command, monkeypatch, workdir):
    (workdir / "my_code.py").write_text(CRASH)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.syspath_prepend(str(workdir))
    yield lambda name, *words: command(*recipe, f"--run_name={name}", *words)
    torch.set_num_threads(threads)


def crash(hook, step):
    return [
        "--trainer.callbacks+=my_code.Crash",
        f"--trainer.callbacks.hook={hook}", f"--trainer.callbacks.step={step}",
    ]  # fmt: skip


# At a step of the second epoch of three: the last is its end.
HOOKS = [
    ("on_before_optimizer_step", 0.5),
    ("on_train_batch_end", 0.5),
    ("on_train_batch_end", 2 / 3),
    ("on_validation_batch_end", 2 / 3),
    ("on_validation_end", 2 / 3),
    ("on_train_epoch_end", 2 / 3),
    ("on_train_epoch_start", 2 / 3),
    ("on_train_batch_start", 2 / 3),
    ("on_train_end", 1),
]


VARIANTS = {
    "plain": [],
    "evaluated": [*RETRIEVAL, "--data.num_workers=2"],
    "choosing": CHOOSING,
    "accumulated": ["--trainer.accumulate_grad_batches=2", "--data.batch_size=2"],
    "validated within": ["--trainer.val_check_interval=2"],
    "in pieces": ["--model.micro_batch=2", "--data.captions=all", "--data.cache_tokens=true"],
}


def assert_goes_on_alike(fit, words, hooks):
    assert fit("whole", *words) == 0
    whole = Run("runs/again/whole")
    for number, (hook, share) in enumerate(hooks):
        name = f"crash{number}"
        step = round(share * whole.steps)
        with pytest.raises(RuntimeError, match="crash"):
            fit(name, *words, *EVERY_STEP, *crash(hook, step))
        assert fit(name, *words, *EVERY_STEP, "--ckpt_path=last") == 0, hook
        Run(f"runs/again/{name}").assert_same(whole)
    names = ["whole", *(f"crash{number}" for number in range(len(hooks)))]
    assert sorted(path.name for path in Path("runs/again").iterdir()) == sorted(names)


def test_the_run_is_the_same(fit):
    words = [*VARIANTS["choosing"], "--data.num_workers=1"]
    assert_goes_on_alike(fit, words, [("on_train_batch_end", 0.5), ("on_validation_end", 2 / 3)])


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_run_is_the_same_in_every_hook(fit, variant):
    assert_goes_on_alike(fit, VARIANTS[variant], HOOKS)
