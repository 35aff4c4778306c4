"""What a benchmark knows of a model: two verbs, and digests of all that decides its embeddings."""

from __future__ import annotations

import hashlib
import importlib
import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from clipkit.data.drawing import draw, sample
from clipkit.errors import UserError

IMAGES_AT_ONCE = 64
TEXTS_AT_ONCE = 256
PROBE_TEXTS = ("a photo of a dog", "two red circles on a blue square")


@runtime_checkable
class EmbeddingModel(Protocol):
    """Pictures and texts to rows of one space, in their order; norms are the caller's affair."""

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return float32 (N, D) on the CPU, one row a picture (RGB)."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return float32 (N, D) on the CPU, one row a text."""


@dataclass(frozen=True)
class OpenedModel:
    """A model ready to embed, and what tells it from every other.

    Attributes:
        model: the two verbs.
        spec: what the user typed.
        name: the same, short enough for a table.
        scale: the learnt factor of the cosines; None where the model has none.
        weights: sha256 of the names and bytes of the state dict; for an object that is no module,
            of its embeddings of two drawn pictures and two texts.
        tokenizer: digest of what is done to a text before the tower; None where it is not known.
        preprocess: digest of what is done to a picture before the tower; None likewise.
        dtype: the type of the weights, in which the towers run; embeddings leave them as float32.
        embed_dim: the width D of the joint space.
        configuration: what a checkpoint of clipkit was trained by.
    """

    model: EmbeddingModel
    spec: str
    name: str
    scale: float | None
    weights: str
    tokenizer: str | None
    preprocess: str | None
    dtype: str
    embed_dim: int
    configuration: dict[str, Any] | None = None


@torch.no_grad()
def probe(model: EmbeddingModel) -> tuple[Tensor, Tensor]:
    """Embed two drawn pictures and two texts, (2, D) each: what a model does, in small."""
    pictures = [Image.fromarray(draw(sample(0, "test", index), 64)) for index in range(2)]
    return model.embed_images(pictures).cpu(), model.embed_texts(list(PROBE_TEXTS)).cpu()


def dtype_of(module: nn.Module) -> str:
    """Return the type of the weights, such as float32; several are joined by +."""
    types = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    return "+".join(sorted(types)) or "float32"


def choose_device(device: str | None) -> torch.device:
    """Return the device named, by default the GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def digest_of_weights(module: nn.Module) -> str:
    """The sha256 of every name, type, shape and byte of a state dict, wherever its tensors lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, Tensor):  # what a module's get_extra_state gives
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of(values: dict[str, Any]) -> str:
    """The sha256 of plain values; the order in which they are named does not matter."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def embed_by_length(
    lengths: Tensor, encode: Callable[[Tensor, int], Tensor], embed_dim: int
) -> Tensor:
    """Embed texts of like length together, the longest first, and return them in their order.

    Args:
        lengths: (N,) how many tokens of each text its embedding depends on.
        encode: the rows (B,) of a batch and the longest length among them, to (B, D).
        embed_dim: D.
    """
    embeddings = torch.empty(len(lengths), embed_dim)
    for rows in torch.split(lengths.argsort(descending=True, stable=True), TEXTS_AT_ONCE):
        if len(rows):
            embeddings[rows] = encode(rows, int(lengths[rows[0]])).float().cpu()
    return embeddings


@torch.no_grad()
def embed_pictures(
    images: Sequence[Image.Image],
    preprocess: Callable[[Sequence[Image.Image]], Tensor],
    encode: Callable[[Tensor], Tensor],
    embed_dim: int,
) -> Tensor:
    """Prepare and embed pictures batch by batch."""
    embeddings = torch.empty(len(images), embed_dim)
    for start in range(0, len(images), IMAGES_AT_ONCE):
        batch = slice(start, start + IMAGES_AT_ONCE)
        embeddings[batch] = encode(preprocess(images[batch])).float().cpu()
    return embeddings


def import_library(name: str, spec: str, *, extra: str) -> ModuleType:
    """Import a library that an extra brings; a missing one is named with that extra."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{spec}: needs the library {name}, pip install 'clipkit[{extra}]' brings it"
        ) from None


def first_line(error: BaseException) -> str:
    """What a library's exception says first, short enough to stand in a sentence."""
    if "Weights only load failed" in str(error):  # torch goes on to say how to run it nevertheless
        return "refused, its weights would run code when they are loaded"
    line = str(error).strip().partition("\n")[0] or type(error).__name__
    return textwrap.shorten(line, 240, placeholder=" ...")
