"""Two nodes started by torchrun, on one machine over the loopback: the run of one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.test_ranks import ENVIRONMENT, VIT, fit


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def node(rank, port, workdir, words):
    """One of two nodes, as docs/many_gpus.md starts it, with a process of its own."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *(f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}"),
            *("-m", "clipkit.cli", "fit", *words),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=workdir,
        # A database that is not there yet, as in an empty folder: one rank alone may make it.
        env={**os.environ, **ENVIRONMENT, "MLFLOW_TRACKING_URI": f"sqlite:///{workdir}/new.db"},
    )  # fmt: skip


def test_two_nodes_are_one_run(workdir, pictures):
    one, _ = fit(workdir, pictures, "one", "--trainer.max_epochs=1")
    (workdir / "vit.yaml").write_text(VIT)
    words = ["-c", "base", "-c", "tiny.yaml", "-c", "vit.yaml", "--data.dataset", str(pictures)]
    words += ["--run_name=two", "--trainer.callbacks+=ZeroShotRetrieval"]
    words += ["--trainer.callbacks.datasets={own: {split: train}}"]
    words += [
        "--trainer.max_epochs=1",
        "--trainer.num_nodes=2",
        "--trainer.devices=1",
        "--trainer.strategy=ddp",
    ]
    port = free_port()
    nodes = [node(rank, port, workdir, words) for rank in range(2)]
    try:
        outputs = [each.communicate(timeout=180)[0] for each in nodes]
    finally:
        for each in nodes:
            each.kill()
    assert [each.returncode for each in nodes] == [0, 0], "\n".join(outputs)
    folders = sorted(path.name for path in (workdir / "runs" / "tiny").iterdir())
    assert folders == ["one", "two"]
    lines = (Path("runs") / "tiny" / "two" / "metrics.jsonl").read_text().splitlines()
    two = [json.loads(line) for line in lines]
    assert len(one) == len(two)
    for alone, shared in zip(one, two, strict=True):
        assert alone.keys() == shared.keys()
        for name in alone.keys() - {"time"}:
            assert abs(shared[name] - alone[name]) <= 1e-6 * max(1, abs(alone[name])), name
    # Rank zero speaks for all; the second node says nothing of its own.
    assert outputs[0].count("run: ") == 1
    assert "run: " not in outputs[1]
