"""A model of open_clip, by name and tag, from a folder or from the hub (extra `peers`)."""

from __future__ import annotations

import difflib
import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call

from clipkit.errors import UserError
from clipkit.interop.base import (
    OpenedModel,
    choose_device,
    digest_of,
    digest_of_weights,
    dtype_of,
    embed_by_length,
    embed_pictures,
    first_line,
    import_library,
)
from clipkit.interop.transformers import digest_of_tokenizer

log = logging.getLogger(__name__)

CONFIG = "open_clip_config.json"
WEIGHTS = (".safetensors", ".bin", ".pth")
"""The endings that open_clip looks for in a folder."""


_NAME = re.compile(r"[\w.-]+")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TOKENIZER_OPTIONS = ("clean", "context_length", "language", "reduction_mask", "strip_sep_token",
                      "tokenizer_mode")  # fmt: skip


class _Source(NamedTuple):
    """Where open_clip finds a model: its own name, and the tag or file of its weights."""

    model: str
    tag: str | None
    name: str
    quick_gelu: bool | None


def open_open_clip(spec: str, which: str, device: str | None) -> OpenedModel:
    """Open `MODEL[/TAG]`, a folder in open_clip's layout, or `hf-hub:ORG/REPO`.

    Weights are read with ``weights_only=True``. A tag knows which activation its weights were
    trained with, and that one is used whatever the name says: OpenAI's weights under the plain
    name `ViT-B-32` would lose several points otherwise, for a warning. Without a tag, weights are
    drawn, the same ones in every process.
    """
    library = import_library("open_clip", spec, extra="peers")
    source = _find(library, spec, which)
    drawn = source.tag is None and ":" not in source.model
    if drawn:
        log.warning(
            "%s: no tag, so its weights are random; tags: %s",
            spec,
            _some(library.list_pretrained_tags_by_model(source.model)),
        )
    overrides = {} if source.quick_gelu is None else {"quick_gelu": source.quick_gelu}
    with _quiet(), _no_questions(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            if ":" in source.model:
                _refuse_leading_out(spec, library.get_model_config(source.model), source.model)
            model = library.create_model(
                source.model,
                source.tag,
                precision="fp32",
                weights_only=True,
                require_pretrained=not drawn,
                pretrained_text=False,
                **overrides,
            )
            tokenizer = _tokenizer(library, source.model)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{spec}: open_clip cannot open it ({first_line(error)}){_hint(source, error)}"
            ) from error
    adapter = OpenClipModel(model.eval().requires_grad_(False), tokenizer, choose_device(device))
    return OpenedModel(
        model=adapter,
        spec=spec,
        name=source.name,
        scale=float(model.logit_scale.exp()),
        weights=digest_of_weights(model),
        tokenizer=_digest_of_tokenizer(tokenizer),
        preprocess=digest_of({"library": "open_clip", **_preprocess_config(model)}),
        dtype=dtype_of(model),
        embed_dim=adapter.embed_dim,
    )


class OpenClipModel:
    """open_clip's towers with its own transform and tokenizer; embeddings have unit norm.

    A causal text tower sees no padding before the token it pools at, so its batches are cut there,
    its position table and its mask with them. Every other tower gets the full context.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Callable[..., Tensor], device: torch.device
    ) -> None:
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.model: Any = model.to(device)
        self.tokenizer = tokenizer
        self.device = device
        self.transform = image_transform_v2(
            PreprocessCfg(**_preprocess_config(model)), is_train=False
        )
        self.trims = _trim_is_exact(self.model)
        self.embed_dim = 0
        self.embed_dim = self._encode(self.tokenizer(["a photo"]).to(device)).shape[1]

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed pictures, prepared as the model's preprocessing configuration says."""
        return embed_pictures(
            images,
            lambda batch: torch.stack([self.transform(image) for image in batch]),
            lambda pixels: self.model.encode_image(pixels.to(self.device), normalize=True),
            self.embed_dim,
        )

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts with the model's own tokenizer."""
        if not texts:
            return torch.empty(0, self.embed_dim)
        tokens = self.tokenizer(list(texts))  # (N, L)
        lengths = torch.full((len(tokens),), tokens.shape[1])
        if self.trims:
            lengths = pooled_place(tokens, _text_tower(self.model)) + 1
        return embed_by_length(
            lengths,
            lambda rows, length: self._encode(tokens[rows, :length].to(self.device)),
            self.embed_dim,
        )

    @torch.no_grad()
    def _encode(self, tokens: Tensor) -> Tensor:
        features: Tensor
        if not self.trims:
            features = self.model.encode_text(tokens, normalize=True)
            return features
        # The library adds its whole tables, so it runs with these in their place.
        length = tokens.shape[1]
        tower = _text_tower(self.model)
        prefix = "" if tower is self.model else "text."
        cut = {
            f"{prefix}positional_embedding": tower.positional_embedding[:length],
            f"{prefix}attn_mask": tower.attn_mask[:length, :length],
        }
        _, features, *_ = functional_call(self.model, cut, (None, tokens))
        return features


