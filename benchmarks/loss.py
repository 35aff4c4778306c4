"""The tiled losses against open_clip's: peak memory above the inputs, time, and the gradients.

python -m benchmarks.loss [--pairs 2048 4096 8192 16384] [--width 512] [--rounds 3]
python -m benchmarks.loss --device cuda     (4,096 to 131,072 pairs)

Forward and backward of one process in float32, on the same embeddings. What a card has no memory
for is left out. `clipkit, ids` is told the
captions' and pictures' ids, as in training, so that it looks for duplicates; there are none, hence
the same loss. Each memory is that of a process of its own, after a small batch of the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.interleaved import (
    MIB,
    alone,
    parser,
    peak_above,
    race,
    ratio,
    record,
    shown,
    spread,
    table,
)
from benchmarks.models import has_peer
from clipkit.losses import Ids, InfoNCELoss, SigLIPLoss

OURS = ("clipkit", "clipkit, ids")
GOALS = {"pairs": 16_384, "times_less_memory": 20.0, "times_as_fast": 1.0}
PAIRS = {"cpu": (2048, 4096, 8192, 16_384), "cuda": (4096, 8192, 16_384, 32_768, 65_536, 131_072)}
WARM_UP_PAIRS = 256


class Inputs(NamedTuple):
    """What both losses take: unit-norm embeddings (B, D), scale and bias."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor


class Outcome(NamedTuple):
    """The loss and its gradients: of image, text, scale, and bias where the loss has one."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


def drawn(pairs: int, width: int, device: str) -> Inputs:
    """Draw embeddings at random."""
    torch.manual_seed(0)
    sides = (F.normalize(torch.randn(pairs, width), dim=1) for _ in range(2))
    # CLIP's scale and SigLIP's bias before the first step.
    numbers = (torch.tensor(value) for value in (14.3, -10.0))
    return Inputs(*(one.to(device).requires_grad_() for one in (*sides, *numbers)))


def step_of(contender: str, kind: str, inputs: Inputs) -> Callable[[], Outcome]:
    """Return what runs one loss forward and backward."""
    forward = _theirs(kind, inputs)
    if contender != "open_clip":
        forward = _ours(kind, inputs, with_ids=contender.endswith("ids"))
    wanted = inputs if kind == "siglip" else inputs[:3]

    def step() -> Outcome:
        loss = forward()
        return Outcome(loss.detach(), torch.autograd.grad(loss, wanted))

    return step


def _theirs(kind: str, inputs: Inputs) -> Callable[[], Tensor]:
    from open_clip.loss import ClipLoss, SigLipLoss

    image, text, scale, bias = inputs
    if kind == "siglip":
        return lambda: SigLipLoss()(image, text, scale, bias)
    return lambda: ClipLoss()(image, text, scale)


def _ours(kind: str, inputs: Inputs, *, with_ids: bool) -> Callable[[], Tensor]:
    image, text, scale, bias = inputs
    loss = SigLIPLoss() if kind == "siglip" else InfoNCELoss()
    ids = None
    if with_ids:
        # Spread over all of int64, as digests are.
        each = torch.randint(-(2**62), 2**62, (2, len(image)), device=image.device)
        ids = Ids(each[0], each[1])
    return lambda: loss(
        image, text, image, text, offset=0, scale=scale,
        bias=bias if kind == "siglip" else None, ids=ids, all_ids=ids,
    ).loss  # fmt: skip


def peaks(
    contender: str, kind: str, sizes: list[int], width: int, device: str, threads: int
) -> dict[int, int]:
    """Return the bytes that a forward and a backward pass hold above the inputs, for each size.

    Ends at the first size there is no memory for.
    """
    torch.set_num_threads(threads)
    # Libraries load what they need at the first call.
    step_of(contender, kind, drawn(WARM_UP_PAIRS, width, device))()
    found: dict[int, int] = {}
    for pairs in sorted(sizes):
        try:
            step = step_of(contender, kind, drawn(pairs, width, device))
            found[pairs] = peak_above(step, device)
        except torch.OutOfMemoryError:
            break
    return found


def contenders() -> tuple[str, ...]:
    """Return who is measured."""
    return ("open_clip", *OURS) if has_peer() else OURS


def measure(kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one loss at every size: memory in a process a contender, then time in turn."""
    settings = (kind, options.pairs, options.width, options.device, options.threads)
    every = {name: alone(peaks, name, *settings) for name in contenders()}
    return [
        case(kind, pairs, {name: found[pairs] for name, found in every.items() if pairs in found},
             options)
        for pairs in options.pairs
        if any(pairs in found for found in every.values())
    ]  # fmt: skip


