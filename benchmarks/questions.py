"""What is asked of speed, in which words, and how the answer is read.

A question has words for the processor or for a GPU, and words of a rehearsal: the same code on the
processor with tiny settings, whose figures say nothing but that it runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import findings
from benchmarks.findings import Finding, Reader

RESULTS = Path(__file__).parent / "results"


class Question(NamedTuple):
    """One question, one command, one result file."""

    name: str
    asks: str
    command: str  # after `python -m benchmarks.`
    rehearsal: str  # the settings that make it short
    reads: Reader
    device: str = "cpu"
    part: int = 1  # of the GPU's three
    minutes: float = 8  # it is ended after so many
    needs_data: bool = False  # the folder of data sets

    @property
    def stem(self) -> str:
        """How its result file is called, behind the date."""
        return self.name


TINY = "--model tiny --threads 1"
CPU = (
    Question(
        "step", "a training step of ViT-B/32 against open_clip's",
        "step --rounds 6", f"{TINY} --batch 4 --rounds 1", findings.of_step,
    ),
    Question(
        "loss", "the loss by tiles: memory and time",
        "loss --pairs 4096 16384 --rounds 3", "--pairs 64 128 --rounds 1 --losses info_nce",
        findings.of_loss,
    ),
    Question(
        "micro-batches", "the memory of a small batch, the loss of a large one",
        "micro_batches --rounds 4", f"{TINY} --batch 4 --micro-batch 2 --rounds 1",
        findings.of_micro_batches,
    ),
    Question(
        "text-lengths", "the text tower by caption lengths",
        "text_lengths --batches 64 --mixes coco --towers ViT-B/32 --rounds 3",
        "--batches 8 --mixes coco --towers tiny --rounds 1", findings.of_text_lengths,
        needs_data=True,
    ),
    Question(
        "decode", "JPEG bytes to a training tensor on one core",
        "decode --rounds 7", "--rounds 1", findings.of_decode, needs_data=True,
    ),
    Question(
        "tokens", "captions to tokens",
        "tokens --rounds 12", "--rounds 1", findings.of_tokens, needs_data=True,
    ),
    Question(
        "classifier", "building a zero-shot classifier",
        "classifier --classes 10 --templates 40 --rounds 4", "--classes 2 --templates 2 --rounds 1",
        findings.of_classifier,
    ),
    Question(
        "ranks", "from one rank to two, against open_clip under DDP",
        "ranks --rounds 4", "--model tiny --batch 2 --rounds 1", findings.of_ranks,
    ),
    Question(
        "end-to-end", "from JPEG files on disk to steps, against open_clip's training",
        "end_to_end --workers 1 2 --steps 4 --rounds 3",
        "--model tiny --steps 2 --rounds 1 --workers 0", findings.of_end_to_end, minutes=10,
        needs_data=True,
    ),
    Question(
        "start-up", "how long commands take to start",
        "start_up --rounds 2", "--rounds 1 --only 'import clipkit' 'import open_clip'",
        findings.of_start_up,
    ),
)  # fmt: skip

GPU = (
    Question(
        "step-vit-b-32-gpu", "a step of ViT-B/32 in bf16, and its utilisation",
        "step --model ViT-B-32 --rounds 7", f"{TINY} --batch 4 --rounds 1 --steps 1",
        findings.of_step, "cuda", 1, 5,
    ),
    Question(
        "loss-gpu", "the loss by tiles: memory and time", "loss --rounds 3",
        "--pairs 64 128 --rounds 1 --losses info_nce", findings.of_loss, "cuda", 1, 4,
    ),
    Question(
        "step-vit-b-16-gpu", "a step of ViT-B/16 in bf16, and its utilisation",
        "step --model ViT-B-16 --rounds 6", f"{TINY} --batch 4 --rounds 1 --steps 1",
        findings.of_step, "cuda", 2, 4,
    ),
    Question(
        "step-vit-l-14-gpu", "a step of ViT-L/14 in bf16, and its utilisation",
        "step --model ViT-L-14 --rounds 6", f"{TINY} --batch 4 --rounds 1 --steps 1",
        findings.of_step, "cuda", 2, 5,
    ),
    Question(
        "micro-batches-gpu", "ViT-B/32 at batch 1,024: the memory of a small batch",
        "micro_batches --rounds 6", f"{TINY} --batch 4 --micro-batch 2 --rounds 1",
        findings.of_micro_batches, "cuda", 3, 4,
    ),
    Question(
        "largest-batch-gpu", "the largest exact batch of ViT-B/32",
        "largest_batch --seconds 200", f"{TINY} --micro-batch 4 --sizes 8 16",
        findings.of_largest_batch, "cuda", 3, 5,
    ),
)  # fmt: skip

OTHERS = (
    Question(
        "retrieval-scale", "retrieval, 20,000 pictures by 100,000 captions",
        "retrieval_scale", "--images 100 --texts 200 --dim 8", findings.of_whatever,
    ),
    Question(
        "evaluation-share", "what evaluation costs inside the emoji recipe",
        "evaluation_share --epochs 2", "--epochs 1", findings.of_whatever, needs_data=True,
    ),
    Question(
        "tasks-together", "zero-shot and retrieval at once, against clip-benchmark",
        "tasks_together", "", findings.of_whatever,
    ),
    Question(
        "trains-as-well", "the same recipe through open_clip's loop and ours, five seeds a side",
        "trains_as_well --seeds 5 --minutes 4", "", findings.of_trains_as_well,
    ),
    Question(
        "tracking", "what it costs a step that nothing is lost, also with a dead server",
        "tracking --steps 60", "--rounds 1 --steps 5 --sides off sqlite refused",
        findings.of_tracking,
    ),
    Question(
        "large-data", "a million rows, 2 GB of parquet and of tar, where they lie",
        "large_data large", "", findings.of_whatever, needs_data=True,
    ),
)  # fmt: skip
"""Asked by themselves: too long, or not of training."""


def latest(question: Question, folder: Path = RESULTS) -> Path | None:
    """Return the newest result file of a question."""
    named = re.compile(rf"\d{{4}}-\d\d-\d\d-{re.escape(question.stem)}\.json")
    found = sorted(path for path in folder.glob("*.json") if named.fullmatch(path.name))
    return found[-1] if found else None


def read(question: Question, path: Path) -> list[Finding]:
    """Return what a result file answers."""
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return list(question.reads(result))


def rows_of(question: Question, path: Path | None) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield question, what, must show, measured, verdict."""
    if path is None:
        yield question.name, question.asks, "", "not measured", ""
        return
    for found in read(question, path):
        yield question.name, found.what, found.must_show, found.shown, found.verdict
