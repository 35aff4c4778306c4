"""A tower on a batch in pieces: the gradient of the whole batch in the memory of one piece.

A piece of a micro-batched tower runs under activation checkpointing: the forward pass keeps its
inputs alone, and is run again, with the same random numbers, when the gradient arrives; only the
last, which the gradient reaches first, is kept. The loss stands between the two and sees all
embeddings, so that every pair is a negative of every other; this is GradCache
(https://arxiv.org/abs/2101.06983) within automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def embed_pieces(
    embed: Callable[..., Tensor],
    pieces: Sequence[tuple[Any, ...]],
    *,
    modules: Sequence[nn.Module],
    recompute: bool,
) -> Tensor:
    """Return the embeddings of all pieces (B, D), in their order.

    Batch norm takes its statistics from each piece. Its running values move once: towards the mean
    of what the pieces show.

    Args:
        embed: a piece to (b, D).
        pieces: the batch, cut: what `embed` takes.
        modules: what `embed` runs through.
        recompute: keep no activation of a piece but the last, and run it again for its gradient.
    """
    norms = counting_norms(modules)
    # A frozen tower has nothing to recompute for.
    trained = any(p.requires_grad for module in modules for p in module.parameters())
    recompute = recompute and trained and torch.is_grad_enabled()

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _not_counting(norms)

    def run_again_later(*piece: Any) -> Tensor:
        found: Tensor = checkpoint(embed, *piece, use_reentrant=False, context_fn=contexts)
        return found

    if len(pieces) == 1:
        return embed(*pieces[0])
    # The gradient comes to the last piece first: keeping that one takes no more than a piece does.
    # But batch norm keeps its running values, which move once all pieces are through.
    kept = 0 if norms else 1
    runs = [run_again_later if recompute else embed] * (len(pieces) - kept) + [embed] * kept
    with _counted_once(norms) as next_piece:
        embeddings = []
        for run, piece in zip(runs, pieces, strict=True):
            next_piece()
            embeddings.append(run(*piece))
    return torch.cat(embeddings)


class Span(NamedTuple):
    """Rows of a batch, and how long the longest of them is."""

    rows: slice
    length: int


def spans_of(lengths: Sequence[int], *, most: int | None, overhead: int) -> list[Span]:
    """Cut captions into groups of like length, so that little of what is computed is padding.

    Args:
        lengths: how many tokens each has; without `most` the longest first.
        most: rows a group; left out, as many groups as pay for themselves.
        overhead: how many tokens cost as much as one more group.
    """
    if most is not None:
        starts = list(range(0, len(lengths), most))
    else:
        starts = _best_cuts(lengths, overhead)
    stops = [*starts[1:], len(lengths)]
    return [Span(slice(a, b), max(lengths[a:b])) for a, b in zip(starts, stops, strict=True)]


def _best_cuts(lengths: Sequence[int], overhead: int) -> list[int]:
    """Return where the groups start whose tokens, padding and overhead are fewest."""
    # A group starts where a shorter caption does; best[k] is the least from that place on.
    places = [k for k, length in enumerate(lengths) if k == 0 or length != lengths[k - 1]]
    ends = [*places, len(lengths)]
    best: dict[int, tuple[int, list[int]]] = {len(lengths): (0, [])}
    for at in reversed(range(len(places))):
        start = places[at]
        best[start] = min(
            (lengths[start] * (end - start) + overhead + best[end][0], [start, *best[end][1]])
            for end in ends[at + 1 :]
        )
    return best[0][1]


def counting_norms(modules: Sequence[nn.Module]) -> list[_BatchNorm]:
    """Return the batch norms that take their statistics from what they are shown."""
    found = (norm for module in modules for norm in module.modules())
    return [
        norm
        for norm in found
        if isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats
    ]


@contextmanager
def _not_counting(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Leave the running values alone while a piece is run again: it moves copies of them."""
    kept = [dict(norm.named_buffers()) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


@contextmanager
def _counted_once(norms: Sequence[_BatchNorm]) -> Iterator[Callable[[], None]]:
    """Gather the mean statistics of several pieces, and move the running values once."""
    before = [(n.momentum, _running(n)[0].clone(), _running(n)[1].clone()) for n in norms]
    pieces = 0

    def next_piece() -> None:
        nonlocal pieces
        pieces += 1
        for norm in norms:
            norm.momentum = 1 / pieces  # of the k-th piece 1/k: the mean so far

    try:
        yield next_piece
    finally:
        for norm, (momentum, mean, variance) in zip(norms, before, strict=True):
            norm.momentum = momentum
            counted = norm.num_batches_tracked
            assert counted is not None
            counted -= max(0, pieces - 1)
            weight = 1 / counted if momentum is None else momentum
            for old, shown in zip((mean, variance), _running(norm), strict=True):
                shown.copy_(old + weight * (shown - old))


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var
