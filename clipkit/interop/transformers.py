"""CLIPModel and SiglipModel of transformers, from a folder or the hub (extra `huggingface`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from torch import Tensor

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

CONFIG = "config.json"
MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}


def open_transformers(spec: str, which: str, device: str | None) -> OpenedModel:
    """Open a folder or a hub id with model_type clip or siglip; no code that lies there is run."""
    library = import_library("transformers", spec, extra="huggingface")
    path = Path(os.path.expanduser(which))
    local = path.is_dir()
    where = str(path) if local else which
    kind = _model_type(library, spec, where)
    model = _model(library, spec, where, kind)
    processor = _part(library, spec, where, "AutoImageProcessor", "preprocessor_config.json")
    tokenizer = _part(library, spec, where, "AutoTokenizer", "tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise UserError(f"{spec}: its tokenizer has no padding token (tokenizer_config.json)")
    model_class = ClipModel if kind == "clip" else SiglipModel
    adapter = model_class(model.eval().requires_grad_(False), processor, tokenizer, device)
    text_side = {
        "library": "transformers",
        "kind": kind,
        "context_length": adapter.context_length,
        "tokenizer": digest_of_tokenizer(tokenizer),
    }
    picture_side = json.loads(json.dumps(processor.to_dict(), default=str))
    return OpenedModel(
        model=adapter,
        spec=spec,
        name=path.absolute().name if local else which,
        scale=float(model.logit_scale.exp()),
        weights=digest_of_weights(model),
        tokenizer=digest_of(text_side),
        preprocess=digest_of({"library": "transformers", **picture_side}),
        dtype=dtype_of(model),
        embed_dim=adapter.embed_dim,
    )


class _Model:
    """What both families share: the processor's pictures, and texts tokenised to the context."""

    def __init__(self, model: Any, processor: Any, tokenizer: Any, device: str | None) -> None:
        self.device = choose_device(device)
        self.model: Any = model.to(self.device)
        self.processor = processor
        self.tokenizer = tokenizer
        self.context_length: int = self.model.config.text_config.max_position_embeddings
        self.embed_dim = 0
        self.embed_dim = self._probe()

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed pictures, prepared by the model's own image processor."""
        return embed_pictures(
            images,
            lambda batch: self.processor(list(batch), return_tensors="pt")["pixel_values"],
            lambda pixels: _features(self.model.get_image_features(pixels.to(self.device))),
            self.embed_dim,
        )

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts with the model's own tokenizer."""
        raise NotImplementedError

    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens: dict[str, Tensor] = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return tokens

    @torch.no_grad()
    def _probe(self) -> int:
        ids = self._tokenize(["a photo"])["input_ids"].to(self.device)
        return int(_features(self.model.get_text_features(ids)).shape[1])


class ClipModel(_Model):
    """`CLIPModel`: its padding is masked, and cut off behind the token that is pooled."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts with the model's own tokenizer and attention mask."""
        if not texts:
            return torch.empty(0, self.embed_dim)
        tokens = self._tokenize(texts)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]  # (N, L)

        def encode(rows: Tensor, length: int) -> Tensor:
            return _features(
                self.model.get_text_features(
                    ids[rows, :length].to(self.device),
                    attention_mask=mask[rows, :length].to(self.device),
                )
            )

        return embed_by_length(self._pooled_place(ids) + 1, encode, self.embed_dim)

    def _pooled_place(self, ids: Tensor) -> Tensor:
        end_id: int = self.model.config.text_config.eos_token_id
        if end_id == 2:  # the configuration of early exports, read as "the largest id"
            return ids.argmax(dim=1)
        return torch.eq(ids, end_id).int().argmax(dim=1)


