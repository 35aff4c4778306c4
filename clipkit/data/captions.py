"""What a batch holds of its captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.data.identity import caption_ids
from clipkit.tokenizer import Tokenizer


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
