"""One, two and three gloo processes find the same outcomes, each sample counted once."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from clipkit.encoders import BagOfTokens, ConvNet
from clipkit.errors import UserError
from clipkit.heads import LinearHead
from clipkit.losses import InfoNCELoss
from clipkit.module import CLIPModule
from clipkit.suite import EvalData
from clipkit.suite.embedder import ModuleEmbedder
from clipkit.suite.opening import Splits, open_data
from clipkit.suite.tasks import Retrieval, ZeroShot
from clipkit.temperature import Temperature
from clipkit.tokenizer import Tokenizer

ROWS = 23  # no multiple of two or three


def module():
    torch.manual_seed(0)
    return CLIPModule(
        image_encoder=ConvNet(image_size=16, widths=(8,), feature_dim=16),
        text_encoder=lambda contract: BagOfTokens(contract, width=16),
        tokenizer=Tokenizer("english"), image_head=LinearHead, text_head=LinearHead,
        temperature=Temperature(), loss=InfoNCELoss(), optimizer=torch.optim.AdamW,
        schedule=lambda optimizer, total_steps: None, embed_dim=8,
    ).eval()  # fmt: skip


def evaluate(rank, world_size, store, folder, result):
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
    embedder = ModuleEmbedder(module())
    found = {}
    try:
        for task in (ZeroShot(), Retrieval()):
            opened = open_data(EvalData(path=folder, split="train", limit=ROWS))
            measured = task.measure(embedder, Splits(task.arrange(opened)))
            found[task.kind] = (
                {name: metric.value for name, metric in measured.metrics.items()},
                [(one.metric, one.row, one.group, one.outcome) for one in measured.outcomes],
            )
    except UserError as error:
        found = {"error": error.sentence}
    torch.save(found, f"{result}-{rank}")
    if world_size > 1:
        dist.destroy_process_group()


def outcomes_of(world_size, folder):
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (world_size, f"{scratch}/store", str(folder), f"{scratch}/found")
        if world_size == 1:
            evaluate(0, *arguments)
        else:
            mp.spawn(evaluate, arguments, nprocs=world_size)
        return [
            torch.load(f"{scratch}/found-{rank}", weights_only=True) for rank in range(world_size)
        ]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_the_same(pictures, world_size):
    (alone,) = outcomes_of(1, pictures)
    for found in outcomes_of(world_size, pictures):
        for kind, (metrics, outcomes) in found.items():
            assert metrics == pytest.approx(alone[kind][0], abs=1e-6)
            for (name, *tensors), (expected, *others) in zip(outcomes, alone[kind][1], strict=True):
                assert name == expected
                assert all(map(torch.equal, tensors, others)), name
            assert len(alone[kind][1][0][1]) == ROWS


def test_ranks_end_together_at_one_broken_picture(pictures, tmp_path):
    import shutil

    shutil.copytree(pictures, tmp_path / "broken")
    (tmp_path / "broken" / "0003.png").write_bytes(b"no picture")
    errors = [found["error"] for found in outcomes_of(2, tmp_path / "broken")]
    assert sum("'0003'" in error for error in errors) == 1
    assert sum("another rank" in error for error in errors) == 1
