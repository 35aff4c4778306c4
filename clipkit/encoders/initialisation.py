"""How a ViT that starts from nothing draws its weights: as open_clip's own ViT does.

timm draws every matrix with a deviation of 0.02, whatever its width. That suits a width of 768;
narrow towers start so much too small that they learn a fraction of what they could in a short run
(experiments/LOG.md).
"""

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def draw_as_clip(trunk: Any) -> None:
    """Draw the weights of a plain ViT with a class token, by the width of what they multiply."""
    deviation = trunk.embed_dim**-0.5
    nn.init.normal_(trunk.cls_token, std=deviation)
    if trunk.pos_embed is not None:
        nn.init.normal_(trunk.pos_embed, std=deviation)
    for module in trunk.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    for block in trunk.blocks:
        nn.init.xavier_uniform_(block.attn.qkv.weight)
        for linear in (block.attn.qkv, block.attn.proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
