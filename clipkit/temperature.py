"""The learnable temperature of contrastive learning: log-scale, optional bias, and their limits.

The parameter is the logarithm of the scale that multiplies cosine similarities, as in CLIP
(https://arxiv.org/abs/2103.00020); the bias is SigLIP's (https://arxiv.org/abs/2303.15343).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from clipkit.errors import UserError


class Temperature(nn.Module):
    """Scale, and optionally bias, of the logits: ``scale * cosine + bias``.

    Args:
        init: the temperature at the start; the scale is its inverse (0.07 gives 14.29).
        max_scale: the scale is held in [1, max_scale] after every optimiser step.
        bias: added to every logit. ``prior`` starts at -ln(B - 1), the logit at which a pair drawn
            from a batch of B is positive with probability 1/B; it is filled in when fit begins.
        learnable: whether scale and bias are trained.
    """

    def __init__(
        self,
        init: float = 0.07,
        *,
        max_scale: float = 100.0,
        bias: float | Literal["prior"] | None = None,
        learnable: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < init <= 1 or not max_scale >= 1 / init - 1e-6:
            raise UserError(
                f"model.temperature.init: {init} with max_scale {max_scale}: the temperature lies "
                "in (0, 1] and its inverse may not exceed max_scale"
            )
        self.max_scale = max_scale
        self.learnable = learnable
        self.log_scale = nn.Parameter(torch.tensor(-math.log(init)), requires_grad=learnable)
        self.bias: nn.Parameter | None = None
        if bias is not None:
            # NaN marks a prior that is still to be filled; a checkpoint overwrites it.
            start = math.nan if bias == "prior" else float(bias)
            self.bias = nn.Parameter(torch.tensor(start), requires_grad=learnable)

    @property
    def scale(self) -> Tensor:
        """exp(log_scale), a 0-D tensor."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Hold the scale in [1, max_scale].

        Called after the optimiser's step: clamping inside the forward pass would have no gradient
        past the limit, and a saturated scale could not come back.
        """
        self.log_scale.clamp_(0.0, math.log(self.max_scale))

    @torch.no_grad()
    def fill_prior_(self, batch_size: int) -> None:
        """Set a bias given as ``prior`` to -ln(B - 1), unless it already has a value."""
        if self.bias is not None and self.bias.isnan():
            self.bias.fill_(-math.log(max(batch_size - 1, 1)))
