"""Embedding a data set once per weights, shared by whoever evaluates on it."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkit.data.images import decode_image, naming_broken, resize_for_eval, to_uint8
from clipkit.distributed import any_rank, gather_ragged, rank, world_size
from clipkit.errors import UserError
from clipkit.suite.eval_data import EvalData

if TYPE_CHECKING:
    from clipkit.data.rows import Rows
    from clipkit.module import CLIPModule

BATCH_SIZE = 128
PIXELS_KEPT = 512 * 2**20
"""Bytes of decoded pictures kept a data set and rank, so that later epochs need not decode."""


class _Kept(NamedTuple):
    weights: Tensor
    embeddings: Tensor


_embeddings: WeakKeyDictionary[CLIPModule, dict[tuple[object, ...], _Kept]] = WeakKeyDictionary()
_pixels: WeakKeyDictionary[CLIPModule, dict[tuple[object, ...], list[Tensor]]] = WeakKeyDictionary()


def embed_data(module: CLIPModule, data: EvalData, rows: Rows) -> Tensor:
    """Return the embeddings (N, D) of all pictures of the rows, on the CPU, in their order.

    Every rank embeds its share and receives them all. The module should be in eval mode.
    """
    pictures = _identity(data, rows, module)
    weights = _fingerprint(module)
    kept = _embeddings.setdefault(module, {})
    if pictures not in kept or not torch.equal(kept[pictures].weights, weights):
        kept[pictures] = _Kept(weights, _embed(module, pictures, rows))
    return kept[pictures].embeddings


@torch.no_grad()
def _embed(module: CLIPModule, pictures: tuple[object, ...], rows: Rows) -> Tensor:
    mine: list[Tensor] = []
    broken: UserError | None = None
    try:
        for pixels in _batches_of_pixels(module, pictures, rows):
            mine.append(module.encode_image(pixels.to(module.device)))
    except UserError as error:
        broken = error
    # All ranks stop at one's broken picture: those that went on would wait for it for ever.
    if any_rank(broken is not None):
        raise broken or UserError("another rank could not read its pictures")
    empty = module.scale.detach().new_zeros(0, module.embed_dim)
    gathered = gather_ragged(torch.cat([empty, *mine]))
    # Rank r embedded rows r, r + W, ...: put them back in order.
    order = torch.cat([torch.arange(r, len(rows), world_size()) for r in range(world_size())])
    embeddings = torch.empty_like(gathered, device="cpu")
    embeddings[order] = gathered.cpu()
    return embeddings


def _batches_of_pixels(
    module: CLIPModule, pictures: tuple[object, ...], rows: Rows
) -> Iterator[Tensor]:
    kept = _pixels.setdefault(module, {})
    if pictures in kept:
        yield from kept[pictures]
        return
    mine = _Pictures(rows, module)
    fits = len(mine) * 3 * module.image_encoder.image_size**2 <= PIXELS_KEPT
    batches = []
    loader = DataLoader(
        mine,
        batch_size=BATCH_SIZE,
        num_workers=_workers(module, mine),
        # Its own: a loader draws a seed, and evaluating shall not change what training draws.
        generator=torch.Generator(),
    )
    for pixels in loader:
        if fits:
            batches.append(pixels)
        yield pixels
    if fits:
        kept[pictures] = batches


def _workers(module: CLIPModule, pictures: _Pictures) -> int:
    """Return as many loader processes as training has, but none for a set that is quickly read."""
    trainer = module._trainer
    configured = getattr(getattr(trainer, "datamodule", None), "num_workers", None)
    return int(configured or 0) if len(pictures) > 2000 else 0


class _Pictures(Dataset[Tensor]):
    """This rank's share of the pictures, as the image encoder wants them."""

    def __init__(self, rows: Rows, module: CLIPModule) -> None:
        encoder = module.image_encoder
        self.rows = rows
        self.size = encoder.image_size
        self.resize_mode = encoder.resize_mode
        self.interpolation = encoder.interpolation
        self.indices = range(rank(), len(rows), world_size())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Tensor:
        index = self.indices[place]
        with naming_broken(f"{self.rows.key(index)!r} (row {index})"):
            image = decode_image(self.rows.image(index))
        return to_uint8(resize_for_eval(image, self.size, self.resize_mode, self.interpolation))


def _identity(data: EvalData, rows: Rows, module: CLIPModule) -> tuple[object, ...]:
    """Return what tells these pictures, as this encoder wants them, from all others."""
    encoder = module.image_encoder
    wanted = (encoder.image_size, encoder.resize_mode, encoder.interpolation)
    return (*pictures_of(data, rows), *wanted)


def pictures_of(data: EvalData, rows: Rows) -> tuple[object, ...]:
    """Return what tells these pictures from all others, whichever captions are read of them."""
    keys = blake2b("\n".join(rows.keys()).encode("utf-8", "surrogateescape")).hexdigest()
    return (data.path, data.split, data.image_column, keys)


@torch.no_grad()
def _fingerprint(module: CLIPModule) -> Tensor:
    """Return numbers that change with any weight or running value of the image side.

    Taken from the values themselves: torch's counter of writes misses fused optimisers.
    """
    side = torch.nn.ModuleList([module.image_encoder, module.image_head])
    tensors = [t for t in (*side.parameters(), *side.buffers()) if t.is_floating_point()]
    sums = [(t.double().sum(), t.double().square().sum()) for t in tensors if t.numel()]
    return torch.stack([value for pair in sums for value in pair]).cpu()