def pooled_place(tokens: Tensor, tower: Any) -> Tensor:
    """Where open_clip reads the feature of each row, (N, L) -> (N,)."""
    pooling = _pooling(tower)
    if pooling == "argmax":
        return tokens.argmax(dim=1)
    if pooling == "eos":
        end_id: int = getattr(tower, "text_eos_id", getattr(tower, "eos_id", 0))
        return torch.eq(tokens, end_id).int().argmax(dim=1)
    return torch.zeros(len(tokens), dtype=torch.int64)


def is_folder(path: Path) -> bool:
    """Whether a folder is in open_clip's layout."""
    return (path / CONFIG).is_file()


def did_you_mean(which: str) -> str:
    """Return how a spec without its prefix is written, or nothing."""
    try:
        library = import_library("open_clip", which, extra="peers")
    except UserError:
        return ""
    name, _ = _split(library, which)
    return "" if name is None else f"; did you mean open_clip:{which}?"


def _find(library: ModuleType, spec: str, which: str) -> _Source:
    if which.startswith("hf-hub:"):
        return _Source(which, None, which.removeprefix("hf-hub:"), None)
    path = Path(os.path.expanduser(which))
    if is_folder(path):
        return _folder(spec, path)
    name, tag = _split(library, which)
    if name is None:
        if path.is_dir():
            raise UserError(f"{spec}: the folder has no {CONFIG}, so it is not open_clip's layout")
        raise UserError(f"{spec}: open_clip has no model {which!r}{_near_models(library, which)}")
    if not tag:
        return _Source(name, None, name, None)
    file = os.path.expanduser(tag)
    if os.path.isfile(file):
        return _Source(name, file, f"{name}/{Path(file).name}", None)
    known = library.list_pretrained_tags_by_model(name)
    found = library.get_pretrained_cfg(name, tag)
    if not found:
        near = difflib.get_close_matches(tag, known, 1, 0.5)
        meant = f", did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{spec}: {tag!r} is neither a file nor a tag of {name}{meant} "
            f"(its tags: {', '.join(known) or 'none'})"
        )
    return _Source(name, tag, f"{name}/{tag}", bool(found.get("quick_gelu", False)))


def _folder(spec: str, path: Path) -> _Source:
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{spec}: {CONFIG} cannot be read ({first_line(error)})") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise UserError(f"{spec}: {CONFIG} has no model_cfg, so it describes no model")
    if not any(file.suffix in WEIGHTS for file in path.iterdir()):
        raise UserError(f"{spec}: the folder has no weights; open_clip reads {', '.join(WEIGHTS)}")
    return _Source(f"local-dir:{path}", None, path.absolute().name, None)


def _refuse_leading_out(spec: str, config: object, model: str) -> None:
    """Refuse a configuration of somebody's that names towers or files outside of its folder."""
    towers: dict[str, dict[str, Any]] = {}
    for part in ("vision_cfg", "text_cfg"):
        found = config.get(part) if isinstance(config, dict) else None
        if not isinstance(found, dict):
            raise UserError(f"{spec}: {CONFIG} has no {part} with settings")
        towers[part] = found

    def refuse(key: str, value: object) -> None:
        raise UserError(f"{spec}: refused, {key} of its {CONFIG} is {str(value)[:100]!r}")

    folder = os.path.realpath(model.removeprefix("local-dir:")) + os.sep
    for part, key, accepted in (
        ("vision_cfg", "timm_model_name", _NAME),
        ("text_cfg", "hf_model_name", _HUB_ID),
        ("text_cfg", "hf_tokenizer_name", _HUB_ID),
    ):
        value = towers[part].get(key) or ""
        if not isinstance(value, str):
            refuse(f"{part}.{key}", value)
        beside = os.path.exists(value)
        inside = beside and os.path.realpath(value).startswith(folder)
        if value and not inside and (beside or not accepted.fullmatch(value)):
            refuse(f"{part}.{key}", value)
    options = towers["text_cfg"].get("tokenizer_kwargs") or {}
    for key in options if isinstance(options, dict) else [options]:
        if key not in _TOKENIZER_OPTIONS:
            refuse("text_cfg.tokenizer_kwargs", key)


