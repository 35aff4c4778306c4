"""A ViT's last block computes the class token alone: the same features and gradients."""

import copy
import pickle

import pytest
import torch
from timm.models.vision_transformer import Block

from clipkit.encoders import TimmImageEncoder
from clipkit.encoders.class_token import ClassTokenBlock

TOKEN = "vit_tiny_patch16_224"
REGISTERS = "vit_medium_patch16_reg4_gap_256"  # pools the mean of its patches


def features_and_gradients(encoder, images):
    features = encoder(images)
    features.square().sum().backward()
    return features, {name: p.grad.clone() for name, p in encoder.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"patch_drop_ratio": 0.5}, {"drop_path_ratio": 0.3}])
def test_features_and_gradients_are_those_of_the_whole_block(options):
    torch.manual_seed(0)
    encoder = TimmImageEncoder(TOKEN, image_size=32, **options).double()
    whole = copy.deepcopy(encoder)
    assert type(whole.trunk.blocks[-1]) is ClassTokenBlock
    whole.trunk.blocks[-1].__class__ = Block
    images = torch.rand(5, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    features, gradients = features_and_gradients(encoder, images)
    torch.manual_seed(1)
    expected, of_whole = features_and_gradients(whole, images)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_whole[name], rtol=0, atol=1e-11, msg=name)


def test_the_mlp_sees_one_token_a_picture():
    encoder = TimmImageEncoder(TOKEN, image_size=32)
    seen = []
    encoder.trunk.blocks[-1].mlp.register_forward_pre_hook(
        lambda mlp, inputs: seen.append(inputs[0].shape[1])
    )
    encoder(torch.rand(2, 3, 32, 32))
    assert seen == [1]


def test_a_vit_that_pools_its_patches_is_left_as_it_is():
    encoder = TimmImageEncoder(REGISTERS, image_size=64)
    assert type(encoder.trunk.blocks[-1]) is Block


def test_it_is_copied_and_pickled():
    encoder = TimmImageEncoder(TOKEN, image_size=32).eval()
    images = torch.rand(2, 3, 32, 32)
    again = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(again(images), encoder(images))
