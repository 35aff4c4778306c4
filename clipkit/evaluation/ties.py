"""Scores, and what a tie between them is worth.

One rule for every metric: it is the value expected when tied candidates stand in random order, so a
model that gives everything the same embedding scores chance. Two scores within 1e-6 are tied: the
same score read from two differently blocked float32 products already differs by 3e-8. For the same
reason a positive is always read from the matrix product that holds its rivals. Nearness is not
transitive, so ties are counted around the positive, never along a chain of near scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.errors import UserError

TIE_TOLERANCE = 1e-6

# Scores held at a time where the caller names no block size: 16 MB in float32, which stays near the
# cache of a CPU and is no burden for a GPU.
_BLOCK_SCORES = 2**22


class Places(NamedTuple):
    """Where positives stand: how many candidates beat each one, and how many are tied with it."""

    greater: Tensor  # (P,) int64
    tied: Tensor  # (P,) int64, itself too


def unit(embeddings: Tensor, side: str) -> Tensor:
    """Returns embeddings (N, D) at unit norm in float32, or float64 where they came so.

    Raises:
        UserError: some rows are not finite; `side` says whose they are.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"{side} embeddings are (rows, D), not {tuple(embeddings.shape)}")
    bad = int((~torch.isfinite(embeddings)).any(dim=1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(embeddings)} rows of the {side} embeddings are not finite (NaN or "
            "infinity), so they cannot be ranked"
        )
    return normalise(embeddings)


def normalise(embeddings: Tensor) -> Tensor:
    """Returns rows (N, D) at unit norm in float32 or wider; a NaN stays one, without a sync."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    return F.normalize(embeddings.detach().to(wide), dim=1)


def similarities(queries: Tensor, candidates: Tensor) -> Tensor:
    """Returns scores (Q, C) of (Q, D) against (C, D), in float32 or wider inside autocast too."""
    wide = torch.promote_types(torch.promote_types(queries.dtype, candidates.dtype), torch.float32)
    with torch.autocast(queries.device.type, enabled=False), _full_precision():
        return queries.to(wide) @ candidates.to(wide).T


def score_blocks(
    queries: Tensor, candidates: Tensor, block_size: int | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Yields (first row, scores (b, C)) for blocks of rows of the queries; memory is one block.

    Args:
        queries: (Q, D)
        candidates: (C, D)
        block_size: rows in a block; by default as many as make about four million scores.
    """
    if block_size is None:
        block_size = max(1, _BLOCK_SCORES // max(1, len(candidates)))
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}; it must be at least 1")
    for start in range(0, len(queries), block_size):
        yield start, similarities(queries[start : start + block_size], candidates)


def places(scores: Tensor, positives: Tensor) -> Places:
    """Counts the rivals of one positive a row: scores (R, C), scores of the positives (R,)."""
    # Written as 0.0 and 1.0 and summed, exact up to 2**24 candidates: counting booleans takes three
    # times as long on a CPU.
    held = torch.empty_like(scores)
    not_below = torch.ge(scores, lowest_tied(positives).unsqueeze(1), out=held).sum(dim=1).long()
    greater = torch.gt(scores, (positives + TIE_TOLERANCE).unsqueeze(1), out=held).sum(dim=1).long()
    return Places(greater, not_below - greater)


def lowest_tied(positives: Tensor) -> Tensor:
    """Returns the lowest score that is still tied with each positive, the same bits everywhere."""
    return positives - TIE_TOLERANCE


def share_within(k: int, at: Places) -> Tensor:
    """Returns the chance (P,) float64 that each positive is among the first k."""
    return ((k - at.greater).double() / at.tied).clamp(0.0, 1.0)


def hit_within(k: int, at: Places, positives: Tensor) -> Tensor:
    """Returns the chance (P,) float64 that one of several tied positives is among the first k.

    Hypergeometric: one minus the chance that the free places draw none of them.

    Args:
        k: how many candidates are looked at
        at: the places of each query's best positive
        positives: (P,) int64, how many of those tied with it are positives, itself too.
    """
    free = k - at.greater
    miss = torch.ones_like(free, dtype=torch.float64)
    for drawn in range(k):
        left = (at.tied - drawn).clamp(min=1)
        wrong_left = (at.tied - positives - drawn).clamp(min=0)
        miss = torch.where(free > drawn, miss * wrong_left / left, miss)
    return 1.0 - miss


def best_rank(at: Places, positives: Tensor) -> Tensor:
    """Returns the expected rank (P,) float64, from 1, of the first of several tied positives."""
    return at.greater + (at.tied + 1).double() / (positives + 1)


@contextmanager
def _full_precision() -> Iterator[None]:
    # `torch.set_float32_matmul_precision("high")`, usual in training scripts, rounds the inputs of
    # float32 products to 10 bits. torch >= 2.9 keeps the setting per backend and refuses to read
    # the old one once the two disagree, so the new one is used where it exists.
    backends: list[Any] = [torch.backends.cuda.matmul]
    if hasattr(backends[0], "fp32_precision"):
        mkldnn: Any = torch.backends.mkldnn
        backends.append(mkldnn.matmul)
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
    else:
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
