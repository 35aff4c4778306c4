"""The models that benchmarks train: ours and open_clip's of the same name, weights at random.

Made here alone, so that a switch of ours is given in one place. Nothing but torch, timm and
lightning is needed; without open_clip its side is left out.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import nn

from clipkit.encoders import TextTransformer, TimmImageEncoder
from clipkit.heads import LinearHead
from clipkit.losses import InfoNCELoss
from clipkit.module import CLIPModule
from clipkit.optim import WarmupCosine
from clipkit.temperature import Temperature
from clipkit.tokenizer import TextContract

CONTEXT = 77
CONTRACT = TextContract(
    vocab_size=49_408, context_length=CONTEXT, start_id=49_406, end_id=49_407, pad_id=0,
    pad_to_context=False, clean="lower",
)  # fmt: skip
"""CLIP's own; its vocabulary lies in open_clip, and ids drawn at random need none."""


class NoTokenizer(NamedTuple):
    """What a module wants of a tokenizer where nothing is tokenised."""

    contract: TextContract = CONTRACT


class Shape(NamedTuple):
    """A model in timm's and open_clip's words."""

    timm: str
    embed_dim: int
    width: int  # of the text tower
    depth: int
    heads: int
    same_weights: bool = True  # whether open_clip's image tower is the one of timm
    image_size: int = 224


SHAPES = {
    "ViT-B-32": Shape("vit_base_patch32_clip_224", 512, 512, 12, 8),
    "ViT-B-16": Shape("vit_base_patch16_clip_224", 512, 512, 12, 8),
    "ViT-L-14": Shape("vit_large_patch14_clip_224", 768, 768, 12, 12),
    "ViT-S-32": Shape("vit_small_patch32_224", 384, 384, 12, 6, same_weights=False),
    "tiny": Shape("test_vit", 16, 16, 2, 2, same_weights=False, image_size=32),
}
"""`tiny` is for trying the scripts."""


def has_peer() -> bool:
    """Whether open_clip is installed."""
    return _is_there("open_clip")


def has_peers_training() -> bool:
    """Whether its training loop can be run, which wants more than the package (extra `peers`)."""
    return _is_there("open_clip_train") and _is_there("webdataset")


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ImportError:
        return False


def module_of(name: str, *, micro_batch: int | None = None, compiled: bool = False) -> CLIPModule:
    """Return our module of that shape in training mode."""
    shape = SHAPES[name]
    # Left out where it is not wanted: on a CPU nothing is compiled.
    switches: dict[str, Any] = {"compile": True} if compiled else {}
    torch.manual_seed(0)
    module = CLIPModule(
        image_encoder=TimmImageEncoder(shape.timm, image_size=shape.image_size),
        text_encoder=partial(
            TextTransformer, width=shape.width, depth=shape.depth, heads=shape.heads
        ),
        tokenizer=NoTokenizer(),  # type: ignore[arg-type]
        image_head=LinearHead,
        text_head=LinearHead,
        temperature=Temperature(),
        loss=InfoNCELoss(),
        optimizer=torch.optim.AdamW,
        schedule=WarmupCosine,
        embed_dim=shape.embed_dim,
        micro_batch=micro_batch,
        **switches,
    ).train()
    if compiled:
        # What `fit` does before the first step; the loops here have no trainer.
        module.trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module.on_fit_start()
    return module


def peer_of(name: str, device: str) -> Any:
    """Return open_clip's model in training mode."""
    import open_clip

    torch.manual_seed(0)
    shape = SHAPES[name]
    if name in open_clip.list_models():
        return open_clip.create_model(name, device=device).train()
    vision = {"timm_model_name": shape.timm, "image_size": shape.image_size}
    text = {"width": shape.width, "layers": shape.depth, "heads": shape.heads}
    return open_clip.CLIP(shape.embed_dim, vision, text).to(device).train()


def copy_weights(peer: nn.Module, module: CLIPModule) -> None:
    """Put open_clip's weights into our module."""
    from tests.test_parity import ours_from_theirs

    prefixes = {
        "image": "image_encoder",
        "text": "text_encoder",
        "log_scale": "temperature.log_scale",
    }
    state = module.state_dict()
    for name, tensor in ours_from_theirs(peer.state_dict()).items():
        head, dot, rest = name.partition(".")
        state[prefixes.get(head, head) + dot + rest] = tensor
    module.load_state_dict(state)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW with CLIP's settings, no decay of vectors: for both alike."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.2},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, fused=True)


PRECISIONS = ("float32", "bf16")


def add_precision(options_of: argparse.ArgumentParser) -> None:
    """Add the option that says what towers compute in."""
    options_of.add_argument(
        "--precision", choices=PRECISIONS, default=None, help="bf16 on a GPU, else float32"
    )


def precision_of(options: argparse.Namespace) -> str:
    """Return the precision asked for, or the device's usual one."""
    chosen: str = options.precision or ("bf16" if options.device == "cuda" else "float32")
    return chosen


def autocast(precision: str, device: str) -> AbstractContextManager[None]:
    """Return what a step runs in: Lightning's bf16-mixed, open_clip's amp_bf16, or nothing."""
    if precision == "float32":
        return nullcontext()
    made: AbstractContextManager[None] = torch.autocast(device, torch.bfloat16)
    return made