def case(
    kind: str, pairs: int, taken: dict[str, int], options: argparse.Namespace
) -> dict[str, Any]:
    """Time one size, beside the memory it took."""
    return {
        "pairs": pairs,
        "MiB_above_inputs": {name: round(value / MIB, 1) for name, value in taken.items()},
        # The gradients of both sides are a part of it that nobody can do without.
        "MiB_of_gradients": round(2 * pairs * options.width * 4 / MIB, 1),
        "times_less_memory": {
            name: round(taken["open_clip"] / taken[name], 2)
            for name in OURS
            if {"open_clip", name} <= taken.keys()
        },
        **times(kind, pairs, [*taken], options),
    }


def times(kind: str, pairs: int, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Time those there is memory for, and compare what they return."""
    for name in names:
        step_of(name, kind, drawn(WARM_UP_PAIRS, options.width, options.device))()
    inputs = drawn(pairs, options.width, options.device)
    outcomes: dict[str, Outcome] = {}

    def turn(name: str) -> Callable[[], None]:
        step = step_of(name, kind, inputs)
        return lambda: outcomes.update({name: step()})

    # A GPU's first call at a size chooses its kernels.
    warm_up = 0 if options.device == "cpu" else 1
    seconds = race(
        {name: turn(name) for name in names},
        rounds=options.rounds, device=options.device, warm_up=warm_up,
    )  # fmt: skip
    theirs = outcomes.get("open_clip")
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "loss": float(outcomes["clipkit"].loss),
        "times_as_fast": {}
        if theirs is None
        else {name: ratio(seconds["open_clip"], seconds[name]) for name in OURS},
        "apart": {} if theirs is None else {name: apart(outcomes[name], theirs) for name in OURS},
    }


def apart(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Return how far the loss is from theirs, and each gradient, by the largest of its numbers."""
    found = {"loss": float((ours.loss - theirs.loss).abs())}
    for side, own, their in zip(Inputs._fields, ours.gradients, theirs.gradients, strict=False):
        found[f"gradient of {side}"] = float((own - their).abs().max() / their.abs().max())
    return {name: float(f"{value:.2g}") for name, value in found.items()}


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    options_of = parser(__doc__, rounds=3)
    options_of.add_argument("--pairs", type=int, nargs="+", default=None)
    options_of.add_argument("--width", type=int, default=512)
    options_of.add_argument("--losses", nargs="+", default=["info_nce", "siglip"])
    options = options_of.parse_args()
    options.pairs = options.pairs or list(PAIRS[options.device])
    torch.set_num_threads(options.threads)
    losses = {kind: measure(kind, options) for kind in options.losses}
    rows = [("loss", "pairs", "contender", "MiB above inputs", "seconds", "times as fast")]
    for kind, found in ((kind, found) for kind, cases in losses.items() for found in cases):
        for name, seconds in found["seconds"].items():
            fast = found["times_as_fast"].get(name)
            rows.append((
                kind, f"{found['pairs']:,}", name, str(found["MiB_above_inputs"][name]),
                shown(seconds), shown(fast) if fast else "",
            ))  # fmt: skip
    name = "loss" if options.device == "cpu" else "loss-gpu"
    path = record(name, options, {"losses": losses, "must_show": GOALS})
    table(rows)
    for kind, cases in losses.items():
        print(kind, "apart", cases[-1]["apart"])
    print(path)


if __name__ == "__main__":
    main()
