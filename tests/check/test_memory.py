"""Memory that is known, and what is said of it."""

import contextlib

import pytest
import torch

from clipkit.check import memory
from clipkit.check.memory import largest_micro_batch, peak_of_process, reset_peak
from clipkit.losses import InfoNCELoss
from tests.test_pieces import batch, made

linux = pytest.mark.skipif(peak_of_process() is None, reason="the system knows no peak")


def tried(module, **settings):
    settings = {"fits": 4, "processes": 1} | settings
    return largest_micro_batch(module, batch(), contextlib.nullcontext, **settings)


@linux
def test_a_peak_that_has_passed_is_forgotten():
    reset_peak()
    before = peak_of_process()
    block = torch.ones(2**26)  # 256 MiB
    assert peak_of_process() - before > 2**27
    del block
    reset_peak()
    assert peak_of_process() - before < 2**27


class Hungry(torch.nn.Module):
    """A head that keeps a megabyte a pair for its gradient."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.layer = torch.nn.Linear(in_dim, out_dim)

    def forward(self, features):
        wide = self.layer(features)[:, :, None] * torch.ones(2**14, dtype=features.dtype)
        return wide.exp().mean(2)  # (B, 8, 16384) twice: 1 MiB of eight bytes each


@linux
def test_the_estimate_is_what_a_pair_takes(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 2**30)
    found = tried(made(head=Hungry))
    assert 2**20 < found.bytes_per_pair < 2**23
    assert found.pairs == int(found.available / found.bytes_per_pair)
    assert tried(made(head=Hungry), processes=2).available == found.available / 2


@linux
def test_trying_leaves_room(monkeypatch):
    """It ends at a quarter of the free memory."""
    monkeypatch.setattr(memory, "available_memory", lambda: 2**26)
    sizes = []
    run = memory._run
    monkeypatch.setattr(memory, "_run", lambda *a: (sizes.append(a[3]), run(*a)))
    tried(made(head=Hungry))
    assert sizes[-1] < 128


def test_a_system_without_a_peak_gives_no_estimate(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "nothing")
    assert tried(made()).pairs is None


def test_the_available_memory_is_the_containers(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 64 kB\nMemAvailable:   32 kB\n")
    (tmp_path / "max").write_text("10000\n")
    (tmp_path / "current").write_text("4000\n")
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CONTAINERS", ())
    assert memory.available_memory() == 32 * 1024
    container = (str(tmp_path), "max", "current", "unneeded")
    monkeypatch.setattr(memory, "_CONTAINERS", (container,))
    # What was read from files, and can be read again, is free to take.
    (tmp_path / "memory.stat").write_text("anon 5\nunneeded 3000\n")
    assert memory.available_memory() == 9000
    (tmp_path / "memory.stat").write_text("anon 5\n")
    assert memory.available_memory() == 6000
    (tmp_path / "max").write_text("max\n")
    assert memory.available_memory() == 32 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_card_is_tried_until_it_is_full():
    module = made(loss=InfoNCELoss(), head=Hungry).cuda()
    pairs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch().items()}
    torch.cuda.set_per_process_memory_fraction(0.05)
    found = largest_micro_batch(module, pairs, contextlib.nullcontext, fits=4, processes=1)
    assert found.refused == 2 * found.pairs
