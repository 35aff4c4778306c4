"""The text tower by caption lengths: padded to 77, to the longest, by groups, or not at all.

python -m benchmarks.text_lengths [--data ../shared/data] [--batches 64 256] [--rounds 5]

Forward and backward of the tower alone. clipkit's own towers work without padding; those of
Hugging Face, and a user's own, on groups of like length. What one more group costs, in tokens,
decides how many groups there are (`_GROUP_OVERHEAD` in clipkit/module.py). It is found twice: which
of some overheads makes the fastest batches, and the least squares of the time over tokens and
groups.

Mixes: `coco` are real captions; in `long_tail` every tenth of them is as long as the context.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.interleaved import (
    Seconds,
    add_data,
    parser,
    race,
    ratio,
    record,
    shown,
    spread,
    table,
)
from benchmarks.tokens import captions_of, clip_tokenizer
from clipkit.encoders import TextTransformer
from clipkit.encoders.packing import Packed, places_of
from clipkit.pieces import Span, embed_pieces, spans_of

CONTEXT = 77
OVERHEADS = (0, 16, 64, 256, 1024)
TOWERS: dict[str, dict[str, Any]] = {
    "ViT-B/32": {"width": 512, "depth": 12, "heads": 8},
    "tiny": {"width": 192, "depth": 2, "heads": 3},
}


class Work(NamedTuple):
    """A batch, sorted and cut."""

    run: Callable[[], None]
    tokens: int  # computed, padding included
    groups: int


def lengths_of(mix: str, data: Path, size: int) -> list[int]:
    """Return how long the captions of a batch are, the longest first."""
    tokenizer, captions = clip_tokenizer(), captions_of(data)
    found = tokenizer.contract.lengths(tokenizer(captions)).tolist()
    found = (found * (size // len(found) + 1))[:size]
    if mix == "long_tail":
        found[::10] = [CONTEXT] * len(found[::10])
    return sorted(found, reverse=True)


def tower_of(name: str, device: str) -> TextTransformer:
    """Return a text tower, its weights drawn at random."""
    torch.manual_seed(0)
    return TextTransformer(clip_tokenizer().contract, **TOWERS[name]).to(device)


def tokens_of(lengths: list[int], tower: TextTransformer, device: str) -> Tensor:
    """Return words at random, as long as they are to be, padded to the context (B, 77)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 49_000, (len(lengths), CONTEXT), generator=generator)
    places, ends = torch.arange(CONTEXT), torch.tensor(lengths)[:, None] - 1
    return tokens.where(places < ends, 0).where(places != ends, tower.end_id).to(device)


def work_of(tower: TextTransformer, tokens: Tensor, spans: list[Span]) -> Work:
    """Return what runs the groups forward and all of them backward, as CLIPModule does."""

    def run() -> None:
        pieces = [(tokens[span.rows, : span.length],) for span in spans]
        features = embed_pieces(tower, pieces, modules=[tower], recompute=False)
        features.sum().backward()  # type: ignore[no-untyped-call]

    computed = sum((span.rows.stop - span.rows.start) * span.length for span in spans)
    return Work(run, computed, len(spans))


def work_without_padding(tower: TextTransformer, tokens: Tensor, lengths: list[int]) -> Work:
    """Return what runs the real tokens alone, as CLIPModule does."""
    tokens = tokens[:, : lengths[0]]
    total, of_rows = sum(lengths), torch.tensor(lengths, device=tokens.device)

    def run() -> None:
        places = places_of(of_rows, total=total, width=tokens.shape[1])
        packed = Packed(tower.look_up(tokens.flatten()[places]), places)
        tower(tokens, packed).sum().backward()

    return Work(run, total, 1)


def cuts_of(lengths: list[int]) -> dict[str, list[Span]]:
    """Return the ways to cut a batch."""
    whole = slice(0, len(lengths))
    return {
        "padded to 77": [Span(whole, CONTEXT)],
        "padded to the longest": [Span(whole, lengths[0])],
        **{f"grouped, {o}": spans_of(lengths, pieces=None, overhead=o) for o in OVERHEADS},
    }


