"""From one rank to several: pairs a second of a small tower, ours and open_clip's.

python -m benchmarks.ranks [--ranks 2] [--batch 16] [--rounds 7]
python -m benchmarks.ranks --device cuda      (as many ranks as there are devices, nccl)

Every rank has a batch of its own size, so that twice the ranks have twice the work (weak scaling).
On a CPU a rank is a gloo process of one thread, also where there is only one of them: otherwise
the single one would have every core. Both run under DistributedDataParallel, ours with what
`clipkit fit` sets (gradients where they are reduced), open_clip's with its best loss: local_loss
and gather_with_grad. In a turn of one rank, rank zero works on a copy without DDP and the others
wait; so turns of one and of several ranks stand beside each other on the same busy machine.

`scaling` is the pairs a second of all ranks over those of one; at best their number. A contender
that computes less, because it leaves out padding, talks as much and scales less.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.batches import about, batches_of, without_lengths
from benchmarks.interleaved import Seconds, parser, race, ratio, record, shown, spread, table
from benchmarks.models import (
    SHAPES,
    add_precision,
    autocast,
    has_peer,
    module_of,
    optimizer_of,
    peer_of,
    precision_of,
)
from benchmarks.step import our_loss, their_batch, their_loss
from clipkit.data.samples import PairBatch
from clipkit.distributed import gather, rank
from clipkit.losses import Ids
from clipkit.module import CLIPModule

GOALS = {"scaling_of_two": 1.6, "times_as_fast": 1.0}
NUM_BATCHES = 2

Turn = Callable[[], None]


class OurStep(nn.Module):
    """What `training_step` does on a rank."""

    def __init__(self, module: CLIPModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: PairBatch) -> Tensor:
        image, text = self.module(batch)
        ids = Ids(batch["caption_ids"], batch["image_ids"])
        loss: Tensor = self.module.loss(
            image, text, gather(image), gather(text), offset=rank() * len(image),
            scale=self.module.scale, bias=self.module.temperature.bias, ids=ids,
            all_ids=Ids(*map(gather, ids)),
        ).loss  # fmt: skip
        return loss


class TheirStep(nn.Module):
    """What open_clip's loop does on a rank."""

    def __init__(self, peer: nn.Module, world_size: int) -> None:
        super().__init__()
        from open_clip.loss import ClipLoss

        self.peer = peer
        self.criterion = ClipLoss(
            local_loss=True, gather_with_grad=True, cache_labels=True,
            rank=rank(), world_size=world_size,
        )  # fmt: skip

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return their_loss(self.peer, self.criterion, batch)


# --- On a rank -----------------------------------------------------------------------------------


def work(number: int, options: argparse.Namespace, folder: str) -> None:
    """Race one rank against all of them, and let rank zero write what it saw."""
    torch.set_num_threads(1)
    device = "cpu"
    if options.device == "cuda":
        torch.cuda.set_device(number)
        device = f"cuda:{number}"
    dist.init_process_group(
        "nccl" if options.device == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous", rank=number, world_size=options.ranks,
    )  # fmt: skip
    seconds = race(turns(options, device), rounds=options.rounds, device=options.device)
    if number == 0:
        torch.save(seconds, f"{folder}/seconds")
    dist.destroy_process_group()


def turns(options: argparse.Namespace, device: str) -> dict[str, Turn]:
    """Return the turns of this rank; all ranks wait for one another before and after each."""
    shape = SHAPES[options.model]
    batches = batches_of(NUM_BATCHES, options.batch, shape.image_size, device)
    module = module_of(options.model).to(device)
    padded = [without_lengths(batch) for batch in batches]
    alone = copy.deepcopy(module)
    # One wrapper for both kinds of batches: two would hook the same gradients.
    shared = wrapped(OurStep(module), gradient_as_bucket_view=True)
    found = turns_of("clipkit", partial(our_loss, alone), alone, shared, batches, options)
    found |= turns_of("clipkit, padded", partial(our_loss, alone), alone, shared, padded, options)
    if has_peer():
        peer = peer_of(options.model, device)
        theirs = [their_batch(module, batch) for batch in padded]
        single = copy.deepcopy(peer)
        shared = wrapped(TheirStep(peer, options.ranks), gradient_as_bucket_view=False)
        found |= turns_of("open_clip", TheirStep(single, 1), single, shared, theirs, options)
    return found


