"""Attention runs in the fused kernel: never as a matrix of all pairs of tokens."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clipkit.encoders import HuggingFaceTextEncoder, TextTransformer, TimmImageEncoder
from clipkit.tokenizer import Tokenizer

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
TOKENIZER = Tokenizer("english")
# As the module gives them: no longer than the longest caption of their group.
TOKENS = TOKENIZER(["two red circles and a green square", "a cat"])
PICTURES = torch.rand(2, 3, 64, 64)
DEPTH = 2


class Kernels(TorchDispatchMode):
    """Notes the fused kernels that run, with their mask, and every softmax."""

    def __init__(self):
        super().__init__()
        self.forward, self.backward, self.softmax = [], 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if function is FLASH:
            causal = arguments[4] if len(arguments) > 4 else keywords.get("is_causal", False)
            self.forward.append((causal, keywords.get("attn_mask")))
        self.backward += function is BACKWARD
        self.softmax += "softmax" in str(function)
        return function(*arguments, **keywords)


def kernels(encoder, inputs, dtype):
    with Kernels() as ran, torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        encoder(inputs).float().square().sum().backward()
    assert ran.softmax == 0
    assert len(ran.forward) == ran.backward
    return ran.forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_tower_masks_by_being_causal(dtype):
    assert TOKENS.shape[1] < TOKENIZER.contract.context_length
    encoder = TextTransformer(TOKENIZER.contract, width=16, depth=DEPTH, heads=2, dropout=0.1)
    assert kernels(encoder, TOKENS, dtype) == [(True, None)] * DEPTH


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attend_padding", [True, False])
def test_a_tower_that_is_not_causal_masks_padding_alone(dtype, attend_padding):
    encoder = TextTransformer(
        TOKENIZER.contract, width=16, depth=DEPTH, heads=2, causal=False,
        pooling="mean", attend_padding=attend_padding,
    )  # fmt: skip
    found = kernels(encoder, TOKENS, dtype)
    assert [causal for causal, _ in found] == [False] * DEPTH
    assert all((mask is None) == attend_padding for _, mask in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch_drop_ratio", [0.0, 0.5])
def test_a_vit_of_timm(dtype, patch_drop_ratio):
    encoder = TimmImageEncoder("test_vit", image_size=64, patch_drop_ratio=patch_drop_ratio)
    found = kernels(encoder, PICTURES, dtype)
    assert found == [(False, None)] * len(encoder.trunk.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_towers_of_transformers(dtype, model_type):
    pytest.importorskip("transformers")
    config = {"model_type": model_type, "hidden_size": 16, "num_hidden_layers": DEPTH,
              "num_attention_heads": 2, "intermediate_size": 32,
              "attention_probs_dropout_prob": 0.0}  # fmt: skip
    if model_type == "modernbert":
        config |= {"cls_token_id": 2, "sep_token_id": 3}
    encoder = HuggingFaceTextEncoder(
        TOKENIZER.contract, name="small", pretrained=False, config=config
    )
    assert len(kernels(encoder, TOKENS, dtype)) == DEPTH
