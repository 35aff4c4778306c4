"""Batches without data: pictures of noise, words at random, captions as long as COCO's are."""

from __future__ import annotations

import random
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.models import CONTEXT, CONTRACT
from clipkit.data.samples import PairBatch

LENGTHS = {
    10: 12, 11: 27, 12: 45, 13: 49, 14: 49, 15: 33, 16: 15, 17: 5, 18: 5, 19: 4, 20: 2, 21: 2,
    22: 3, 24: 2, 28: 1, 46: 1,
}  # fmt: skip
"""How many of 255 captions of COCO have so many tokens, start and end included."""


def batches_of(number: int, size: int, side: int, device: str | torch.device) -> list[PairBatch]:
    """Return batches of so many pairs, pictures of so many pixels a side, on the device."""
    return [_batch(seed, size, side, device) for seed in range(number)]


def lengths_like_coco(size: int, seed: int) -> list[int]:
    """Return how many tokens each caption of a batch has.

    Spread over COCO's as evenly as their number allows, so that batches differ by rounding alone.
    """
    every = [length for length, count in LENGTHS.items() for _ in range(count)]
    rng = random.Random(seed)
    whole, rest = divmod(size, len(every))
    lengths = [*every * whole, *rng.sample(every, rest)]
    rng.shuffle(lengths)
    return lengths


def _batch(seed: int, size: int, side: int, device: str | torch.device) -> PairBatch:
    lengths = lengths_like_coco(size, seed)
    generator = torch.Generator(device).manual_seed(seed)
    on_device = torch.tensor(lengths, device=device)
    ids = torch.randint(-(2**62), 2**62, (2, size), generator=generator, device=device)
    return PairBatch(
        images=torch.randint(
            0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator, device=device
        ),
        tokens=words(on_device, generator),
        caption_ids=ids[0],
        image_ids=ids[1],
        rows=torch.arange(size, device=device),
        truncated=torch.zeros(size, dtype=torch.bool, device=device),
        lengths=lengths,
        by_length=on_device.argsort(descending=True, stable=True),
    )


def words(lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Return words at random with a start and an end, padded to the longest (B, L)."""
    longest, device = int(lengths.max()), lengths.device
    tokens = torch.randint(
        1, CONTRACT.end_id - 1, (len(lengths), longest), generator=generator, device=device
    )
    places, ends = torch.arange(longest, device=device), lengths[:, None] - 1
    assert CONTRACT.start_id is not None
    tokens[:, 0] = CONTRACT.start_id
    return tokens.where(places < ends, 0).where(places != ends, CONTRACT.end_id)


def without_lengths(batch: PairBatch, context: int = CONTEXT) -> PairBatch:
    """Return the batch padded to the context, as from a loader that knows of no lengths."""
    items: dict[str, Any] = {k: v for k, v in batch.items() if k not in ("lengths", "by_length")}
    items["tokens"] = F.pad(batch["tokens"], (0, context - batch["tokens"].shape[1]))
    return cast(PairBatch, items)


def about(batches: list[PairBatch]) -> dict[str, Any]:
    """Return how long the captions are."""
    lengths = [length for batch in batches for length in batch["lengths"]]
    return {
        "number": len(batches),
        "mean_tokens": round(sum(lengths) / len(lengths), 2),
        "longest": max(lengths),
        "longest_of_each": [max(batch["lengths"]) for batch in batches],
    }