def wrapped(step: nn.Module, *, gradient_as_bucket_view: bool) -> DistributedDataParallel:
    """Return the step under DDP."""
    return DistributedDataParallel(step, gradient_as_bucket_view=gradient_as_bucket_view)


def turns_of(
    name: str, loss: Callable[[Any], Tensor], alone: nn.Module, shared: nn.Module,
    batches: list[Any], options: argparse.Namespace,
) -> dict[str, Turn]:  # fmt: skip
    """Return a contender's turn on rank zero alone, and the one on all ranks."""
    only_first: Turn = lambda: None  # noqa: E731
    if rank() == 0:
        only_first = training(loss, alone, batches, options)
    return {
        f"{name}, 1 rank": together(only_first),
        f"{name}, {options.ranks} ranks": together(training(shared, shared, batches, options)),
    }


def training(
    loss_of: Callable[[Any], Tensor], model: nn.Module, batches: list[Any],
    options: argparse.Namespace,
) -> Turn:  # fmt: skip
    """Return what makes one step on each batch."""
    optimizer = optimizer_of(model)

    def turn() -> None:
        for batch in batches:
            optimizer.zero_grad()
            with autocast(options.precision, options.device):
                loss = loss_of(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return turn


def together(turn: Turn) -> Turn:
    """Return a turn that is over when every rank's is."""

    def shared() -> None:
        dist.barrier()
        turn()
        dist.barrier()

    return shared


# --- All ranks -----------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> Seconds:
    """Start the ranks and return the seconds that rank zero saw."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(  # type: ignore[no-untyped-call]
            work, args=(options, folder), nprocs=options.ranks, start_method="spawn"
        )
        found: Seconds = torch.load(Path(folder) / "seconds")
        return found


def figures(seconds: Seconds, options: argparse.Namespace) -> dict[str, Any]:
    """Return rates, how they scale, and how ours compare with open_clip's on all ranks."""
    names = list(dict.fromkeys(name.rpartition(", ")[0] for name in seconds))
    several = f"{options.ranks} ranks"
    rates = {
        name: [
            NUM_BATCHES * options.batch * (1 if name.endswith("1 rank") else options.ranks) / s
            for s in values
        ]
        for name, values in seconds.items()
    }
    found: dict[str, Any] = {
        "pairs_per_second": {name: spread(values) for name, values in rates.items()},
        "scaling": {n: ratio(rates[f"{n}, {several}"], rates[f"{n}, 1 rank"]) for n in names},
    }
    if "open_clip" in names:
        theirs = rates[f"open_clip, {several}"]
        found["times_as_fast"] = {
            n: ratio(rates[f"{n}, {several}"], theirs) for n in names if n != "open_clip"
        }
    return found


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    options_of = parser(__doc__, rounds=7, threads=1)
    options_of.add_argument("--model", choices=SHAPES, default=None, help="ViT-S-32 without a GPU")
    options_of.add_argument("--batch", type=int, default=None, help="pairs a rank: 16, or 512")
    options_of.add_argument("--ranks", type=int, default=None, help="2, or the devices there are")
    add_precision(options_of)
    options = options_of.parse_args()
    gpu = options.device == "cuda"
    options.model = options.model or ("ViT-B-32" if gpu else "ViT-S-32")
    options.batch = options.batch or (512 if gpu else 16)
    options.ranks = options.ranks or (torch.cuda.device_count() if gpu else 2)
    options.precision = precision_of(options)
    if options.ranks < 2:
        options_of.error("there is one device alone, so there is nothing to scale to")
    torch.set_num_threads(1)
    found = figures(measure(options), options)
    result = {
        "threads_a_rank": 1,
        "batches": about(batches_of(NUM_BATCHES, options.batch, 8, "cpu")),
        "parameters": sum(p.numel() for p in module_of(options.model).parameters()),
        **found,
        "must_show": GOALS,
    }
    path = record("ranks-gpu" if gpu else "ranks", options, result)
    rows = [("contender", "pairs/s of 1", f"of {options.ranks}", "scaling", "times as fast")]
    for name, scaling in found["scaling"].items():
        several = f"{options.ranks} ranks"
        rates = (found["pairs_per_second"][f"{name}, {n}"] for n in ("1 rank", several))
        fast = found.get("times_as_fast", {}).get(name)
        rows.append((name, *map(shown, rates), shown(scaling), shown(fast) if fast else ""))
    table(rows)
    print(path)


if __name__ == "__main__":
    main()