@contextmanager
def _no_questions() -> Iterator[None]:
    """Keep transformers, which open_clip calls, from asking whether to run somebody's code."""
    try:
        from transformers import dynamic_module_utils
    except ImportError:
        yield
        return
    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


def _split(library: ModuleType, which: str) -> tuple[str | None, str]:
    """Return the model and the tag; OpenAI's way to write ViT-B/32 has a slash of its own."""
    models = {name.lower(): name for name in library.list_models()}
    parts = which.split("/")
    for end in range(1, len(parts) + 1):
        name = models.get("-".join(parts[:end]).lower())
        if name is not None:
            return name, "/".join(parts[end:])
    return None, ""


def _near_models(library: ModuleType, which: str) -> str:
    models = library.list_models()
    by_lower = {name.lower(): name for name in models}
    near = [
        by_lower[name]
        for wanted in (which.lower(), which.partition("/")[0].lower())
        for name in difflib.get_close_matches(wanted, by_lower, 3, 0.6)
    ]
    if near:
        return f", did you mean {' or '.join(dict.fromkeys(near))}?"
    return f" (accepted are a folder with {CONFIG} and names such as {_some(models)})"


def _hint(source: _Source, error: Exception) -> str:
    if "torchscript" in str(error).lower():
        return "; a TorchScript archive is a program and is not run, save its state_dict instead"
    if source.model.startswith("hf-hub:") or source.quick_gelu is not None:
        return "; it needs a network, or the files in the hub's cache"
    return ""


def _tokenizer(library: ModuleType, model: str) -> Callable[..., Tensor]:
    text = library.get_model_config(model)["text_cfg"]
    # The configuration is a stranger's, and could ask for the code in its folder to be run.
    safe = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    tokenizer: Callable[..., Tensor] = library.get_tokenizer(model, **safe)
    return tokenizer


def _preprocess_config(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = dict(model.visual.preprocess_cfg)
    return config


def _text_tower(model: Any) -> Any:
    """The module with the text tower's tables: `CLIP` holds them itself."""
    return model if hasattr(model, "positional_embedding") else model.text


def _trim_is_exact(model: Any) -> bool:
    tower = _text_tower(model)
    return (
        not hasattr(model, "text_decoder")  # CoCa's, whose forward is another
        and getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "cls_emb", None) is None
        and _pooling(tower) in ("argmax", "eos", "first")
    )


def _pooling(tower: Any) -> str | None:
    pooling: str | None = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
    return pooling


def _digest_of_tokenizer(tokenizer: Any) -> str:
    clean = getattr(tokenizer.clean_fn, "__name__", str(type(tokenizer.clean_fn)))
    shared = {
        "library": "open_clip",
        "kind": type(tokenizer).__name__,
        "context_length": tokenizer.context_length,
        "clean": clean,
    }
    if hasattr(tokenizer, "bpe_ranks"):
        merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
        return digest_of({**shared, "vocabulary": tokenizer.encoder, "merges": merges})
    return digest_of(
        {
            **shared,
            "tokenizer": digest_of_tokenizer(tokenizer.tokenizer),
            "mode": getattr(tokenizer, "tokenizer_mode", None),
            "strip_sep_token": getattr(tokenizer, "strip_sep_token", None),
        }
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip from talking through the root logger, and from configuring it."""
    root = logging.getLogger()
    level, handler = root.level, logging.NullHandler()
    root.addHandler(handler)
    root.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            # It compares the name with the tag; what is built follows the tag.
            warnings.filterwarnings("ignore", message="QuickGELU mismatch")
            yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "") if names else "none"
