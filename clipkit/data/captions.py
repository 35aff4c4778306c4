"""What a batch holds of its captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clipkit.data.identity import caption_ids
from clipkit.tokenizer import TextContract, Tokenizer


class EncodedCaption(NamedTuple):
    """One caption."""

    tokens: np.ndarray[Any, Any]  # (l,), without padding
    truncated: bool  # whether it was cut to the context
    id: int  # equal for equal captions


class EncodedCaptions(NamedTuple):
    """The captions of a batch."""

    tokens: Tensor  # int64 (b, L)
    truncated: Tensor  # bool (b,), whether it was cut to the context
    ids: Tensor  # int64 (b,), equal for equal captions
    lengths: Tensor  # int64 (b,), tokens before the padding


def encode_captions(tokenizer: Tokenizer, captions: Sequence[str]) -> EncodedCaptions:
    """Tokenise captions."""
    tokens, truncated = tokenizer.encode(captions)
    contract = tokenizer.contract
    ids = torch.tensor(caption_ids(tokens, contract.end_id), dtype=torch.int64)
    return EncodedCaptions(tokens, truncated, ids, contract.lengths(tokens))


def stack_captions(contract: TextContract, captions: Sequence[EncodedCaption]) -> EncodedCaptions:
    """Return what `encode_captions` gives for the same captions."""
    lengths = np.array([len(caption.tokens) for caption in captions], np.int64)
    longest = contract.context_length if contract.pad_to_context else lengths.max(initial=0)
    there = np.arange(longest) < lengths[:, None]
    tokens = np.full(there.shape, contract.pad_id, np.int64)
    if captions:
        tokens[there] = np.concatenate([caption.tokens for caption in captions])
    return EncodedCaptions(
        torch.from_numpy(tokens),
        torch.tensor([caption.truncated for caption in captions], dtype=torch.bool),
        torch.tensor([caption.id for caption in captions], dtype=torch.int64),
        torch.from_numpy(lengths),
    )