def case(tower_name: str, mix: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one tower on one batch, cut in every way."""
    lengths, tower = lengths_of(mix, options.data, size), tower_of(tower_name, options.device)
    tokens = tokens_of(lengths, tower, options.device)
    works = {name: work_of(tower, tokens, spans) for name, spans in cuts_of(lengths).items()}
    works["without padding"] = work_without_padding(tower, tokens, lengths)
    seconds = race({n: w.run for n, w in works.items()}, rounds=options.rounds,
                   device=options.device, warm_up=options.warm_up)  # fmt: skip
    longest = seconds["padded to the longest"]
    return {
        "tower": tower_name,
        "mix": mix,
        "batch": size,
        "mean_tokens": round(statistics.mean(lengths), 2),
        "longest": lengths[0],
        "cuts": {
            name: {
                "tokens": work.tokens,
                "groups": work.groups,
                "seconds": spread(seconds[name]),
                "times_as_fast_as_padded_to_77": ratio(seconds["padded to 77"], seconds[name]),
                "times_as_fast_as_padded_to_the_longest": ratio(longest, seconds[name]),
            }
            for name, work in works.items()
        },
        "overhead_by_least_squares": overhead(works, seconds),
    }


def overhead(works: dict[str, Work], seconds: Seconds) -> float | None:
    """Return how many tokens take as long as one more group, by the grouped cuts and the longest.

    A call of the tower has a price of its own, which one group pays too: it is the groups' slope.
    """
    chosen = [name for name in works if name.startswith("grouped") or name.endswith("longest")]
    if len({(works[name].tokens, works[name].groups) for name in chosen}) < 3:
        return None
    table_of = np.array([(works[name].tokens, works[name].groups, 1.0) for name in chosen])
    times = np.array([statistics.median(seconds[name]) for name in chosen])
    # Relative errors are alike, not absolute ones.
    weights = 1 / times
    solution, *_ = np.linalg.lstsq(table_of * weights[:, None], times * weights, rcond=None)
    per_token, per_group, _ = map(float, solution)
    return round(per_group / per_token, 1) if per_token > 0 else None


def worth(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Return how much slower than its best each overhead is, as the mean over the cases."""
    found: dict[str, list[float]] = {}
    for one in cases:
        names = [f"grouped, {value}" for value in OVERHEADS]
        medians = {name: one["cuts"][name]["seconds"]["median"] for name in names}
        for name in names:
            found.setdefault(name, []).append(medians[name] / min(medians.values()))
    return {name: round(statistics.mean(values), 4) for name, values in found.items()}


def main() -> None:
    """Measure and write one dated file."""
    options_of = parser(__doc__, rounds=5)
    add_data(options_of)
    options_of.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    options_of.add_argument("--mixes", nargs="+", default=["coco", "long_tail"])
    options_of.add_argument("--towers", nargs="+", choices=TOWERS, default=list(TOWERS))
    options_of.add_argument("--warm-up", type=int, default=1, help="rounds not kept")
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    cases = [
        case(tower, mix, size, options)
        for tower in options.towers
        for mix in options.mixes
        for size in options.batches
    ]
    result = {"cases": cases, "times_the_best": worth(cases)}
    path = record("text-lengths", options, result)
    rows: list[Any] = [
        ("tower", "mix", "batch", "cut", "tokens", "groups", "ms", "x 77", "x longest")
    ]
    for one in cases:
        for name, cut in one["cuts"].items():
            rows.append((
                one["tower"], one["mix"], str(one["batch"]), name, str(cut["tokens"]),
                str(cut["groups"]), f"{cut['seconds']['median'] * 1000:.1f}",
                shown(cut["times_as_fast_as_padded_to_77"]),
                shown(cut["times_as_fast_as_padded_to_the_longest"]),
            ))  # fmt: skip
    table(rows)
    print("overhead in tokens", [one["overhead_by_least_squares"] for one in cases])
    print("times the best, mean", result["times_the_best"])
    print(path)


if __name__ == "__main__":
    main()
