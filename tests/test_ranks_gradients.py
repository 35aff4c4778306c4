"""Ranks 1, 2 and 4, with and without micro-batches: one gradient, in float64, under DDP itself."""

import functools
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipkit.data.samples import PairCollate, Sample
from clipkit.distributed import gather
from clipkit.losses import Ids, InfoNCELoss, SigLIPLoss
from clipkit.tokenizer import Tokenizer
from tests.test_pieces import CAPTIONS, made

LOSSES = [InfoNCELoss(), SigLIPLoss(duplicates="positive")]
MICRO_BATCHES = [None, 2]


class Step(nn.Module):
    """What `training_step` does to the gradient."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, pairs, offset):
        embeddings = self.module(pairs)
        ids = Ids(pairs["caption_ids"], pairs["image_ids"])
        return self.module.loss(
            *embeddings, *map(gather, embeddings), offset=offset, scale=self.module.scale,
            bias=self.module.temperature.bias, ids=ids, all_ids=Ids(*map(gather, ids)),
        ).loss  # fmt: skip


def share_of(rank, world_size):
    generator = torch.Generator().manual_seed(1)
    captions = [*CAPTIONS, "two red circles and a small green square"]
    pictures = torch.randint(0, 256, (len(captions), 3, 32, 32), generator=generator).byte()
    samples = [Sample(p, c, n, n) for n, (p, c) in enumerate(zip(pictures, captions, strict=True))]
    size = len(samples) // world_size
    return PairCollate(Tokenizer("english"))(samples[rank * size : (rank + 1) * size]), rank * size


def gradients(loss, micro_batch, rank=0, world_size=1):
    module = made(micro_batch, loss=loss)
    step = Step(module)
    if world_size > 1:
        step = DistributedDataParallel(step)
    step(*share_of(rank, world_size)).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def work(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    found = [gradients(loss, size, rank, world_size) for loss in LOSSES for size in MICRO_BATCHES]
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.destroy_process_group()


@functools.cache
def of_ranks(world_size):
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, args=(world_size, folder), nprocs=world_size, start_method="spawn")
        return torch.load(f"{folder}/found")


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_has_the_gradient_of_one(world_size):
    found = iter(of_ranks(world_size))
    for loss in LOSSES:
        expected = gradients(loss, None)
        for _ in MICRO_BATCHES:
            gradient = next(found)
            assert gradient.keys() == expected.keys()
            for name, values in gradient.items():
                torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-10, msg=name)
