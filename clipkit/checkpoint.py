"""What travels in a checkpoint beside the weights, and how a stranger's file is read safely.

A checkpoint of clipkit holds, as plain strings and numbers, the configuration that built the model
and what its constructors read from outside (a tokenizer's definition, a tower's configuration).
That is enough to rebuild, validate and resume it from another folder, offline, with those files
gone. Nothing in it is trusted: the file loads with ``weights_only=True``, and every name it carries
is compared, as a string, with the public parts of clipkit and the optimisers of torch before
anything is imported.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import clipkit
from clipkit import strangers
from clipkit.allocations import AllocationBound
from clipkit.errors import UserError
from clipkit.saving import damage

KEY = "clipkit"
SCHEMA = 1
_TIMES_ITS_WEIGHTS, _BESIDES, _TENSORS_BESIDES = 4, 2**28, 1000


class Restored(NamedTuple):
    """A checkpoint whose names have been checked.

    ``configuration`` has the sections seed_everything, model, data and trainer; ``carried`` maps a
    part of the model to the constructor arguments that replace what it once read from outside;
    ``epochs`` and ``steps`` are how many of them were trained to their end.
    """

    configuration: dict[str, Any]
    carried: dict[str, dict[str, Any]]
    state_dict: dict[str, torch.Tensor]
    epochs: int
    steps: int


def record(
    configuration: dict[str, Any], *, carried: dict[str, dict[str, object]], vocabulary: str
) -> dict[str, Any]:
    """Return what a checkpoint carries beside the weights: plain values only."""
    return {
        "schema": SCHEMA,
        "version": clipkit.__version__,
        "configuration": configuration,
        "carried": {part: values for part, values in carried.items() if values},
        "vocabulary": vocabulary,
    }


def read(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU without running anything in it."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(str(p.relative_to(path)) for p in path.rglob("*.ckpt"))
        raise UserError(
            f"checkpoint {path}: a folder; "
            + (f"it holds {_first_few(inside)}" if inside else "it holds no checkpoint")
        )
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file{_neighbours(path)}")
    _refuse_what_would_inflate(path)
    if wrong := damage(path):
        raise _unreadable(path, wrong)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises a dozen types here; its own text for a refused pickle names the global.
        refused = _refused_global(str(error))
        if refused:
            raise UserError(
                f"checkpoint {path}: refused, it wants to run {refused!r} when it is loaded"
            ) from error
        raise _unreadable(path, str(error).partition("\n")[0]) from error
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        raise UserError(f"checkpoint {path}: not a Lightning checkpoint, it has no state_dict")
    _refuse_claims(path, loaded["state_dict"])
    return loaded


def restore(path: str | Path, *, trust: Sequence[str] = ()) -> Restored:
    """Read a checkpoint and check every name in it; nothing is imported.

    Args:
        path: the file.
        trust: modules of the user whose classes the checkpoint may name.
    """
    loaded = read(path)
    kept = loaded.get(KEY)
    if not isinstance(kept, dict) or not isinstance(kept.get("configuration"), dict):
        raise UserError(
            f"checkpoint {path}: it carries no configuration, so it was not written by "
            "`clipkit fit` or clipkit.build; give the configuration with -c, or use --weights"
        )
    if kept.get("schema") != SCHEMA:
        raise UserError(
            f"checkpoint {path}: schema {kept.get('schema')!r}, this version reads {SCHEMA}"
        )
    strangers.refuse_unwieldy(kept, source=str(path))
    configuration = strangers.usable(kept["configuration"], trust=trust, source=str(path))
    carried = strangers.carried(kept.get("carried", {}), source=str(path))
    strangers.refuse_outside(configuration, carried, source=str(path))
    return Restored(
        configuration,
        carried,
        loaded["state_dict"],
        *trained(loaded),
    )


def trained(loaded: dict[str, Any]) -> tuple[int, int]:
    """Return how many epochs and steps a checkpoint that was read was trained to their end."""
    epochs = _number(loaded, "loops", "fit_loop", "epoch_progress", "current", "processed")
    return epochs, _number(loaded, "global_step")


def allocation_bound(restored: Restored, path: str | Path) -> AllocationBound:
    """Return what to rebuild a model within: its configuration may name any size, its weights tell.

    Raises:
        UserError: within it, before it happens, when a constructor takes many times the memory of
            the weights, or many times as many tensors.
    """
    values = restored.state_dict.values() if isinstance(restored.state_dict, dict) else ()
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    held = sum(tensor.nbytes for tensor in tensors)
    return AllocationBound(
        _TIMES_ITS_WEIGHTS * held + _BESIDES,
        _TIMES_ITS_WEIGHTS * len(tensors) + _TENSORS_BESIDES,
        f"checkpoint {path}: refused, its configuration asks for a model of {{size}}, and its "
        f"weights are {held / 1e9:,.3f} GB in {len(tensors):,} tensors",
    )


def _refuse_what_would_inflate(path: Path) -> None:
    """Refuse an archive whose records are more than the file: torch keeps them as they are."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _unreadable(path, damage(path) or str(error)) from error
    if (
        any(record.compress_type != zipfile.ZIP_STORED for record in records)
        or sum(record.file_size for record in records) > path.stat().st_size
    ):
        raise UserError(f"checkpoint {path}: refused, it would be larger in memory than as a file")


