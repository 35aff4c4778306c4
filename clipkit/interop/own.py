"""A checkpoint of clipkit, and an object of the user's own code, as models to embed with."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import clipkit
from clipkit.errors import UserError
from clipkit.interop.base import (
    OpenedModel,
    choose_device,
    digest_of,
    digest_of_weights,
    dtype_of,
    first_line,
    probe,
)
from clipkit.own_code import look_in_current_folder

VERBS = ("embed_images", "embed_texts")


def open_checkpoint(spec: str, path: str, trust: Sequence[str], device: str | None) -> OpenedModel:
    """Open what `clipkit fit` wrote."""
    module = clipkit.load(path, trust=trust).to(choose_device(device))
    encoder, tokenizer = module.image_encoder, module.tokenizer
    return OpenedModel(
        model=module,
        spec=spec,
        name=_name_of_checkpoint(Path(path)),
        scale=float(module.scale),
        weights=digest_of_weights(module),
        tokenizer=digest_of({"tokenizer": tokenizer.digest, **asdict(tokenizer.contract)}),
        preprocess=digest_of(
            {
                "size": encoder.image_size,
                "resize_mode": encoder.resize_mode,
                "interpolation": encoder.interpolation,
            }
        ),
        dtype=dtype_of(module),
        embed_dim=module.embed_dim,
        configuration=module.configuration,
    )


def open_code(spec: str, device: str | None) -> OpenedModel:
    """Open what `my_code:build` returns: the function is called without arguments.

    A module is put in eval mode and on the device; any other object looks after that itself.
    """
    made = _call(spec)
    missing = _missing_verbs(made)
    if missing:
        raise UserError(
            f"{spec}: what it returns ({type(made).__name__}) has no {' and no '.join(missing)}; "
            "a model has embed_images(images) and embed_texts(texts), each returning (N, D)"
        )
    if isinstance(made, nn.Module):
        made = made.eval().requires_grad_(False).to(choose_device(device))
    model = CheckedModel(made, spec)
    images, texts = probe(model)
    if images.shape[1] != texts.shape[1]:
        raise UserError(
            f"{spec}: embed_images gives {images.shape[1]} numbers a picture and embed_texts "
            f"{texts.shape[1]} a text; both have to lie in one space"
        )
    has_weights = isinstance(made, nn.Module) and len(made.state_dict()) > 0
    digest = sha256(images.numpy().tobytes() + texts.numpy().tobytes()).hexdigest()
    return OpenedModel(
        model=model,
        spec=spec,
        name=spec,
        scale=_scale_of(made),
        weights=digest_of_weights(made) if has_weights else digest,
        tokenizer=None,
        preprocess=None,
        dtype=dtype_of(made) if has_weights else "float32",
        embed_dim=images.shape[1],
    )


class CheckedModel:
    """A user's object whose answers are checked and turned into float32 on the CPU."""

    def __init__(self, made: Any, spec: str) -> None:
        self.made = made
        self.spec = spec

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed pictures as the user's object does."""
        return self._embed("embed_images", images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as the user's object does."""
        return self._embed("embed_texts", texts)

    @torch.no_grad()
    def _embed(self, verb: str, items: Sequence[Any]) -> Tensor:
        try:
            found = torch.as_tensor(getattr(self.made, verb)(items))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.spec}: {verb} fails on a list of {len(items)} "
                f"({type(error).__name__}: {first_line(error)})"
            ) from error
        if found.ndim != 2 or len(found) != len(items) or not found.is_floating_point():
            raise UserError(
                f"{self.spec}: {verb} gives {_described(found)} for a list of {len(items)}, "
                f"expected are floating-point numbers ({len(items)}, D)"
            )
        return found.detach().float().cpu()


def _call(spec: str) -> Any:
    module_name, _, name = spec.partition(":")
    look_in_current_folder()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        named = error.name or ""
        if module_name == named or module_name.startswith(f"{named}."):
            raise UserError(
                f"{spec}: there is no module {named} here; go to the folder that holds "
                f"{module_name.replace('.', '/')}.py, or add that folder to PYTHONPATH"
            ) from error
        raise UserError(f"{spec}: {module_name} imports {named}, which is not there") from error
    except Exception as error:
        raise UserError(
            f"{spec}: {module_name} cannot be imported "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    build: Callable[[], Any] | None = getattr(module, name, None)
    if not isinstance(build, type) and not _missing_verbs(build):
        return build  # a model already
    if not callable(build):
        raise UserError(
            f"{spec}: {module_name} has no function or class {name}{_offered(module, module_name)}"
        )
    try:
        return build()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{spec}: fails ({type(error).__name__}: {first_line(error)})") from error


def _missing_verbs(made: Any) -> list[str]:
    return [verb for verb in VERBS if not callable(getattr(made, verb, None))]


def _offered(module: Any, module_name: str) -> str:
    own = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and getattr(value, "__module__", None) == module_name
    ]
    return f" (it has {', '.join(own[:8])})" if own else ""


def _scale_of(made: Any) -> float | None:
    scale = getattr(made, "scale", None)
    if isinstance(scale, Tensor) and scale.numel() == 1:
        return float(scale)
    return float(scale) if isinstance(scale, int | float) else None


def _described(found: Tensor) -> str:
    return f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"


def _name_of_checkpoint(path: Path) -> str:
    path = path.expanduser().absolute()
    if path.parent.name == "checkpoints":
        return f"{path.parent.parent.name}/{path.stem}"
    return path.stem
