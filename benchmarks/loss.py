"""The tiled losses against open_clip's: peak memory above the inputs, time, and the gradients.

python -m benchmarks.loss [--pairs 16384] [--width 512] [--rounds 3] [--device cuda]

Forward and backward of one process in float32, on the same embeddings. `clipkit, ids` is told the
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
from clipkit.losses import Ids, InfoNCELoss, SigLIPLoss

CONTENDERS = ("open_clip", "clipkit", "clipkit, ids")
GOALS = {"times_less_memory": 20.0, "times_as_fast": 1.0}
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


def peak(contender: str, kind: str, pairs: int, width: int, device: str, threads: int) -> int:
    """Return the bytes that a forward and a backward pass hold above the inputs."""
    torch.set_num_threads(threads)
    # Libraries load what they need at the first call.
    step_of(contender, kind, drawn(WARM_UP_PAIRS, width, device))()
    inputs = drawn(pairs, width, device)
    return peak_above(step_of(contender, kind, inputs), device)


def memory(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one contender after the other, each in its process."""
    settings = (kind, options.pairs, options.width, options.device, options.threads)
    peaks = {name: alone(peak, name, *settings) for name in CONTENDERS}
    # The gradients of both sides are a part of it that nobody can do without.
    return {
        "MiB_above_inputs": {name: round(value / MIB, 1) for name, value in peaks.items()},
        "MiB_of_gradients": round(2 * options.pairs * options.width * 4 / MIB, 1),
        "times_less_memory": {
            name: round(peaks["open_clip"] / peaks[name], 2) for name in CONTENDERS[1:]
        },
    }


def times(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time the contenders in turn, and compare what they return."""
    for name in CONTENDERS:
        step_of(name, kind, drawn(WARM_UP_PAIRS, options.width, options.device))()
    inputs = drawn(options.pairs, options.width, options.device)
    outcomes: dict[str, Outcome] = {}

    def turn(name: str) -> Callable[[], None]:
        step = step_of(name, kind, inputs)
        return lambda: outcomes.update({name: step()})

    turns = {name: turn(name) for name in CONTENDERS}
    seconds = race(turns, rounds=options.rounds, device=options.device, warm_up=0)
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_as_fast": {
            name: ratio(seconds["open_clip"], seconds[name]) for name in CONTENDERS[1:]
        },
        "loss": float(outcomes["open_clip"].loss),
        "apart": {name: apart(outcomes[name], outcomes["open_clip"]) for name in CONTENDERS[1:]},
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
    options_of.add_argument("--pairs", type=int, default=16_384)
    options_of.add_argument("--width", type=int, default=512)
    options_of.add_argument("--losses", nargs="+", default=["info_nce", "siglip"])
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    losses = {kind: {**memory(kind, options), **times(kind, options)} for kind in options.losses}
    path = record("loss", options, {"losses": losses, "must_show": GOALS})
    rows = [("loss", "contender", "MiB above inputs", "seconds", "times as fast")]
    for kind, found in losses.items():
        for name in CONTENDERS:
            fast = found["times_as_fast"].get(name)
            rows.append((
                kind, name, str(found["MiB_above_inputs"][name]),
                shown(found["seconds"][name]), shown(fast) if fast else "",
            ))  # fmt: skip
    table(rows)
    for kind, found in losses.items():
        print(kind, "less memory", found["times_less_memory"], "apart", found["apart"])
    print(path)


if __name__ == "__main__":
    main()
