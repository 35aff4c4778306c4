"""A training step of ViT-B/32 against open_clip's: the same weights, pictures and captions.

python -m benchmarks.step [--data ../shared/data] [--batch 32] [--rounds 7] [--device cuda]

A plain loop: forward, loss, backward and a fused AdamW for both, no trainer. open_clip's CLIP and
ClipLoss get 77 tokens a caption, as its tokenizer gives them, and pictures already normalised;
CLIPModule gets bytes, which it normalises within the step, and ids to tell duplicates by. `clipkit`
leaves the padding of captions out, as in training; `clipkit, padded` gets the same 77 tokens as
open_clip, so that what is left is not the trimming. Captions are real, pictures are noise.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interleaved import parser, race, ratio, record, shown, spread, table
from benchmarks.tokens import captions_of, clip_tokenizer
from clipkit.data.pairs import PairBatch, PairCollate, Sample
from clipkit.encoders import TextTransformer, TimmImageEncoder
from clipkit.heads import LinearHead
from clipkit.losses import Ids, InfoNCELoss
from clipkit.module import CLIPModule
from clipkit.optim import WarmupCosine
from clipkit.temperature import Temperature

GOALS = {"clipkit": 1.6, "clipkit, padded": 1.0}
TIMM_NAMES = {"ViT-B-32": "vit_base_patch32_clip_224", "ViT-S-32": "vit_small_patch32_224"}


# --- Models --------------------------------------------------------------------------------------


def module_of(name: str, *, micro_batch: int | None = None) -> CLIPModule:
    """Return our module of open_clip's model of that name, its weights drawn at random."""
    import open_clip

    config: dict[str, Any] = open_clip.get_model_config(name)
    text = config["text_cfg"]
    torch.manual_seed(0)
    return CLIPModule(
        image_encoder=TimmImageEncoder(TIMM_NAMES[name]),
        text_encoder=partial(
            TextTransformer, width=text["width"], depth=text["layers"], heads=text["heads"]
        ),
        tokenizer=clip_tokenizer(),
        image_head=LinearHead,
        text_head=LinearHead,
        temperature=Temperature(),
        loss=InfoNCELoss(),
        optimizer=torch.optim.AdamW,
        schedule=WarmupCosine,
        embed_dim=config["embed_dim"],
        micro_batch=micro_batch,
    ).train()


def copy_weights(peer: nn.Module, module: CLIPModule) -> None:
    """Put open_clip's weights into our module."""
    from tests.test_parity import ours_from_theirs

    prefixes = {
        "image": "image_encoder",
        "text": "text_encoder",
        "log_scale": "temperature.log_scale",
    }
    state = module.state_dict()
    for name, tensor in ours_from_theirs(peer.state_dict()).items():
        head, dot, rest = name.partition(".")
        state[prefixes.get(head, head) + dot + rest] = tensor
    module.load_state_dict(state)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW with CLIP's settings, no decay of vectors: for both alike."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.2},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)


# --- Batches -------------------------------------------------------------------------------------


def batches_of(captions: list[str], size: int, module: CLIPModule) -> list[PairBatch]:
    """Return the captions in full batches, beside pictures of noise."""
    collate, side = PairCollate(module.tokenizer), module.image_encoder.image_size
    generator = torch.Generator().manual_seed(1)

    def sample(row: int, caption: str) -> Sample:
        picture = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)
        return Sample(picture, caption, row, row)

    samples = [sample(row, caption) for row, caption in enumerate(captions)]
    stops = range(size, len(samples) + 1, size)
    return [moved(collate(samples[stop - size : stop]), module.device) for stop in stops]


def moved(batch: PairBatch, device: torch.device) -> PairBatch:
    """Return the batch on the device."""
    items = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return cast(PairBatch, items)


def without_lengths(batch: PairBatch, context: int = 77) -> PairBatch:
    """Return the batch padded to the context, as from a loader that knows of no lengths."""
    items: dict[str, Any] = {k: v for k, v in batch.items() if k not in ("lengths", "by_length")}
    items["tokens"] = F.pad(batch["tokens"], (0, context - batch["tokens"].shape[1]))
    return cast(PairBatch, items)


# --- Steps ---------------------------------------------------------------------------------------

Forward = Callable[[Any], Tensor]


