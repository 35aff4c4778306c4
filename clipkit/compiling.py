"""Towers through `torch.compile`: one graph of a text tower serves captions of every length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipkit.errors import UserError

BACKEND = "inductor"

Tower = Callable[[Tensor], Tensor]


def compiled_image_tower(encoder: nn.Module) -> Tower:
    """Return a tower of pictures with a graph for each shape that it is given."""
    compiled = _compiled(encoder, dynamic=False)

    def run(images: Tensor) -> Tensor:
        with _said_in_a_sentence():
            features: Tensor = compiled(images)
            return features

    return run


def compiled_text_tower(encoder: nn.Module) -> Tower:
    """Return a tower of captions, (B, L) to (B, ...), with one graph for all B and L."""
    compiled = _compiled(encoder, dynamic=True)

    def run(tokens: Tensor) -> Tensor:
        # A lone caption would have a graph of its own, and so would a view into other captions.
        alike = tokens.repeat(2 if len(tokens) == 1 else 1, 1)
        for dimension in (0, 1):  # marked, two sizes that happen to be equal are not taken for one
            torch._dynamo.maybe_mark_dynamic(alike, dimension)
        with _said_in_a_sentence():
            features: Tensor = compiled(alike)
            return features[: len(tokens)]

    return run


def _compiled(encoder: nn.Module, *, dynamic: bool) -> Tower:
    # Graphs cut for DDP in its forward pass would not be those of a piece that is run again.
    torch._dynamo.config.optimize_ddp = False
    tower: Tower = torch.compile(encoder, dynamic=dynamic, backend=BACKEND)
    return tower


@contextmanager
def _said_in_a_sentence() -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"model.compile: torch.compile cannot build a tower here ({reason}); "
            "model.compile=false trains without"
        ) from error
