"""A tiny run and what its journal says."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def fit(workdir, pictures, command):
    def run(*words, name="run"):
        assert command(
            "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures,
            f"--run_name={name}", *words,
        ) == 0  # fmt: skip
        lines = Path(f"runs/tiny/{name}/metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run