def our_loss(module: CLIPModule, batch: PairBatch) -> Tensor:
    """Return the loss as `training_step` has it, without the trainer's logging."""
    image, text = module(batch)
    ids = Ids(batch["caption_ids"], batch["image_ids"])
    loss: Tensor = module.loss(
        image, text, image, text, offset=0, scale=module.scale, bias=module.temperature.bias,
        ids=ids, all_ids=ids,
    ).loss  # fmt: skip
    return loss


def their_loss(peer: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return open_clip's."""
    from open_clip.loss import ClipLoss

    loss: Tensor = ClipLoss()(*peer(*batch))
    return loss


def training(
    forward: Forward, optimizer: torch.optim.Optimizer, batches: list[Any], clamp: Callable[[], Any]
) -> Callable[[], None]:
    """Return what makes one step, on the next batch each time."""
    endless = itertools.cycle(batches)

    def step() -> None:
        optimizer.zero_grad()
        forward(next(endless)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        clamp()

    return step


def peer_of(name: str, device: str) -> Any:
    """Return open_clip's model, its weights drawn at random."""
    import open_clip

    torch.manual_seed(0)
    return open_clip.create_model(name, device=device).train()


def contenders(
    options: argparse.Namespace,
) -> tuple[dict[str, Callable[[], None]], dict[str, Any]]:
    """Return the steps, and what is to be said of their batches."""
    peer, module = peer_of(options.model, options.device), module_of(options.model)
    copy_weights(peer, module)
    module.to(options.device)
    batches = batches_of(captions_of(options.data), options.batch, module)
    padded = [without_lengths(batch) for batch in batches]
    theirs = [
        (module.image_encoder.normalise(batch["images"].float() / 255), batch["tokens"])
        for batch in padded
    ]
    ours, peers = partial(our_loss, module), partial(their_loss, peer)
    said = {
        "batches": about(batches),
        "loss": losses(ours, peers, batches[0], padded[0], theirs[0]),
    }

    def clamp_peer() -> None:
        with torch.no_grad():
            peer.logit_scale.clamp_(0, math.log(100))

    optimizer, clamp = optimizer_of(module), module.temperature.clamp_
    return {
        "open_clip": training(peers, optimizer_of(peer), theirs, clamp_peer),
        # One module for both: a second would take its memory, and the time is not of the weights.
        "clipkit": training(ours, optimizer, batches, clamp),
        "clipkit, padded": training(ours, optimizer, padded, clamp),
    }, said


def about(batches: list[PairBatch]) -> dict[str, Any]:
    """Return how long the captions are."""
    lengths = [length for batch in batches for length in batch["lengths"]]
    return {
        "number": len(batches),
        "mean_tokens": round(sum(lengths) / len(lengths), 2),
        "longest": max(lengths),
        "longest_of_each": [max(batch["lengths"]) for batch in batches],
    }


@torch.no_grad()
def losses(
    ours: Forward, peers: Forward, grouped: Any, padded: Any, theirs: Any
) -> dict[str, float]:
    """Return the loss of the first batch, which is to be the same, before the first step."""
    return {
        "open_clip": float(peers(theirs)),
        "clipkit": float(ours(grouped)),
        "clipkit, padded": float(ours(padded)),
    }


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    options_of = parser(__doc__, rounds=7)
    options_of.add_argument("--data", type=Path, default=Path("../shared/data"))
    options_of.add_argument("--batch", type=int, default=32)
    options_of.add_argument("--model", choices=TIMM_NAMES, default="ViT-B-32")
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    steps, said = contenders(options)
    seconds = race(steps, rounds=options.rounds, device=options.device)
    rates = {name: spread([options.batch / s for s in v]) for name, v in seconds.items()}
    fast = {name: ratio(seconds["open_clip"], seconds[name]) for name in GOALS}
    path = record(
        "step", options,
        {
            "loop": "plain: forward, loss, backward, fused AdamW for both; no trainer; float32",
            **said,
            "pairs_per_second": rates,
            "times_as_fast": fast,
            "must_show": GOALS,
        },
    )  # fmt: skip
    rows = [("contender", "pairs/s", "times as fast", "must show")]
    for name, rate in rates.items():
        compared = (shown(fast[name]), str(GOALS[name])) if name in fast else ("", "")
        rows.append((name, shown(rate), *compared))
    table(rows)
    print(said)
    print(path)


if __name__ == "__main__":
    main()
