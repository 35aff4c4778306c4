"""What a user types for a model, and whose model it is."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from clipkit.errors import UserError
from clipkit.interop import open_clip, own, transformers
from clipkit.interop.base import OpenedModel

ACCEPTED = (
    "a checkpoint file; open_clip:MODEL/TAG, open_clip:FOLDER; hf-hub:ORG/REPO; "
    "transformers:ORG/REPO, transformers:FOLDER; a folder of either library; "
    "my_code:build, a function of a file of the current folder"
)
_CODE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def open_model(spec: str, *, trust: Sequence[str] = (), device: str | None = None) -> OpenedModel:
    """Open anybody's model by what a user types for it.

    Args:
        spec: a checkpoint of clipkit · `open_clip:MODEL[/TAG]`, the tag a name or a file of
            weights; without one, weights are random · a folder in open_clip's layout, with or
            without `open_clip:` · `hf-hub:ORG/REPO`, in open_clip's layout ·
            `transformers:ORG/REPO` or a transformers folder, CLIP or SigLIP · `my_code:build`, a
            function or class of a module of the current folder that gives an object with
            `embed_images` and `embed_texts`.
        trust: your own modules whose classes a checkpoint may name.
        device: where the model runs; by default a GPU where there is one.

    Raises:
        UserError: there is no such model, or the library it needs is missing.
    """
    prefix, _, rest = spec.partition(":")
    if prefix == "hf-hub" and rest:
        return open_clip.open_open_clip(spec, spec, device)
    if prefix == "open_clip" and rest:
        return open_clip.open_open_clip(spec, rest, device)
    if prefix == "transformers" and rest:
        return transformers.open_transformers(spec, rest, device)
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return _open_folder(spec, path, device)
    if path.is_file():
        return own.open_checkpoint(spec, spec, trust, device)
    if _CODE.fullmatch(spec):
        return own.open_code(spec, device)
    if path.suffix == ".ckpt":
        return own.open_checkpoint(spec, spec, trust, device)  # which says what is beside it
    raise UserError(
        f"model {spec!r}: no such file, folder or model{open_clip.did_you_mean(spec)} "
        f"(accepted are {ACCEPTED})"
    )


def _open_folder(spec: str, path: Path, device: str | None) -> OpenedModel:
    if open_clip.is_folder(path):
        return open_clip.open_open_clip(spec, str(path), device)
    kind = transformers.model_type_of_folder(path)
    if kind is not None:
        return transformers.open_transformers(spec, str(path), device)
    inside = sorted(str(file.relative_to(path)) for file in path.rglob("*.ckpt"))
    if inside:
        more = f" and {len(inside) - 5} more" if len(inside) > 5 else ""
        raise UserError(f"model {spec}: a folder; name one of {', '.join(inside[:5])}{more}")
    raise UserError(
        f"model {spec}: a folder with neither {open_clip.CONFIG} (open_clip) nor a "
        f"{transformers.CONFIG} with a model_type (transformers) nor a checkpoint"
    )
