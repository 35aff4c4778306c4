"""A training step against open_clip's: the same model, weights, pictures and captions.

python -m benchmarks.step [--model ViT-B-32] [--batch 32] [--rounds 7]
python -m benchmarks.step --device cuda --model ViT-L-14

A plain loop: forward, loss, backward and a fused AdamW for both, no trainer. open_clip's CLIP and
ClipLoss get 77 tokens a caption, as its tokenizer gives them, and pictures already normalised;
CLIPModule gets bytes, which it normalises within the step, and ids to tell duplicates by. `clipkit`
leaves the padding of captions out, as in training; `clipkit, padded` gets the same 77 tokens as
open_clip, so that what is left is not the trimming. Captions are as long as COCO's, pictures are
noise.

On a GPU both run in bf16 (Lightning's bf16-mixed, open_clip's amp_bf16), and each with and without
`torch.compile`; ours is compared with the faster of open_clip's. `utilisation` (MFU) is the
operations of the towers on the tokens a contender is given, forward once and backward twice, over
the card's stated peak. Without open_clip its columns are left out.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.batches import about, batches_of, without_lengths
from benchmarks.interleaved import Seconds, parser, race, ratio, record, shown, spread, table
from benchmarks.models import (
    CONTRACT,
    SHAPES,
    add_precision,
    autocast,
    copy_weights,
    has_peer,
    module_of,
    optimizer_of,
    peer_of,
    precision_of,
)
from clipkit.callbacks.peak_flops import peak_flops
from clipkit.data.samples import PairBatch
from clipkit.encoders.flops import image_operations, text_operations
from clipkit.losses import Ids
from clipkit.module import CLIPModule

GOALS: dict[str, dict[str, dict[str, float]]] = {
    "cpu": {"ViT-B-32": {"clipkit": 1.6, "clipkit, padded": 1.0}},
    "cuda": {
        "ViT-B-32": {"clipkit": 1.5, "clipkit, padded": 1.0},
        "ViT-B-16": {"clipkit": 1.2, "clipkit, padded": 1.0},
    },
}
OTHERS = {"clipkit": 1.0, "clipkit, padded": 1.0}
"""Of a model that no goal speaks of: not slower."""
UTILISATION = {"ViT-B-32": 0.30, "ViT-B-16": 0.40, "ViT-L-14": 0.45}
BATCHES = {"ViT-B-32": 1024, "ViT-B-16": 256, "ViT-L-14": 128, "ViT-S-32": 1024, "tiny": 8}
"""What a card is given by default, some 50,000 patches or half; the processor gets 32."""
NUM_BATCHES = 4
PADDED = "clipkit, padded"

Forward = Callable[[Any], Tensor]
Turn = Callable[[], None]


class Contender(NamedTuple):
    """Whose turn it is, and how many operations one of its steps takes."""

    turn: Turn
    operations: float


# --- Losses --------------------------------------------------------------------------------------


def our_loss(module: CLIPModule, batch: PairBatch) -> Tensor:
    """Return the loss as `training_step` has it, without the trainer's logging."""
    image, text = module(batch)
    ids = Ids(batch["caption_ids"], batch["image_ids"])
    loss: Tensor = module.loss(
        image, text, image, text, offset=0, scale=module.scale, bias=module.temperature.bias,
        ids=ids, all_ids=ids,
    ).loss  # fmt: skip
    return loss


