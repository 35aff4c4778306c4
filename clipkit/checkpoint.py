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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import clipkit
from clipkit.errors import UserError

KEY = "clipkit"
SCHEMA = 1

PUBLIC_PARTS = frozenset(
    {
        "clipkit.callbacks.ZeroShotClassification",
        "clipkit.callbacks.ZeroShotRetrieval",
        "clipkit.data.Augmentation",
        "clipkit.data.HuggingFacePairs",
        "clipkit.data.ShapesPairs",
        "clipkit.encoders.BagOfTokens",
        "clipkit.encoders.ConvNet",
        "clipkit.encoders.HuggingFaceTextEncoder",
        "clipkit.encoders.TextTransformer",
        "clipkit.encoders.TimmImageEncoder",
        "clipkit.heads.LinearHead",
        "clipkit.heads.MLPHead",
        "clipkit.losses.InfoNCELoss",
        "clipkit.losses.SigLIPLoss",
        "clipkit.optim.WarmupConstant",
        "clipkit.optim.WarmupConstantCooldown",
        "clipkit.optim.WarmupCosine",
        "clipkit.suite.EvalData",
        "clipkit.temperature.Temperature",
        "clipkit.tokenizer.Tokenizer",
    }
)
"""Every class a checkpoint may name; a test compares it with what the packages export."""

OPTIMIZERS = "torch.optim."
PARTS = (
    "image_encoder",
    "text_encoder",
    "image_head",
    "text_head",
    "temperature",
    "loss",
    "optimizer",
    "schedule",
    "tokenizer",
)


class Restored(NamedTuple):
    """A checkpoint whose names have been checked.

    ``configuration`` has the sections seed_everything, model, data and trainer; ``carried`` maps a
    part of the model to the constructor arguments that replace what it once read from outside.
    """

    configuration: dict[str, Any]
    carried: dict[str, dict[str, Any]]
    state_dict: dict[str, torch.Tensor]
    epoch: int
    step: int


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
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file{_neighbours(path)}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises a dozen types here; its own text for a refused pickle names the global.
        refused = _refused_global(str(error))
        if refused:
            raise UserError(
                f"checkpoint {path}: refused, it wants to run {refused!r} when it is loaded"
            ) from error
        raise UserError(f"checkpoint {path}: not a checkpoint that can be read") from error
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        raise UserError(f"checkpoint {path}: not a Lightning checkpoint, it has no state_dict")
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
    configuration = _usable(kept["configuration"])
    carried = kept.get("carried", {})
    for where, name in _names(configuration):
        if not _allowed(name, trust):
            module = str(name).rpartition(".")[0]
            raise UserError(
                f"checkpoint {path}: refused, its {where} names {name!r}, which is no part of "
                f"clipkit; if you trust it, add --trust {module or name}"
            )
    _refuse_names_in(configuration, carried, path)
    return Restored(
        configuration,
        carried,
        loaded["state_dict"],
        int(loaded.get("epoch", 0)),
        int(loaded.get("global_step", 0)),
    )


def _usable(configuration: dict[str, Any]) -> dict[str, Any]:
    """Keep what may be taken over: model, data, seed, and of the trainer plain values only.

    Its logger, plugins and strategy belong to the machine that trained, and callbacks of others
    could do anything; clipkit's own callbacks stay.
    """
    trainer = configuration.get("trainer") or {}
    if not isinstance(trainer, dict):
        trainer = {}
    kept = {k: v for k, v in trainer.items() if k == "precision" or _is_number(v)}
    callbacks = trainer.get("callbacks") or []
    kept["callbacks"] = [
        callback
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
        if isinstance(callback, dict) and str(callback.get("class_path")).startswith("clipkit.")
    ]
    usable: dict[str, Any] = {k: configuration[k] for k in ("model", "data") if k in configuration}
    if _is_number(configuration.get("seed_everything")):
        usable["seed_everything"] = configuration["seed_everything"]
    for key in ("experiment", "run_name"):
        if isinstance(configuration.get(key), str):
            usable[key] = configuration[key]
    return {**usable, "trainer": kept}


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float)


