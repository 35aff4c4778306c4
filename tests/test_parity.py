"""The same weights in open_clip's towers and in ours: features, loss, gradients and 20 steps.

The full models (`slow`) are ViT-B-32 and RN50 at 64 x 64 pixels, 16 tokens and 1,000 words; nothing
else of them is changed. `PARITY_RESULTS=FILE` appends the measured maxima to a file.
"""

import copy
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipkit.encoders import TextTransformer, TimmImageEncoder
from clipkit.heads import LinearHead
from clipkit.losses import InfoNCELoss
from clipkit.tokenizer import TextContract

open_clip = pytest.importorskip("open_clip", reason="needs the extra peers")

VOCAB, CONTEXT, BATCH, STEPS = 1000, 16, 4, 20
CONTRACT = TextContract(
    vocab_size=VOCAB,
    context_length=CONTEXT,
    start_id=VOCAB - 2,
    end_id=VOCAB - 1,
    pad_id=0,
    pad_to_context=False,
    clean="lower",
)


class Towers(nn.Module):
    """Two towers, two heads and a scale: what CLIPModule joins, without a trainer."""

    def __init__(self, image: TimmImageEncoder, embed_dim: int, *, image_bias: bool, **text: Any):
        super().__init__()
        self.image = image
        self.image_head = LinearHead(image.feature_dim, embed_dim, bias=image_bias)
        self.text = TextTransformer(CONTRACT, **text)
        self.text_head = LinearHead(self.text.feature_dim, embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image = F.normalize(self.image_head(self.image(images)), dim=-1)
        text = F.normalize(self.text_head(self.text(tokens)), dim=-1)
        return image, text, self.log_scale.exp()


# --- open_clip's names to ours -------------------------------------------------------------------


def ours_from_theirs(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or gradients, of open_clip's `CLIP` under our names, none left out."""
    ours: dict[str, Tensor] = {}
    resnet = "visual.attnpool.q_proj.weight" in theirs
    for name, tensor in theirs.items():
        if name.startswith("visual."):
            rename = _resnet_name if resnet else _vit_name
            ours.update(rename(name.removeprefix("visual."), tensor))
        else:
            ours.update(_text_name(name, tensor))
    return ours


def _text_name(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "text_projection":
        return {"text_head.projection.weight": tensor.T}
    if name == "logit_scale":
        return {"log_scale": tensor}
    if packed := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name):
        block, kind = packed.groups()
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"text.blocks.{block}.attention.{part}.{kind}": value for part, value in parts}
    for old, new in (
        ("positional_embedding", "position_embedding"),
        ("ln_final", "final_norm"),
        ("transformer.resblocks", "blocks"),
        ("attn.out_proj", "attention.out"),
        ("ln_1", "attention_norm"),
        ("ln_2", "mlp_norm"),
        ("mlp.c_fc", "mlp.expand"),
        ("mlp.c_proj", "mlp.shrink"),
    ):
        name = name.replace(old, new)
    return {f"text.{name}": tensor}


def _vit_name(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name == "proj":
        return {"image_head.projection.weight": tensor.T}
    if name == "class_embedding":
        return {"image.trunk.cls_token": tensor[None, None]}
    if name == "positional_embedding":
        return {"image.trunk.pos_embed": tensor[None]}
    for old, new in (
        ("conv1", "patch_embed.proj"),
        ("ln_pre", "norm_pre"),
        ("ln_post", "norm"),
        ("transformer.resblocks", "blocks"),
        ("attn.in_proj_", "attn.qkv."),
        ("attn.out_proj", "attn.proj"),
        ("ln_", "norm"),
        ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"),
    ):
        name = name.replace(old, new)
    return {f"image.trunk.{name}": tensor}


def _resnet_name(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if name.startswith("attnpool.c_proj"):
        return {name.replace("attnpool.c_proj", "image_head.projection"): tensor}
    kernels = {"1": "1x1", "2": "kxk", "3": "1x1"}
    for pattern, replacement in (
        (r"^attnpool\.positional_embedding", "head.pos_embed"),
        (r"^attnpool\.([qkv])_proj", r"head.\1"),
        (r"^(conv|bn)(\d)\.", r"stem.conv\2.\1."),
        (r"^layer(\d)\.(\d+)\.downsample\.0", r"layer\1.\2.shortcut.conv.conv"),
        (r"^layer(\d)\.(\d+)\.downsample\.1", r"layer\1.\2.shortcut.conv.bn"),
    ):
        name = re.sub(pattern, replacement, name)
    name = re.sub(
        r"^(layer\d\.\d+\.)(conv|bn)(\d)\.",
        lambda m: f"{m[1]}conv{m[3]}_{kernels[m[3]]}.{m[2]}.",
        name,
    )
    name = re.sub(r"^layer(\d)", lambda m: f"stages.{int(m[1]) - 1}", name)
    return {f"image.trunk.{name}": tensor}


# --- The pairs of models -------------------------------------------------------------------------


def published(name: str, *, image_size: int, text_layers: int = 12) -> dict[str, Any]:
    config: dict[str, Any] = open_clip.get_model_config(name)
    config["vision_cfg"]["image_size"] = image_size
    text = {"vocab_size": VOCAB, "context_length": CONTEXT, "layers": text_layers}
    config["text_cfg"].update(text)
    return config


def tiny_vit() -> dict[str, Any]:
    """TinyCLIP's tower of 8 million parameters beside a text tower of its width."""
    return {
        "embed_dim": 64,
        "vision_cfg": {"layers": 10, "width": 256, "patch_size": 16, "image_size": 32},
        "text_cfg": {
            "vocab_size": VOCAB,
            "context_length": CONTEXT,
            "width": 256,
            "heads": 4,
            "layers": 3,
        },
    }


def pair(config: dict[str, Any], timm_name: str) -> tuple[nn.Module, Towers]:
    """open_clip's model, drawn at random, and ours with the same weights, both in float64."""
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**config).double()
    theirs.transformer.get_cast_dtype = lambda: torch.float64  # it has no notion of float64
    for name, parameter in theirs.named_parameters():
        if name.endswith("bn3.weight"):  # zero at the start: whole blocks would go untested
            nn.init.uniform_(parameter, 0.1, 0.3)
    text = config["text_cfg"]
    ours = Towers(
        TimmImageEncoder(timm_name, image_size=config["vision_cfg"]["image_size"]),
        config["embed_dim"],
        image_bias=isinstance(config["vision_cfg"]["layers"], list),
        width=text["width"],
        depth=text["layers"],
        heads=text["heads"],
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
    ).double()
    own = {f"image.{name}": getattr(ours.image, name) for name in ("mean", "std")}
    ours.load_state_dict({**ours_from_theirs(theirs.state_dict()), **own})
    return theirs, ours


def batch(image_size: int, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pictures, and captions of different lengths padded to the context."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(BATCH, 3, image_size, image_size, generator=generator, dtype=torch.float64)
    tokens = torch.zeros(BATCH, CONTEXT, dtype=torch.int64)
    for row in range(BATCH):
        length = 5 + row % 8
        words = torch.randint(1, VOCAB - 2, (length - 2,), generator=generator)
        tokens[row, :length] = torch.tensor([VOCAB - 2, *words, VOCAB - 1])
    return images.to(dtype), tokens


def run_theirs(model: nn.Module, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = model(images, tokens)
    return outputs[:3]


def run_ours(model: Towers, images: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    return model(images, tokens[:, :13])  # 12 is the longest caption: ours leaves the padding out


def normalised(model: Towers, images: Tensor) -> Tensor:
    return (images - model.image.mean) / model.image.std


def their_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    loss: Tensor = open_clip.loss.ClipLoss()(image, text, scale)
    return loss


def our_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return InfoNCELoss()(image, text, image, text, offset=0, scale=scale).loss


def apart(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    """The largest difference of normalised features and scale."""
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def furthest(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def report(line: str) -> None:
    if path := os.environ.get("PARITY_RESULTS"):
        with Path(path).open("a") as file:
            file.write(line + "\n")


# --- The tests -----------------------------------------------------------------------------------

PAIRS = {
    "ViT-B-32": (lambda: published("ViT-B-32", image_size=64), "vit_base_patch32_clip_224"),
    "ViT-B-32-quickgelu": (
        lambda: published("ViT-B-32-quickgelu", image_size=64, text_layers=2),
        "vit_base_patch32_clip_quickgelu_224",
    ),
    "RN50": (lambda: published("RN50", image_size=64, text_layers=2), "resnet50_clip"),
    "tiny ViT": (tiny_vit, "vit_xsmall_patch16_clip_224"),
}


def test_quick_gelu_is_theirs_in_both_towers() -> None:
    config, timm_name = PAIRS["ViT-B-32-quickgelu"]
    theirs, ours = pair(config(), timm_name)
    images, tokens = batch(64, 0, torch.float64)
    with torch.no_grad():
        our_outputs = run_ours(ours, images, tokens)
        their_outputs = run_theirs(theirs, normalised(ours, images), tokens)
    error = apart(our_outputs, their_outputs)
    report(f"ViT-B-32-quickgelu: float64 features {error:.1e}")
    assert error < 1e-9


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50"])
def test_features_loss_and_gradients_are_theirs(name: str) -> None:
    config, timm_name = PAIRS[name]
    theirs, ours = pair(config(), timm_name)
    images, tokens = batch(64, 0, torch.float64)
    inputs = (normalised(ours, images), tokens)

    with torch.no_grad():
        feature_error = apart(
            run_ours(ours.eval(), images, tokens), run_theirs(theirs.eval(), *inputs)
        )
    their_outputs = run_theirs(theirs.train(), *inputs)  # BatchNorm by the batch from here on
    our_outputs = run_ours(ours.train(), images, tokens)
    feature_error = max(feature_error, apart(our_outputs, their_outputs))
    their_value, our_value = their_loss(*their_outputs), our_loss(*our_outputs)
    loss_error = (our_value - their_value).abs().item()
    their_value.backward()
    our_value.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == len(list(theirs.parameters()))
    gradient_error = furthest(
        {name: p.grad for name, p in ours.named_parameters() if p.grad is not None},
        ours_from_theirs(gradients),
    )
    largest = max(gradient.abs().max().item() for gradient in gradients.values())

    with torch.no_grad():
        theirs.transformer.get_cast_dtype = lambda: torch.float32
        images = images.float()
        our_outputs = run_ours(ours.float().eval(), images, tokens)
        inputs = (normalised(ours, images), tokens)
        float32_error = apart(our_outputs, run_theirs(theirs.float().eval(), *inputs))
    report(
        f"{name}: float64 features {feature_error:.1e}, loss {loss_error:.1e}, gradients "
        f"{gradient_error:.1e} (the largest is {largest:.2g}); float32 features {float32_error:.1e}"
    )
    assert feature_error < 1e-9
    assert loss_error < 1e-9
    assert gradient_error < 1e-9
    assert float32_error < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "name",
    ["tiny ViT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ViT-B-32", "RN50"))],
)
def test_twenty_steps_are_theirs(name: str, dtype: torch.dtype) -> None:
    make_config, timm_name = PAIRS[name]
    config = make_config()
    theirs, ours = pair(config, timm_name)
    theirs.transformer.get_cast_dtype = lambda: dtype
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    # At the full rate a ResNet with batch statistics blows float32's rounding up: two runs of
    # open_clip's own, started 1e-7 apart, part by 1e-2. CLIP warms up over 2,000 steps.
    warmup = 2000 if name == "RN50" and dtype == torch.float32 else 1

    def train(model: Any, run: Callable[..., Any], loss_of: Callable[..., Tensor]) -> list[float]:
        model.train()
        scale = model.log_scale if model is ours else model.logit_scale
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2
        )
        losses = []
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 5e-4 * min(1, (step + 1) / warmup)
            images, tokens = batch(config["vision_cfg"]["image_size"], step, dtype)
            if model is theirs:
                images = normalised(ours, images)
            loss = loss_of(*run(model, images, tokens))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                scale.clamp_(0, math.log(100))
            losses.append(loss.item())
        return losses

    their_losses = train(theirs, run_theirs, their_loss)
    our_losses = train(ours, run_ours, our_loss)
    loss_error = max(abs(a - b) for a, b in zip(our_losses, their_losses, strict=True))
    state = {k: v for k, v in ours.state_dict().items() if k not in ("image.mean", "image.std")}
    weight_error = furthest(state, ours_from_theirs(theirs.state_dict()))
    report(
        f"{name}, 20 AdamW steps in {dtype}: losses {loss_error:.1e} apart "
        f"({our_losses[0]:.3f} to {our_losses[-1]:.3f}), weights and statistics {weight_error:.1e}"
    )
    if dtype == torch.float64:
        assert loss_error < 1e-9
        assert weight_error < 1e-8
    else:
        assert loss_error < 1e-4


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_siglip_text_tower_is_theirs(activation: Any) -> None:
    settings = open_clip.get_model_config("ViT-B-16-SigLIP")["text_cfg"]
    settings.update(width=64, heads=4, layers=3, vocab_size=VOCAB, context_length=CONTEXT)
    if activation == "gelu_tanh":  # SigLIP 2
        settings["act_kwargs"] = {"approximate": "tanh"}
    torch.manual_seed(0)
    theirs = open_clip.model._build_text_tower(48, settings).double().eval()
    theirs.transformer.get_cast_dtype = lambda: torch.float64
    ours = TextTransformer(
        CONTRACT,
        width=64,
        depth=3,
        heads=4,
        causal=False,
        pooling="last",
        attend_padding=True,
        activation=activation,
        norm_eps=1e-6,
    ).double()
    head = LinearHead(64, 48, bias=True).double()
    tensors = dict(theirs.state_dict())
    nn.init.normal_(tensors["text_projection.bias"])
    head.projection.weight.data = tensors.pop("text_projection.weight")
    head.projection.bias.data = tensors.pop("text_projection.bias")
    renamed = ours_from_theirs(tensors)
    ours.load_state_dict({name.removeprefix("text."): value for name, value in renamed.items()})
    _, tokens = batch(8, 0, torch.float64)
    error = (head(ours.eval()(tokens)) - theirs(tokens)).abs().max().item()
    report(f"SigLIP text tower, {activation}: float64 features {error:.1e}")
    assert not ours.trim_is_exact
    assert error < 1e-9


def test_text_tower_starts_as_theirs() -> None:
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**tiny_vit())
    torch.manual_seed(1)
    ours = Towers(
        TimmImageEncoder("test_vit"), 64, image_bias=False, width=256, depth=3, heads=4
    ).state_dict()
    worst = 0.0
    for name, tensor in ours_from_theirs(theirs.state_dict()).items():
        if name.startswith("image"):
            continue
        assert ours[name].shape == tensor.shape
        if tensor.ndim == 2:
            ratio = (ours[name].std() / tensor.std()).item()
            worst = max(worst, abs(ratio - 1))
            assert ratio == pytest.approx(1, abs=0.04), name
        elif tensor.numel() == 1 or tensor.unique().numel() == 1:
            torch.testing.assert_close(ours[name], tensor)
        else:  # the biases of the MLP
            assert ours[name].std() / tensor.std() == pytest.approx(1, abs=0.15), name
    report(f"text tower at the start: standard deviations of matrices within {worst:.1%} of theirs")


@pytest.mark.parametrize("form", ["open_clip's ViT", "open_clip's RN50"])
def test_open_clip_files_load_into_a_timm_tower(form: str, tmp_path: Path) -> None:
    vit = form.endswith("ViT")
    config = tiny_vit() if vit else published("RN50", image_size=64, text_layers=1)
    timm_name = "vit_xsmall_patch16_clip_224" if vit else "resnet50_clip"
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(**config).eval()
    path = tmp_path / "epoch_1.pt"
    tensors = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 1, "state_dict": tensors}, path)
    size = config["vision_cfg"]["image_size"]
    encoder = TimmImageEncoder(timm_name, image_size=size, weights=str(path)).eval()
    images, _ = batch(size, 0, torch.float32)
    projection = theirs.visual.proj.T if vit else theirs.visual.attnpool.c_proj.weight
    bias = None if vit else theirs.visual.attnpool.c_proj.bias
    with torch.no_grad():
        ours = F.linear(encoder(images), projection, bias)
        expected = theirs.encode_image(encoder.normalise(images))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

    larger = TimmImageEncoder(timm_name, image_size=96, weights=str(path))
    table = larger.trunk.pos_embed if vit else larger.trunk.head.pos_embed
    assert table.shape[-2] == (96 // (16 if vit else 32)) ** 2 + 1
    assert torch.isfinite(copy.deepcopy(larger).eval()(torch.rand(1, 3, 96, 96))).all()
