"""What a GPU is asked runs from a source tree with torch, timm, lightning and tokenizers."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import sys
BLOCKED = {"open_clip", "open_clip_train", "datasets", "mlflow", "jsonargparse", "transformers",
           "matplotlib", "ftfy", "pyarrow", "pytest"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Refuse())
# Libraries ask what is installed before they import it.
from importlib import metadata
found = metadata.Distribution.from_name
def from_name(name):
    if name.replace("-", "_") in BLOCKED | {"open_clip_torch"}:
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.Distribution.from_name = from_name
import benchmarks.all, benchmarks.loss, benchmarks.micro_batches, benchmarks.ranks
from benchmarks import largest_batch, step
tiny = ["--model", "tiny", "--threads", "1", "--precision", "bf16"]
sys.argv = ["step", *tiny, "--batch", "3", "--rounds", "1", "--peak-flops", "1e12", "--output",
            "step.json"]
step.main()
sys.argv = ["largest", *tiny, "--micro-batch", "2", "--sizes", "4", "--output", "largest.json"]
largest_batch.main()
"""


def test_the_questions_of_a_gpu_need_little(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    step = json.loads((tmp_path / "step.json").read_text())
    assert step["pairs_per_second"].keys() == {"clipkit", "clipkit, padded"}
    assert "times_as_fast" not in step
    # Fewer tokens take fewer operations, at the same pairs a second.
    used = {name: found["median"] for name, found in step["utilisation"].items()}
    rate = {name: found["median"] for name, found in step["pairs_per_second"].items()}
    assert used["clipkit"] / rate["clipkit"] < used["clipkit, padded"] / rate["clipkit, padded"]
    largest = json.loads((tmp_path / "largest.json").read_text())
    assert [one["pairs"] for one in largest["sizes"]] == [4]
