"""A ViT that starts from nothing is drawn as open_clip's; everything else is left as it was."""

import pytest
import torch
from safetensors.torch import save_file

from clipkit.encoders import TimmImageEncoder


def test_every_tensor_has_the_spread_of_open_clips():
    open_clip = pytest.importorskip("open_clip", reason="needs the extra peers")
    from tests.test_parity import ours_from_theirs

    torch.manual_seed(0)
    vision = {"image_size": 64, "patch_size": 16, "width": 192, "layers": 12, "head_width": 64}
    peer = open_clip.CLIP(64, vision, {"vocab_size": 50, "width": 64, "heads": 1, "layers": 1})
    visual = {k: v for k, v in peer.state_dict().items() if k.startswith("visual.")}
    theirs = ours_from_theirs(visual)
    encoder = TimmImageEncoder("vit_tiny_patch16_224", image_size=64)
    for name, own in encoder.named_parameters():
        # timm's ViT has a bias on its patches, and CLIP's another norm.
        expected = theirs.get(f"image.{name}")
        if expected is None:
            assert name == "trunk.patch_embed.proj.bias"
            continue
        expected = expected.float().std(correction=0).item()
        found = own.std(correction=0).item()
        # Of a vector of 192 values the deviation itself is known to 5 %.
        tolerance = 0.03 if own.numel() > 10_000 else 0.25
        assert found == pytest.approx(expected, rel=tolerance), name


def test_weights_that_were_given_are_not_drawn_anew(tmp_path):
    first = TimmImageEncoder("vit_tiny_patch16_224", image_size=32)
    save_file(first.trunk.state_dict(), tmp_path / "w.safetensors")
    again = TimmImageEncoder(
        "vit_tiny_patch16_224", image_size=32, weights=str(tmp_path / "w.safetensors")
    )
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "test_resnet"])
def test_other_models_are_drawn_as_timm_draws_them(name):
    import timm

    torch.manual_seed(0)
    expected = timm.create_model(name, num_classes=0).state_dict()
    torch.manual_seed(0)
    found = TimmImageEncoder(name).trunk.state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
