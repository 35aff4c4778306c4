"""Real gloo processes that load a stream, without anything being trained."""

import json
import time
import warnings
from datetime import timedelta

import torch.distributed as dist
import torch.multiprocessing as mp

from clipkit.data import HuggingFacePairs
from clipkit.data.streaming import Streaming
from clipkit.resume import Position
from clipkit.tokenizer import Tokenizer

SECONDS = 60
"""What no loading may take without a batch."""


class OfRank(HuggingFacePairs):
    """A data module that knows its rank without a trainer."""

    _rank = property(lambda self: dist.get_rank())
    _world_size = property(lambda self: dist.get_world_size())


def load(case):
    """Batches of a rank: what a case is, its keys say.

    path, batch (of a rank), workers, epochs, options; `stop`: the epoch and batch to end before;
    `start` and `state`: what an earlier case ended with.
    """
    options = {"shuffle_window": 8, "open_shards": 2, **case.get("options", {})}
    data = OfRank(
        case["path"], streaming=Streaming(**options), num_workers=case.get("workers", 0),
        batch_size=case["batch"] * dist.get_world_size(), image_size=8, seed=3,
        captions=case.get("captions", "random"), tokenizer=Tokenizer("english"),
    )  # fmt: skip
    data.setup("fit")
    start = Position(*case.get("start", (0, 0)))
    data._streamed.go_on(start, case.get("state"))
    loader = data.train_dataloader()
    stop = case.get("stop")
    epochs = []
    try:
        for epoch in range(start.epoch, case.get("epochs", 1)):
            loader.sampler.set_epoch(epoch)
            epochs.append([])
            done = start.batches if epoch == start.epoch else 0
            for number, batch in enumerate(loader, start=done):
                if stop is not None and (epoch, number) == tuple(stop):
                    state = data._streamed.state(Position(epoch, number))
                    return {"epochs": epochs, "state": state}
                epochs[-1].append(
                    {
                        "rows": batch["rows"].tolist(),
                        "sum": batch["images"].sum().item(),
                        "broken": [broken._asdict() for broken in batch["broken"]],
                    }
                )
        return {"epochs": epochs}
    finally:
        data.teardown("fit")


def _work(rank, world_size, folder, cases):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=SECONDS),
    )  # fmt: skip
    warnings.filterwarnings("ignore", ".*worker processes in total.*")
    found = []
    for case in cases:
        began = time.monotonic()
        found.append(load(case) | {"seconds": time.monotonic() - began})
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.destroy_process_group()


def of_ranks(world_size, folder, cases):
    """For each case what the ranks found, in order."""
    folder.mkdir()
    mp.start_processes(
        _work, args=(world_size, str(folder), cases), nprocs=world_size, start_method="fork"
    )
    by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]
    return [list(of_case) for of_case in zip(*by_rank, strict=True)]


def assert_even(ranks):
    """All ranks made the same steps, of whole batches, and no sample came twice in an epoch."""
    for epoch in zip(*(rank["epochs"] for rank in ranks), strict=True):
        assert len({len(batches) for batches in epoch}) == 1
        assert len({len(batch["rows"]) for batches in epoch for batch in batches}) == 1
        rows = rows_of(epoch)
        assert len(rows) == len(set(rows))
    assert all(rank["seconds"] < SECONDS for rank in ranks)


def rows_of(epoch):
    """The rows that ranks saw in an epoch, without those that stood in for others."""
    return [row for batches in epoch for batch in batches for row in own_rows(batch)]


def own_rows(batch):
    """The rows of a batch, a stand-in counted as the row in whose place it stands."""
    return list(dict.fromkeys(batch["rows"])) + [broken["row"] for broken in batch["broken"]]
