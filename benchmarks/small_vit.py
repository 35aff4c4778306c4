"""open_clip's small ViT as an encoder of ours: what `trains_as_well` trains on both sides."""

from __future__ import annotations

from torch import Tensor

from clipkit.encoders import ImageEncoder

IMAGE_SIZE, PATCH, WIDTH, DEPTH, HEADS = 64, 8, 96, 3, 2

VISION = {
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
    "width": WIDTH,
    "layers": DEPTH,
    "head_width": WIDTH // HEADS,
}
"""The same in open_clip's words."""


class SmallViT(ImageEncoder):
    """A ViT of 64 patches of 8 x 8 pixels, normed before and after, without a patch bias."""

    def __init__(self) -> None:
        from timm.models.vision_transformer import VisionTransformer

        from clipkit.encoders.initialisation import draw_as_clip

        super().__init__(feature_dim=WIDTH, image_size=IMAGE_SIZE)
        self.trunk = VisionTransformer(
            img_size=IMAGE_SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS,
            pre_norm=True, num_classes=0, global_pool="token",
        )  # fmt: skip
        draw_as_clip(self.trunk)

    def no_weight_decay(self) -> set[str]:
        return {"trunk.cls_token"}  # a vector in open_clip, whose vectors are spared

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.trunk(self.normalise(images))
        return features