class SiglipModel(_Model):
    """`SiglipModel`: every text is padded to the context, and the tower sees the padding.

    It was trained so, and pools at the last place; without the padding it falls to chance
    (https://github.com/embeddings-benchmark/mteb/issues/1424). There is no attention mask.
    """

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts with the model's own tokenizer, padded to the context."""
        if not texts:
            return torch.empty(0, self.embed_dim)
        ids = self._tokenize(texts)["input_ids"]  # (N, L)
        return embed_by_length(
            torch.full((len(ids),), ids.shape[1]),
            lambda rows, _: _features(self.model.get_text_features(ids[rows].to(self.device))),
            self.embed_dim,
        )


def model_type_of_folder(path: Path) -> str | None:
    """Return what a folder's config.json calls its model, None where there is none."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = config.get("model_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None


def digest_of_tokenizer(tokenizer: Any) -> str:
    """The digest of a tokenizer of transformers: its definition, wherever its files lie."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        definition: Any = {"vocabulary": tokenizer.get_vocab(), "kind": type(tokenizer).__name__}
        definition["lower_case"] = getattr(tokenizer, "do_lower_case", None)
        if hasattr(tokenizer, "sp_model"):
            pieces = tokenizer.sp_model.serialized_model_proto()
            definition["pieces"] = hashlib.sha256(pieces).hexdigest()
    else:
        definition = json.loads(backend.to_str())
        # Every call sets these two; what they are set to is the adapter's affair.
        definition.pop("truncation", None)
        definition.pop("padding", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    sides = [tokenizer.padding_side, tokenizer.truncation_side]
    return digest_of({"definition": definition, "special": special, "sides": sides})


def _model_type(library: ModuleType, spec: str, where: str) -> str:
    try:
        raw, _ = library.PretrainedConfig.get_config_dict(where)
        _refuse_code(spec, raw)
        config = library.AutoConfig.from_pretrained(where, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{spec}: its config.json cannot be had ({first_line(error)}); accepted are a folder "
            f"with model_type {' or '.join(MODELS)} and a hub id, with a network or in the cache"
        ) from error
    kind = str(config.model_type)
    if kind not in MODELS:
        raise UserError(
            f"{spec}: model_type {kind} of config.json is not accepted, {' and '.join(MODELS)} are"
        )
    return kind


def _refuse_code(spec: str, config: object) -> None:
    """Refuse a configuration that would fetch a kernel, or bring in a library to unpack weights."""
    parts = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        for key, value in part.items() if isinstance(part, dict) else ():
            kernel = key.strip("_").endswith("_implementation") and "/" in str(value)
            if kernel or (key == "quantization_config" and value is not None):
                raise UserError(f"{spec}: refused, {key} of its {CONFIG} asks for code of others")
            parts.append(value)


def _model(library: ModuleType, spec: str, where: str, kind: str) -> Any:
    try:
        with _no_progress_bar(library):
            model, loading = getattr(library, MODELS[kind]).from_pretrained(
                where, trust_remote_code=False, weights_only=True, output_loading_info=True
            )
    except Exception as error:
        raise UserError(f"{spec}: its weights cannot be had ({first_line(error)})") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"{spec}: its weights lack {len(missing)} of the model's tensors, such as {missing[0]}"
        )
    return model.float()


def _part(library: ModuleType, spec: str, where: str, auto_class: str, file: str) -> Any:
    try:
        part = getattr(library, auto_class).from_pretrained(where, trust_remote_code=False)
    except ImportError as error:
        if "sentencepiece" in str(error).lower():
            raise UserError(
                f"{spec}: its tokenizer needs the library sentencepiece, "
                "pip install sentencepiece protobuf brings it"
            ) from error
        raise UserError(
            f"{spec}: its {file} needs a library that is missing ({first_line(error)})"
        ) from error
    except Exception as error:
        raise UserError(
            f"{spec}: no {file} that transformers can read ({first_line(error)})"
        ) from error
    return part


def _features(found: Any) -> Tensor:
    # transformers 4 returns the tensor itself.
    features: Tensor = found if isinstance(found, Tensor) else found.pooler_output
    return features


@contextmanager
def _no_progress_bar(library: ModuleType) -> Iterator[None]:
    logging = library.utils.logging
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
