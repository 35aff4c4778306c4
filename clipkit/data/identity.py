"""Numbers that are equal for equal captions and equal pictures, in whatever batch or run."""

from __future__ import annotations

from hashlib import blake2b

from PIL import Image
from torch import Tensor


def caption_ids(tokens: Tensor, end_id: int) -> list[int]:
    """Return an id a caption of a batch of tokens (B, L).

    Captions are equal where the model cannot tell them apart: by their tokens, padding aside, since
    the same caption is padded differently in another batch.
    """
    ends = (tokens == end_id).int().argmax(1) + 1
    table = tokens.numpy()
    return [_digest(table[i, :end].tobytes()) for i, end in enumerate(ends.tolist())]


def image_id(image: bytes | Image.Image) -> int:
    """Return the id of an encoded picture, or of a drawn one."""
    if isinstance(image, bytes):
        return _digest(image)
    return _digest(f"{image.mode} {image.size} ".encode() + image.tobytes())


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big", signed=True)
