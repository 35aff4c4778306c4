"""What a contrastive loss takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Duplicates = Literal["ignore", "positive", "negative"]


class Ids(NamedTuple):
    """What tells equal rows: an int64 id of each row's caption and one of its picture."""

    caption: Tensor
    image: Tensor


class LossTerms(NamedTuple):
    """The scalar to minimise and, where the loss has them, its two directions."""

    loss: Tensor
    image_to_text: Tensor | None = None
    text_to_image: Tensor | None = None

    def named(self) -> dict[str, Tensor]:
        """Return the terms there are: loss, loss_image_to_text, loss_text_to_image."""
        names = ("loss", "loss_image_to_text", "loss_text_to_image")
        return {name: term for name, term in zip(names, self, strict=True) if term is not None}


class ContrastiveLoss(nn.Module, ABC):
    """Base of the losses over a batch of pairs; the mean over ranks is the whole batch's loss.

    Shapes: b this rank's pairs, N the pairs of all ranks, E extra captions (negatives only).
    """

    @abstractmethod
    def forward(
        self,
        image: Tensor,
        text: Tensor,
        all_image: Tensor,
        all_text: Tensor,
        *,
        offset: int,
        scale: Tensor,
        bias: Tensor | None = None,
        ids: Ids | None = None,
        all_ids: Ids | None = None,
    ) -> LossTerms:
        """Compute the loss of this rank's rows against all columns.

        Args:
            image: (b, D) unit-norm image embeddings of this rank.
            text: (b, D) unit-norm text embeddings of this rank.
            all_image: (N, D) image embeddings of all ranks; one process passes ``image`` again.
            all_text: (N + E, D) text embeddings of all ranks; the last E are negatives only.
            offset: the column of this rank's first positive.
            scale: 0-D tensor that multiplies the cosines.
            bias: 0-D tensor added to the logits.
            ids: ids of this rank's rows, (b,) each.
            all_ids: ids of the columns: caption (N + E,), image (N,).
        """


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in float32 or wider: logits in half precision lose the loss its digits."""
    return tuple(t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors)