def their_loss(peer: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return open_clip's."""
    loss: Tensor = criterion(*peer(*batch)[:3])
    return loss


def their_batch(module: CLIPModule, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Return what open_clip's model is given for a padded batch."""
    with torch.no_grad():
        return module.image_encoder.normalise(batch["images"].float() / 255), batch["tokens"]


# --- Steps ---------------------------------------------------------------------------------------


def training(
    forward: Forward, optimizer: torch.optim.Optimizer, batches: list[Any],
    clamp: Callable[[], Any], options: argparse.Namespace,
) -> Turn:  # fmt: skip
    """Return what makes some steps, on the next batch each time."""
    endless = itertools.cycle(batches)

    def turn() -> None:
        for _ in range(options.steps):
            optimizer.zero_grad()
            with autocast(options.precision, options.device):
                loss = forward(next(endless))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            clamp()

    return turn


def our_contenders(
    module: CLIPModule, batches: list[PairBatch], options: argparse.Namespace, suffix: str = ""
) -> dict[str, Contender]:
    """Return our module's turns: one module for both, since the time is not of the weights."""
    padded = [without_lengths(batch) for batch in batches]
    optimizer, forward = optimizer_of(module), partial(our_loss, module)
    return {
        f"clipkit{suffix}": Contender(
            training(forward, optimizer, batches, module.temperature.clamp_, options),
            operations(module, [length for batch in batches for length in batch["lengths"]])
            / len(batches),
        ),
        f"clipkit{suffix}, padded": Contender(
            training(forward, optimizer, padded, module.temperature.clamp_, options),
            operations(module, [CONTRACT.context_length] * options.batch),
        ),
    }


def their_contenders(
    peer: Any, module: CLIPModule, batches: list[PairBatch], options: argparse.Namespace
) -> dict[str, Contender]:
    """Return open_clip's turns, with and without its `--torchcompile`."""
    from open_clip.loss import ClipLoss

    theirs = [their_batch(module, without_lengths(batch)) for batch in batches]
    optimizer = optimizer_of(peer)
    all_tokens = operations(module, [CONTRACT.context_length] * options.batch)
    models = {"open_clip": peer}
    if options.compile:
        models["open_clip, compiled"] = torch.compile(peer)

    def clamp() -> None:
        with torch.no_grad():
            peer.logit_scale.clamp_(0, math.log(100))

    return {
        name: Contender(
            training(partial(their_loss, model, ClipLoss()), optimizer, theirs, clamp, options),
            all_tokens,
        )
        for name, model in models.items()
    }


def operations(module: CLIPModule, lengths: list[int]) -> float:
    """Return the operations of a step on captions so long, forward and backward."""
    text = text_operations(module.text_encoder, CONTRACT).total(
        captions=len(lengths), tokens=sum(lengths), squares=sum(n * n for n in lengths)
    )
    return 3 * (image_operations(module.image_encoder) * len(lengths) + text)


def contenders(options: argparse.Namespace) -> tuple[dict[str, Contender], dict[str, Any]]:
    """Return the turns, and what is to be said of their batches."""
    shape, device = SHAPES[options.model], options.device
    module = module_of(options.model)
    peer = peer_of(options.model, device) if has_peer() else None
    if peer is not None and shape.same_weights:
        copy_weights(peer, module)
    module.to(device)
    batches = batches_of(NUM_BATCHES, options.batch, shape.image_size, device)
    said: dict[str, Any] = {"batches": about(batches)}
    made: dict[str, Contender] = {}
    if peer is not None:
        said["loss"] = losses(module, peer, batches[0])
        made |= their_contenders(peer, module, batches, options)
    if options.compile:
        compiled = module_of(options.model, compiled=True)
        compiled.load_state_dict(module.state_dict())
        made |= our_contenders(compiled.to(device), batches, options, ", compiled")
    made |= our_contenders(module, batches, options)
    said["left_out"] = dict(cannot_be_compiled(made))
    return {name: one for name, one in made.items() if name not in said["left_out"]}, said


def cannot_be_compiled(made: Mapping[str, Contender]) -> Iterator[tuple[str, str]]:
    """Yield which contenders fail to compile here, and why: the others are raced without them."""
    for name, contender in made.items():
        if "compiled" in name:
            try:
                contender.turn()
            except Exception as error:  # a missing compiler, a shape it cannot do
                yield name, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


@torch.no_grad()
def losses(module: CLIPModule, peer: Any, batch: PairBatch) -> dict[str, float]:
    """Return the loss of a batch in float32, which is to be the same where the weights are."""
    from open_clip.loss import ClipLoss

    padded = without_lengths(batch)
    return {
        "open_clip": float(their_loss(peer, ClipLoss(), their_batch(module, padded))),
        "clipkit": float(our_loss(module, batch)),
        PADDED: float(our_loss(module, padded)),
    }


# --- Figures -------------------------------------------------------------------------------------


def figures(
    seconds: Seconds, made: Mapping[str, Contender], options: argparse.Namespace
) -> dict[str, Any]:
    """Return rates, ratios to open_clip's best, and utilisation where the peak is known."""
    each = {name: [s / options.steps for s in values] for name, values in seconds.items()}
    found: dict[str, Any] = {
        "pairs_per_second": {n: spread([options.batch / s for s in v]) for n, v in each.items()}
    }
    theirs = {n: statistics.median(v) for n, v in each.items() if n.startswith("open_clip")}
    if theirs:
        best = min(theirs, key=lambda name: theirs[name])
        found["compared_with"] = best
        found["times_as_fast"] = {
            n: ratio(each[best], v) for n, v in each.items() if not n.startswith("open_clip")
        }
    peak = peak_of(options)
    if peak is not None:
        found["peak_flops"] = peak
        found["utilisation"] = {
            n: spread([made[n].operations / s / peak for s in v]) for n, v in each.items()
        }
    return found


def peak_of(options: argparse.Namespace) -> float | None:
    """Return the operations a second that the device can do at most, where that is known."""
    stated: float | None = options.peak_flops
    if stated is None and options.device == "cuda":
        word = {"bf16": "bf16-mixed", "float32": "32-true"}[options.precision]
        return peak_flops(torch.cuda.get_device_name(), word)
    return stated


def options_from() -> argparse.Namespace:
    """Read the options, and settle what depends on the device."""
    options_of = parser(__doc__, rounds=7)
    options_of.add_argument("--model", choices=SHAPES, default="ViT-B-32")
    options_of.add_argument("--batch", type=int, default=None, help="32 without a GPU")
    options_of.add_argument("--steps", type=int, default=None, help="a turn; 1 without a GPU")
    options_of.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None)
    options_of.add_argument("--peak-flops", type=float, default=None, help="else the maker's")
    add_precision(options_of)
    options = options_of.parse_args()
    gpu = options.device == "cuda"
    options.batch = options.batch or (BATCHES[options.model] if gpu else 32)
    # Every batch has been seen once the warm-up is over, in all its shapes.
    options.steps = options.steps or (2 * NUM_BATCHES if gpu else 1)
    options.compile = gpu if options.compile is None else options.compile
    options.precision = precision_of(options)
    return options


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    options = options_from()
    torch.set_num_threads(options.threads)
    made, said = contenders(options)
    turns = {name: one.turn for name, one in made.items()}
    seconds = race(turns, rounds=options.rounds, device=options.device)
    found = figures(seconds, made, options)
    goals: dict[str, Any] = {"times_as_fast": GOALS[options.device].get(options.model, OTHERS)}
    if "utilisation" in found:
        goals["utilisation"] = UTILISATION.get(options.model)
    loop = "plain: forward, loss, backward, fused AdamW for both; no trainer"
    name = "step" if options.device == "cpu" else f"step-{options.model.lower()}-gpu"
    path = record(name, options, {"loop": loop, **said, **found, "must_show": goals})
    rows = [("contender", "pairs/s", "times as fast", "utilisation")]
    for contender, rate in found["pairs_per_second"].items():
        cells = (found.get(key, {}).get(contender) for key in ("times_as_fast", "utilisation"))
        rows.append((contender, shown(rate), *(shown(cell) if cell else "" for cell in cells)))
    table(rows)
    print(said)
    print(path)


if __name__ == "__main__":
    main()