def _names(configuration: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield every value that would be imported: class paths, and strings where a part belongs."""
    model = configuration.get("model")
    for part in PARTS:
        value = model.get(part) if isinstance(model, dict) else None
        if isinstance(value, str):
            yield f"model.{part}", value
    if isinstance(configuration.get("data"), str):
        yield "data", configuration["data"]
    yield from _class_paths(configuration, "")


def _class_paths(value: object, where: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        if "class_path" in value:
            yield f"{where}.class_path".lstrip("."), value["class_path"]
        for key, inner in value.items():
            yield from _class_paths(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _class_paths(inner, f"{where}[{index}]")


def _allowed(name: object, trust: Sequence[str]) -> bool:
    if not isinstance(name, str):
        return False
    if name in PUBLIC_PARTS:
        return True
    if name.startswith(OPTIMIZERS):
        return name.removeprefix(OPTIMIZERS).isidentifier()
    return any(name == module or name.startswith(f"{module}.") for module in trust)


def _refuse_names_in(configuration: dict[str, Any], carried: object, path: str | Path) -> None:
    """Refuse strings where the parser would try to import them: arguments of torch's optimisers."""
    optimizer = configuration.get("model", {}).get("optimizer")
    arguments = optimizer.get("init_args") or {} if isinstance(optimizer, dict) else {}
    if not isinstance(arguments, dict):
        arguments = {"init_args": arguments}
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        if not all(v is None or _is_number(v) for v in values):
            raise UserError(
                f"checkpoint {path}: refused, model.optimizer.{name} is {value!r}, not a number"
            )
    well_formed = isinstance(carried, dict) and all(
        part in PARTS and isinstance(values, dict) for part, values in carried.items()
    )
    if not well_formed:
        raise UserError(f"checkpoint {path}: refused, what it carries is not well formed")
    for where, name in _class_paths(carried, "carried"):
        raise UserError(f"checkpoint {path}: refused, its {where} names {name!r}")


def load_weights(module: nn.Module, state_dict: dict[str, torch.Tensor], path: str | Path) -> None:
    """Copy weights into a module; one sentence lists what is missing, unexpected or misshapen."""
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
        raise UserError(f"checkpoint {path} does not fit the model: " + "; ".join(problems))
    module.load_state_dict(state_dict)


def check_fits(loaded: dict[str, Any], module: Any) -> None:
    """Refuse a checkpoint of another vocabulary; warn where the configuration has changed."""
    kept = loaded.get(KEY)
    if not isinstance(kept, dict):
        return
    check_vocabulary(kept, module.tokenizer)
    if module.configuration is None:
        return
    then, now = kept.get("configuration", {}), module.configuration
    differing = sorted(_differences(then.get("model"), now.get("model"), "model"))
    if differing:
        warnings.warn(
            f"the checkpoint was written with another configuration: {_first_few(differing)}. "
            "A restored optimiser keeps its own rate; for a new run from these weights use "
            "--weights instead of --ckpt_path",
            stacklevel=2,
        )


def check_vocabulary(kept: dict[str, Any], tokenizer: Any) -> None:
    """Refuse weights that were trained with another vocabulary."""
    if kept.get("vocabulary") not in (None, tokenizer.digest):
        raise UserError(
            f"model.tokenizer.path: {tokenizer.name!r} is not the vocabulary that the checkpoint "
            f"was trained with (digest {str(kept['vocabulary'])[:12]}, here "
            f"{tokenizer.digest[:12]}); leave model.tokenizer out to use the checkpoint's own"
        )


def _differences(then: object, now: object, where: str) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in then.keys() | now.keys():
            yield from _differences(then.get(key), now.get(key), f"{where}.{key}")
    elif then != now:
        yield f"{where} was {then!r}, is {now!r}"


def _first_few(names: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    found = sorted(p.name for p in path.parent.glob("*.ckpt"))
    return f" (beside it: {_first_few(found, 5)})" if found else ""


def _refused_global(message: str) -> str:
    for mark in ("Unsupported global: GLOBAL ", "Unsupported class "):
        if mark in message:
            return message.split(mark, 1)[1].split()[0].rstrip(".,")
    return ""
