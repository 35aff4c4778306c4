"""The last block of a ViT for the one token that leaves it.

Where the feature is the class token, what the last block's MLP makes of the patches is thrown away:
two thirds of that block. Features and gradients are the same without.
"""

from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor


class ClassTokenBlock(Block):
    """A block that returns the first token alone, (B, N, C) to (B, 1, C)."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        mixed = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)[:, :1]
        x = x[:, :1] + self.drop_path1(self.ls1(mixed))
        branch: Tensor = self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x + branch


def pools_its_class_token(trunk: Any) -> bool:
    """Whether a model is a plain ViT whose feature is its class token, as CLIP's is."""
    return (
        type(trunk) is VisionTransformer
        and trunk.global_pool == "token"
        and trunk.cls_token is not None
        and trunk.attn_pool is None
    )


def leave_patches_out_of_the_last_block(trunk: Any) -> None:
    """Change a plain ViT that pools its class token; leave any other model as it is."""
    if pools_its_class_token(trunk) and type(trunk.blocks[-1]) is Block:
        trunk.blocks[-1].__class__ = ClassTokenBlock