def _refuse_claims(path: Path, state_dict: object) -> None:
    """Refuse tensors that show few bytes many times: each becomes as large as it claims to be."""
    tensors = state_dict.values() if isinstance(state_dict, dict) else ()
    claimed = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    held = path.stat().st_size
    if claimed > _TIMES_ITS_WEIGHTS * held:
        raise UserError(
            f"checkpoint {path}: refused, its weights claim {claimed / 1e9:,.1f} GB and the file "
            f"has {held / 1e9:,.3f}"
        )


def _number(loaded: object, *keys: str) -> int:
    for key in keys:
        loaded = loaded.get(key) if isinstance(loaded, dict) else None
    return loaded if isinstance(loaded, int) else 0


def load_weights(module: nn.Module, state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy weights into a module; one sentence lists what is missing, unexpected or misshapen."""
    check_weights(module, state_dict, f"checkpoint {path}")
    module.load_state_dict(state_dict)


def check_weights(module: nn.Module, state_dict: object, source: str) -> None:
    """Refuse weights that a module cannot hold."""
    if not isinstance(state_dict, dict) or not all(
        isinstance(value, torch.Tensor) for value in state_dict.values()
    ):
        raise UserError(f"{source}: its state_dict does not hold tensors by name")
    own = module.state_dict()
    missing = sorted(own.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - own.keys())
    misshapen = [
        f"{name} {tuple(state_dict[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state_dict.keys())
        if own[name].shape != state_dict[name].shape
    ]
    problems = [
        f"{title} {_first_few(names)}"
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        raise UserError(f"{source} does not fit the model: " + "; ".join(problems))


def check_fits(loaded: dict[str, Any], module: Any) -> None:
    """Refuse a checkpoint of another vocabulary; warn where the configuration has changed."""
    kept = loaded.get(KEY)
    if isinstance(kept, dict):
        check_vocabulary(kept, module.tokenizer)
    check_weights(module, loaded["state_dict"], "the checkpoint")
    then = kept.get("configuration") if isinstance(kept, dict) else None
    if module.configuration is None or not isinstance(then, dict):
        return
    now = module.configuration
    differing = sorted(_differences(then.get("model"), now.get("model"), "model"))
    if differing:
        warnings.warn(
            f"the checkpoint was written with another configuration: {_first_few(differing)}. "
            "A restored optimiser keeps its own rate; for a new run from these weights use "
            "--weights instead of --ckpt_path",
            stacklevel=2,
        )


def check_vocabulary(kept: object, tokenizer: Any) -> None:
    """Refuse weights that were trained with another vocabulary."""
    if isinstance(kept, dict) and kept.get("vocabulary") not in (None, tokenizer.digest):
        raise UserError(
            f"model.tokenizer.path: {tokenizer.name!r} is not the vocabulary that the checkpoint "
            f"was trained with (digest {str(kept['vocabulary'])[:12]}, here "
            f"{tokenizer.digest[:12]}); leave model.tokenizer out to use the checkpoint's own"
        )


def _differences(then: object, now: object, where: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        part = where.split(".")[1] if "." in where else ""
        # What is carried in the place of files may be named otherwise and is the same.
        for key in (then.keys() | now.keys()) - set(strangers.CARRIED.get(part, ())):
            yield from _differences(then.get(key), now.get(key), f"{where}.{key}")
    elif then != now:
        yield f"{where} was {then!r}, is {now!r}"


def _first_few(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _unreadable(path: Path, reason: str) -> UserError:
    return UserError(
        f"checkpoint {path}: not a checkpoint that can be read ({reason}){_neighbours(path)}"
    )


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    found = sorted(p.name for p in path.parent.glob("*.ckpt") if p != path)
    return f" (beside it: {_first_few(found, 5)})" if found else ""


def _refused_global(message: str) -> str:
    for mark in ("Unsupported global: GLOBAL ", "Unsupported class "):
        if mark in message:
            return message.split(mark, 1)[1].split()[0].rstrip(".,")
    return ""
