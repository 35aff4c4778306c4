"""What travels in a checkpoint beside the weights, and how a stranger's file is read safely.

A checkpoint of clipkit holds, as plain strings and numbers, the configuration that built the model
and what its constructors read from outside (a tokenizer's definition, a tower's configuration).
That is enough to rebuild, validate and resume it from another folder, offline, with those files
gone. Nothing in it is trusted: the file loads with ``weights_only=True``, and every name it carries
is compared, as a string, with the public parts of clipkit and the optimisers of torch before
anything is imported.
"""

from __future__ import annotations

import textwrap
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

import clipkit
from clipkit import strangers
from clipkit.allocations import AllocationBound
from clipkit.errors import UserError, of_memory
from clipkit.safe_yaml import MOST_BITS
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
    _refuse_what_is_no_weights(loaded["state_dict"], f"checkpoint {path}")
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
    strangers.refuse_unwieldy(kept, source=str(path))
    if kept.get("schema") != SCHEMA:
        raise UserError(
            f"checkpoint {path}: schema {kept.get('schema')!r}, this version reads {SCHEMA}"
        )
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


@contextmanager
def rebuilding(restored: Restored, path: str | Path) -> Iterator[None]:
    """Rebuild a model within: its configuration may name any size and number, its weights tell.

    Raises:
        UserError: before it happens, when a constructor takes many times the memory of the weights,
            or many times as many tensors; and for whatever else the constructors raise.
    """
    held = sum(tensor.nbytes for tensor in restored.state_dict.values())
    number = len(restored.state_dict)
    bound = AllocationBound(
        _TIMES_ITS_WEIGHTS * held + _BESIDES,
        _TIMES_ITS_WEIGHTS * number + _TENSORS_BESIDES,
        f"checkpoint {path}: refused, its configuration asks for a model of {{size}}, and its "
        f"weights are {held / 1e9:,.3f} GB in {number:,} tensors",
    )
    try:
        with bound:
            yield
    except (UserError, MisconfigurationException):
        raise
    except Exception as error:
        said = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise (
            _sentence_within(error)
            or of_memory(error)
            or UserError(
                f"checkpoint {path}: it cannot be rebuilt as it is configured "
                f"({type(error).__name__}: {said})"
            )
        ) from error


def _sentence_within(error: BaseException | None) -> UserError | None:
    """Return the sentence that the parser has wrapped in an error of its own, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


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


def _refuse_what_is_no_weights(state_dict: object, source: str) -> None:
    """Refuse what no part of clipkit has among its weights, and what cannot be copied into them."""
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in state_dict.items()
    ):
        raise UserError(f"{source}: its state_dict does not hold plain tensors by name")


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not (value.is_meta or value.is_nested)
        and _converts(value.dtype)
    )


def _converts(dtype: torch.dtype) -> bool:
    try:  # some kinds of numbers are only stored by torch
        torch.empty(1, dtype=dtype).to(torch.complex128)
    except RuntimeError:
        return False
    return True


def _refuse_claims(path: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Refuse tensors that show few bytes many times: each becomes as large as it claims to be."""
    claimed = sum(tensor.nbytes for tensor in state_dict.values())
    held = path.stat().st_size
    if claimed > _TIMES_ITS_WEIGHTS * held:
        raise UserError(
            f"checkpoint {path}: refused, its weights claim {claimed / 1e9:,.1f} GB and the file "
            f"has {held / 1e9:,.3f}"
        )


def _number(loaded: object, *keys: str) -> int:
    for key in keys:
        loaded = loaded.get(key) if isinstance(loaded, dict) else None
    return loaded if isinstance(loaded, int) and loaded.bit_length() <= MOST_BITS else 0


def load_weights(module: nn.Module, state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy weights into a module; one sentence lists what is missing, unexpected or misshapen."""
    check_weights(module, state_dict, f"checkpoint {path}")
    module.load_state_dict(state_dict)


def check_weights(module: nn.Module, state_dict: object, source: str) -> None:
    """Refuse weights that a module cannot hold."""
    _refuse_what_is_no_weights(state_dict, source)
    assert isinstance(state_dict, dict)
    own = module.state_dict()
    missing = sorted(own.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - own.keys())
    misshapen = [
        f"{name} {tuple(state_dict[name].shape)} for {tuple(own[name].shape)}"
        for name in sorted(own.keys() & state_dict.keys())
        if own[name].shape != state_dict[name].shape
    ]
    others = [
        f"{name} ({state_dict[name].dtype} for {own[name].dtype})".replace("torch.", "")
        for name in sorted(own.keys() & state_dict.keys())
        if not torch.can_cast(state_dict[name].dtype, own[name].dtype)
    ]
    problems = [
        f"{title} {_first_few(names)}"
        for title, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", misshapen),
            ("of another kind", others),
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
