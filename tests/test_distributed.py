"""Two gloo processes give the gradients of one process with the whole batch, in float64."""

import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F

from clipkit import distributed
from clipkit.distributed import (
    any_rank,
    gather,
    gather_ragged,
    least,
    sums_of_ranks,
    told_by_ranks,
)
from clipkit.errors import UserError
from clipkit.losses import Ids, InfoNCELoss, SigLIPLoss
from clipkit.temperature import Temperature
from tests.test_pieces import made

BATCH, DIM = 8, 5
CASES = [
    InfoNCELoss(label_smoothing=0.1),
    InfoNCELoss(duplicates="positive"),
    SigLIPLoss(),
    SigLIPLoss(duplicates="positive"),
]


def towers():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "image": nn.Linear(7, DIM),
            "text": nn.Linear(7, DIM),
            "temperature": Temperature(bias=-2.0),
        }
    )
    return model.double()


def pairs():
    generator = torch.Generator().manual_seed(1)
    images, texts = (
        torch.randn(BATCH, 7, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    captions = torch.tensor([0, 1, 2, 3, 1, 5, 0, 7])  # repeats across the two halves
    return images, texts, Ids(captions, torch.arange(100, 100 + BATCH))


def gradients(loss, rank, world_size):
    """Gradients of this rank's loss, averaged over ranks as DDP does."""
    model = towers()
    share = BATCH // world_size
    images, texts, ids = (pairs()[0], pairs()[1], pairs()[2])
    mine = slice(rank * share, (rank + 1) * share)
    image = F.normalize(model["image"](images[mine]), dim=-1)
    text = F.normalize(model["text"](texts[mine]), dim=-1)
    own = Ids(*(i[mine] for i in ids))
    terms = loss(
        image, text, gather(image), gather(text), offset=rank * share,
        scale=model["temperature"].scale, bias=model["temperature"].bias,
        ids=own, all_ids=Ids(*map(gather, own)),
    )  # fmt: skip
    terms.loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.clone() if parameter.grad is not None else torch.zeros(())
        if world_size > 1:
            dist.all_reduce(gradient)
        found[name] = gradient / world_size
    return found


def refusal(bad):
    """What is said on saving after a step whose loss was bad, or not, on this rank."""
    module = made(loss=SigLIPLoss())
    module._note_non_finite(torch.tensor(float("nan") if bad else 1.0))
    try:
        module.on_save_checkpoint({})
    except UserError as error:
        return str(error)
    return "saved"


def what_is_told(rank):
    told = told_by_ranks([f"from {rank}"] * rank)
    return any_rank(rank == 1), any_rank(False), sums_of_ranks([rank, 7]), told, told_by_ranks([])


def work(rank, world_size, file, queue):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    results = [gradients(loss, rank, world_size) for loss in CASES]
    ragged = gather_ragged(torch.arange(rank + 1) + 10 * rank).tolist()
    said = least(torch.tensor(5 - rank)).item(), refusal(bad=rank == 1)
    told = what_is_told(rank)
    # As where the training is nccl's: a group of their own, made once.
    distributed.dist.get_backend = lambda *_: "another"
    told_beside = [what_is_told(rank) for _ in range(2)]
    assert len(distributed._GROUPS) == 1
    if rank == 0:
        numbers = [{k: v.tolist() for k, v in r.items()} for r in results]
        queue.put((numbers, ragged, said, [told, *told_beside]))
        queue.join()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks():
    context = mp.get_context("spawn")
    queue = context.JoinableQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.start_processes(
            work, args=(2, f"{folder}/rendezvous", queue), nprocs=2, join=False
        )
        found = queue.get(timeout=120)
        queue.task_done()
        processes.join()
    return found


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_ranks_give_the_gradients_of_one(two_ranks, case):
    for name, expected in gradients(CASES[case], 0, 1).items():
        found = torch.tensor(two_ranks[0][case][name], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_ragged_rows_arrive_in_rank_order(two_ranks):
    assert two_ranks[1] == [0, 10, 11]


def test_a_loss_that_is_bad_on_one_rank_is_refused_by_all(two_ranks):
    """With SigLIP the others' loss is good, and their gradient is not."""
    lowest, said = two_ranks[2]
    assert lowest == 4
    assert said.startswith("the loss became non-finite at step 0")
    assert refusal(bad=False) == "saved"


def test_ranks_tell_one_another_beside_the_training(two_ranks):
    assert two_ranks[3] == [(True, False, [1, 14], ["from 1"], [])] * 3


def test_one_process_tells_itself():
    assert what_is_told(0) == (False, False, [0, 7], [], [])
    assert what_is_told(1) == (True, False, [1, 7], ["from 1"], [])


def test_one_process_is_the_identity():
    rows = torch.randn(3, 2)
    assert gather(rows) is rows
    assert gather_ragged(rows) is rows
