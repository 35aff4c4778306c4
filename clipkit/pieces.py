"""A tower on a batch in pieces: the gradient of the whole batch in the memory of one piece.

A piece of a micro-batched tower runs under activation checkpointing: the forward pass keeps its
inputs alone, and is run again, with the same random numbers, when the gradient arrives. The loss
stands between the two and sees all embeddings, so that every pair is a negative of every other;
this is GradCache (https://arxiv.org/abs/2101.06983) within automatic differentiation.
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
    keep_last: bool = False,
) -> Tensor:
    """Return the embeddings of all pieces (B, D), in their order.

    Batch norm takes its statistics from each piece. Its running values move once: towards the mean
    of what the pieces show.

    Args:
        embed: a piece to (b, D).
        pieces: the batch, cut: what `embed` takes.
        modules: what `embed` runs through.
        recompute: keep no activation of a piece, and run it again for its gradient; a lone piece
            is kept.
        keep_last: keep those of the last piece, which the gradient reaches first: the right thing
            for the tower that runs last, whose gradient comes before any other memory is taken.
    """
    norms = counting_norms(modules)
    # A frozen tower has nothing to recompute for.
    trained = any(p.requires_grad for module in modules for p in module.parameters())
    recompute = recompute and trained and torch.is_grad_enabled()
    # Batch norm keeps its running values for the gradient; they move once all pieces are through.
    kept = len(pieces) - 1 if keep_last and not norms else None

    if len(pieces) == 1:
        return embed(*pieces[0])
    with _counted_once(norms) as count:
        embeddings = []
        for number, piece in enumerate(pieces):
            again = recompute and number != kept
            embeddings.append(run_again(embed, *piece, norms=norms) if again else embed(*piece))
            count()
    return torch.cat(embeddings)


def run_again(
    function: Callable[..., Tensor], *inputs: object, norms: Sequence[_BatchNorm] = ()
) -> Tensor:
    """Return what a function gives, keep its inputs alone, and run it again for its gradient.

    Args:
        function: what is run twice, with the same random numbers.
        inputs: of the function.
        norms: batch norms that it runs through; the second time their running values stay.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _not_counting(norms)

    # A compiled graph runs again by itself, and moves what it moves once.
    if torch.compiler.is_compiling() or not norms:
        found: Tensor = checkpoint(function, *inputs, use_reentrant=False)
        return found
    counted: Tensor = checkpoint(function, *inputs, use_reentrant=False, context_fn=contexts)
    return counted


class Span(NamedTuple):
    """Rows of a batch, and how long the longest of them is."""

    rows: slice
    length: int


def number_of_pieces(rows: int, most: int | None, modules: Sequence[nn.Module]) -> int:
    """Return into how many even pieces so many rows are cut, of at most so many rows each.

    Args:
        rows: of the batch.
        most: rows a piece; None leaves the batch whole.
        modules: what a piece runs through. Batch norm finds no statistics in a lone row, so that
            the last of an odd number is taken along with two others.
    """
    if most is None or rows == 0:
        return 1
    pieces = -(-rows // most)
    return min(pieces, max(rows // 2, 1)) if counting_norms(modules) else pieces


def spans_of(lengths: Sequence[int], *, pieces: int | None, overhead: int) -> list[Span]:
    """Cut captions into groups of like length, so that little of what is computed is padding.

    Args:
        lengths: how many tokens each has; without `pieces` the longest first.
        pieces: how many groups, of as many rows each; left out, as many as pay for themselves.
        overhead: how many tokens cost as much as one more group.
    """
    if pieces is None:
        starts = _best_cuts(lengths, overhead)
    else:
        # As `tensor_split` cuts: the first ones take what is over.
        least, over = divmod(len(lengths), pieces)
        starts = [number * least + min(number, over) for number in range(pieces)]
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


def leave_out_reruns(norms: Sequence[_BatchNorm]) -> None:
    """Have batch norms move no running value where they run within a backward pass: a second time.

    For libraries that checkpoint by themselves; to be called before each forward pass, since
    `sync_batchnorm` puts other norms in the place of those that an encoder was made with.
    """
    if torch.compiler.is_compiling():  # a compiled graph moves what it moves once
        return
    for norm in norms:
        if _before_norm not in norm._forward_pre_hooks.values():
            norm.register_forward_pre_hook(_before_norm)
            # Also where the pass is left early, when nothing more is missing.
            norm.register_forward_hook(_after_norm, always_call=True)


def _before_norm(norm: nn.Module, _: object) -> None:
    if _runs_again():
        _set_aside(norm)


def _after_norm(norm: nn.Module, _: object, __: object) -> None:
    if _runs_again():
        _bring_back(norm)


def _runs_again() -> bool:
    compiling = torch.compiler.is_compiling()
    return not compiling and torch._C._current_graph_task_id() != -1


@contextmanager
def _not_counting(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Leave the running values alone while something is run again."""
    for norm in norms:
        _set_aside(norm)
    try:
        yield
    finally:
        for norm in norms:
            _bring_back(norm)


def _set_aside(norm: nn.Module) -> None:
    """Put copies in the place of the running values, for a norm to move."""
    kept = dict(norm.named_buffers())
    vars(norm).setdefault("_kept", []).append(kept)
    for name, buffer in kept.items():
        setattr(norm, name, buffer.clone())


def _bring_back(norm: nn.Module) -> None:
    for name, buffer in vars(norm)["_kept"].pop().items():
        setattr(norm, name, buffer)


@contextmanager
def _counted_once(norms: Sequence[_BatchNorm]) -> Iterator[Callable[[], None]]:
    """Let each piece move the running values from where they stood, and keep the mean of that.

    What is yielded is to be called after each piece.
    """
    if not norms:
        yield lambda: None
        return
    running = [norm.get_buffer(k) for norm in norms for k in ("running_mean", "running_var")]
    counts = [norm.get_buffer("num_batches_tracked") for norm in norms]
    before = [value.clone() for value in (*running, *counts)]
    moved = [torch.zeros_like(value) for value in running]
    pieces = 0

    def count() -> None:
        nonlocal pieces
        pieces += 1
        torch._foreach_add_(moved, running)
        torch._foreach_copy_([*running, *counts], before)

    yield count
    torch._foreach_copy_(running, torch._foreach_div(moved, pieces))
    torch._foreach_add_(counts, 1)
