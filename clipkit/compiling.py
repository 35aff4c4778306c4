"""Towers through `torch.compile`: one graph of a text tower serves captions of every length."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clipkit.encoders.packing import Packed
from clipkit.errors import UserError

BACKEND = "inductor"

Tower = Callable[..., Tensor]


def compiled_image_tower(encoder: nn.Module) -> Tower:
    """Return a tower of pictures with a graph for each shape that it is given."""
    compiled = _compiled(encoder, dynamic=False)

    def run(images: Tensor) -> Tensor:
        with _said_in_a_sentence():
            features: Tensor = compiled(images)
            return features

    return run


def compiled_text_tower(encoder: nn.Module) -> Tower:
    """Return a tower of captions, (B, L) to (B, ...), with one graph for all B and L.

    And one for captions without padding, whatever their lengths, if it takes them.
    """
    compiled = _compiled(encoder, dynamic=True)

    def run(tokens: Tensor, packed: Packed | None = None) -> Tensor:
        # A lone caption would have a graph of its own, and so would a view into other captions.
        lone = len(tokens) == 1
        inputs: list[Tensor | Packed] = [_of_any_size(tokens.repeat(2 if lone else 1, 1), 0, 1)]
        if packed is not None and not lone:
            vectors = _of_any_size(packed.vectors.clone(), 0)
            inputs.append(Packed(vectors, _of_any_size(packed.places, 0)))
        with _said_in_a_sentence():
            features: Tensor = compiled(*inputs)
            return features[: len(tokens)]

    return run


def _of_any_size(tensor: Tensor, *dimensions: int) -> Tensor:
    for dimension in dimensions:  # marked, two sizes that happen to be equal are not taken for one
        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
    return tensor


def _compiled(encoder: nn.Module, *, dynamic: bool) -> Tower:
    # Graphs cut for DDP in its forward pass would not be those of a piece that is run again.
    torch._dynamo.config.optimize_ddp = False
    # On a machine without a GPU it speaks of the one that it did not find.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    tower: Tower = torch.compile(encoder, dynamic=dynamic, backend=BACKEND)
    return tower


@contextmanager
def _said_in_a_sentence() -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException

    try:
        with warnings.catch_warnings():
            # Of tracing, where what a tower is given was computed from parameters.
            warnings.filterwarnings("ignore", message=".*attribute of a Tensor that is not a leaf")
            yield
    except TorchDynamoException as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"model.compile: torch.compile cannot build a tower here ({reason}); "
            "model.compile=false trains without"
        ) from error
