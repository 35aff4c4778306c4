"""How many floating-point operations a forward pass of a tower takes.

A multiplication and an addition are two. Only products of matrices and convolutions count, as in
the tables of papers and of open_clip. For a transformer of depth n and width w with an MLP of four
times its width, L tokens take
``n (24 L w^2 + 4 L^2 w)``: two operations for each of the 12 w^2 weights of a block and each token,
and two products of (L, w) with (w, L) in attention. The causal half of attention is not deducted.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipkit.encoders.base import Encoder, ImageEncoder, LayerGroup, TextEncoder
from clipkit.encoders.text import TextTransformer
from clipkit.tokenizer import TextContract


class TextOperations(NamedTuple):
    """Operations of a caption of L tokens: ``constant + linear L + quadratic L^2``."""

    constant: float
    linear: float
    quadratic: float

    def total(self, *, captions: int, tokens: int, squares: int) -> float:
        """Return the operations of several captions.

        Args:
            captions: how many there are.
            tokens: how many tokens they have together.
            squares: the sum of the squares of their lengths.
        """
        return self.constant * captions + self.linear * tokens + self.quadratic * squares


def image_operations(encoder: ImageEncoder, size: int | None = None) -> float:
    """Return the operations of one picture, in the encoder's present mode.

    While it trains, patches that it drops are not counted.

    Args:
        encoder: the tower.
        size: of the picture, if it is not the encoder's own.
    """
    size = encoder.image_size if size is None else size
    # Batch norm cannot learn from a single picture.
    return _counted(encoder, torch.zeros(2, 3, size, size)) / 2


def text_operations(encoder: TextEncoder, contract: TextContract) -> TextOperations:
    """Return the operations of a caption by its length: in closed form, or counted and fitted."""
    if isinstance(encoder, TextTransformer):
        weights = _weights(encoder.blocks)
        # In the last block they are applied to the pooled token alone.
        last: Any = encoder.blocks[-1]
        once = 0 if encoder.pooling == "mean" else _weights(last.mlp) + _weights(last.attention.out)
        return TextOperations(
            2.0 * once, 2.0 * (weights - once), 4.0 * len(encoder.blocks) * encoder.feature_dim
        )
    context = contract.context_length
    lengths = sorted({min(2, context), context // 2 + 1, context})
    counts = [_counted(encoder, _caption(contract, length)) for length in lengths]
    fitted = np.polynomial.polynomial.polyfit(lengths, counts, len(lengths) - 1)
    return TextOperations(*(*fitted.tolist(), 0.0, 0.0)[:3])


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def backward_share(encoder: Encoder) -> float:
    """Return the share of the encoder that a gradient passes: 0 where it is locked, 1 where open.

    A gradient reaches down to the lowest layer group that is trained. Groups count alike, but for
    the lowest: embeddings, or a stem that costs next to nothing.
    """
    groups = encoder.layer_groups()
    trained = [_is_trained(group) for group in groups]
    if True not in trained:
        return 0.0
    return min((len(groups) - trained.index(True)) / max(len(groups) - 1, 1), 1.0)


def _is_trained(group: LayerGroup) -> bool:
    return any(
        parameter.requires_grad
        for part in group
        for parameter in ([part] if isinstance(part, nn.Parameter) else part.parameters())
    )


def _caption(contract: TextContract, length: int) -> Tensor:
    special = (contract.start_id, contract.end_id, contract.pad_id)
    word = next(token for token in range(contract.vocab_size) if token not in special)
    tokens = torch.full((1, length), word)
    tokens[:, -1] = contract.end_id
    return tokens


def _counted(encoder: Encoder, inputs: Tensor) -> float:
    tensors = {**dict(encoder.named_parameters()), **dict(encoder.named_buffers())}
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    # Attention as plain products: what the fused kernels do is not counted on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:  # shapes alone cost nothing, even for the largest tower
            with FlopCounterMode(display=False) as counter:
                torch.func.functional_call(encoder, shapes, (inputs.to("meta"),))
        except Exception:  # a tower that has to look at numbers
            with torch.random.fork_rng(devices=[]), FlopCounterMode(display=False) as counter:
                copy.deepcopy(encoder).cpu().float()(inputs)
    return float(counter.get_total_flops())
