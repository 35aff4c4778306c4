"""What of a stranger's configuration may reach the parser: checked by structure, slot by slot.

The parser imports classes from strings in more places than one would search for: short names where
a part belongs, YAML inside strings, dotted keys, files named as values. So nothing is searched for;
what is not known to be harmless is refused. A string is let through only where the constructor of
one of clipkit's own parts takes a string.
"""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from inspect import signature
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from clipkit.errors import UserError
from clipkit.safe_yaml import MOST_BITS

PUBLIC_PARTS = frozenset(
    {
        "clipkit.callbacks.EvaluationPictures",
        "clipkit.callbacks.LinearProbe",
        "clipkit.callbacks.NearestNeighbours",
        "clipkit.callbacks.Throughput",
        "clipkit.callbacks.ZeroShotClassification",
        "clipkit.callbacks.ZeroShotRetrieval",
        "clipkit.data.Augmentation",
        "clipkit.data.Filters",
        "clipkit.data.HuggingFacePairs",
        "clipkit.data.MixedPairs",
        "clipkit.data.PairSource",
        "clipkit.data.ShapesPairs",
        "clipkit.data.Streaming",
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

TOKENIZER = "clipkit.tokenizer.Tokenizer"
OPTIMIZERS = "torch.optim."
PARTS = ("image_encoder", "text_encoder", "image_head", "text_head", "temperature", "loss",
         "optimizer", "schedule", "tokenizer")  # fmt: skip
MODEL_NUMBERS = ("embed_dim", "image_lr", "text_lr", "lock_image", "lock_text", "micro_batch",
                 "compile")  # fmt: skip
# What of a trainer shapes the experiment; devices and nodes belong to the machine that trained.
TRAINER_NUMBERS = ("max_epochs", "max_steps", "min_epochs", "min_steps", "gradient_clip_val",
                   "accumulate_grad_batches", "log_every_n_steps", "check_val_every_n_epoch",
                   "val_check_interval", "num_sanity_val_steps", "limit_train_batches",
                   "limit_val_batches", "limit_test_batches", "deterministic")  # fmt: skip
PRECISIONS = ("16-true", "16-mixed", "bf16-true", "bf16-mixed", "32-true", "64-true")
# Nor does a checkpoint say what is written to the disk, and where; results do not depend on it. The
# tokenizer is the module's, which the checkpoint carries.
NOT_OF_DATA = ("cache_tokens", "cache_pictures_gb", "cache_folder", "tokenizer")
CALLBACKS = tuple(sorted(name for name in PUBLIC_PARTS if name.startswith("clipkit.callbacks.")))
CARRIED = {
    "image_encoder": ("pretrained", "weights", "image_size", "mean", "std", "interpolation",
                      "resize_mode"),
    "text_encoder": ("config", "pretrained"),
    "tokenizer": ("definition", "path"),
}  # fmt: skip
# Keys with which transformers would fetch or run code of others.
_RUNNING = ("auto_map", "quantization_config", "custom_pipelines", "trust_remote_code")

MOST_VALUES, DEEPEST = 100_000, 50
"""The most values that a checkpoint's record may stand for, and how deep they may be nested."""

NAME = re.compile(r"(?!.*\.\.)[\w+=-][\w.+= -]*")
"""A name that may become a folder or a file: no separator, no parent."""
_COLUMN = re.compile(r"(?!class_path$|init_args$)[\w.*?\[\]+ -]+")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")


def usable(
    configuration: dict[str, Any], *, trust: Sequence[str] = (), source: str
) -> dict[str, Any]:
    """Return what may be taken over of a checkpoint's configuration.

    That is the model, the data, the seed, the names, and of the trainer plain values and clipkit's
    own callbacks. Its logger, plugins and strategy belong to the machine that trained, callbacks
    of others could do anything: they are left out.

    Args:
        configuration: as the file holds it.
        trust: modules of the user whose classes it may name.
        source: the file, for messages.

    Raises:
        UserError: it names what is no part of clipkit, or is not well formed.
    """
    check = _Check(trust, f"checkpoint {source}")
    model = check.mapping(configuration.get("model"), "model")
    kept: dict[str, Any] = {"model": {}}
    for name, value in model.items():
        if name in PARTS:
            kept["model"][name] = check.part(value, f"model.{name}")
        elif name in MODEL_NUMBERS and (value is None or _is_number(value)):
            kept["model"][name] = value
        else:
            check.refuse(f"model.{name}", value)
    if "data" in configuration:
        kept["data"] = check.part(configuration["data"], "data")
        for name in NOT_OF_DATA:
            kept["data"]["init_args"].pop(name, None)
    if _is_number(configuration.get("seed_everything")):
        kept["seed_everything"] = configuration["seed_everything"]
    for key in ("experiment", "run_name"):
        given = configuration.get(key)
        if isinstance(given, str) and NAME.fullmatch(given):
            kept[key] = given
    kept["trainer"] = _trainer(check, configuration.get("trainer"))
    return kept


def refuse_unwieldy(kept: object, *, source: str) -> None:
    """Refuse a record too large to be walked: one value may stand in many places, and in itself.

    Raises:
        UserError: it stands for more than `MOST_VALUES`, is nested deeper than `DEEPEST`, or holds
            a whole number that cannot be counted to, and perhaps not be printed.
    """
    count = 0
    level = [kept]
    for _ in range(DEEPEST):
        following: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                following.extend((*value.keys(), *value.values()))
            elif isinstance(value, list | tuple | set | frozenset):
                following.extend(value)
            elif isinstance(value, int) and value.bit_length() > MOST_BITS:
                raise UserError(
                    f"checkpoint {source}: refused, its record holds a whole number of more than "
                    f"{MOST_BITS} bits"
                )
            if count + len(following) > MOST_VALUES:
                raise UserError(
                    f"checkpoint {source}: refused, its record stands for more than "
                    f"{MOST_VALUES:,} values"
                )
        count += len(following)
        level = following
        if not level:
            return
    raise UserError(f"checkpoint {source}: refused, its record is nested over {DEEPEST} deep")


def refuse_outside(
    configuration: dict[str, Any], found: dict[str, dict[str, Any]], *, source: str
) -> None:
    """Refuse parts that would be read from a file or the hub, where the checkpoint carries none.

    Raises:
        UserError: a tokenizer without its definition, or a tower of transformers without its
            configuration.
    """
    check = _Check((), f"checkpoint {source}")
    for part, name, needed in (
        ("tokenizer", TOKENIZER, "definition"),
        ("text_encoder", "clipkit.encoders.HuggingFaceTextEncoder", "config"),
    ):
        value = configuration["model"].get(part)
        named = isinstance(value, dict) and value.get("class_path") == name
        if named and found.get(part, {}).get(needed) is None:
            check.refuse(f"carried.{part}.{needed}", None)


def _trainer(check: _Check, trainer: object) -> dict[str, Any]:
    values = trainer if isinstance(trainer, dict) else {}
    kept: dict[str, Any] = {
        name: values[name] for name in TRAINER_NUMBERS if _is_number(values.get(name))
    }
    if values.get("precision") in PRECISIONS:
        kept["precision"] = values["precision"]
    callbacks = values.get("callbacks")
    kept["callbacks"] = [
        check.part(callback, "trainer.callbacks")
        for callback in (callbacks if isinstance(callbacks, list) else [])
        if isinstance(callback, dict) and callback.get("class_path") in CALLBACKS
    ]
    return kept


def carried(values: object, *, source: str) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint carries in the place of files, if it is well formed.

    These values reach constructors directly and never the parser.
    """
    check = _Check((), f"checkpoint {source}")
    found: dict[str, dict[str, Any]] = {}
    for part, arguments in check.mapping(values, "carried").items():
        if part not in CARRIED:
            check.refuse(f"carried.{part}", arguments)
        found[part] = {}
        for name, value in check.mapping(arguments, f"carried.{part}").items():
            if name not in CARRIED[part] or (isinstance(value, dict) and name != "config"):
                check.refuse(f"carried.{part}.{name}", value)
            found[part][name] = value
        if "pretrained" in CARRIED[part]:
            found[part]["pretrained"] = False
        config = found[part].get("config")
        if config is not None:
            found[part]["config"] = check.foreign_config(config, f"carried.{part}.config")
    return found


class _Check:
    """Walks a configuration and refuses, naming the place and the value."""

    def __init__(self, trust: Sequence[str], source: str) -> None:
        self.trust = trust
        self.source = source

    def refuse(self, where: str, value: object) -> None:
        raise UserError(f"{self.source}: refused, its {where} is {_short(value)}")

    def mapping(self, value: object, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(
            isinstance(key, str) and _IDENTIFIER.fullmatch(key) for key in value
        ):
            self.refuse(where, value)
        assert isinstance(value, dict)
        return value

    def part(self, value: object, where: str) -> dict[str, Any]:
        """Return a part: exactly a class path that is admitted, and arguments that it takes."""
        fields = self.mapping(value, where)
        if not {"class_path"} <= fields.keys() <= {"class_path", "init_args"}:
            self.refuse(where, value)
        name = fields["class_path"]
        arguments = self.mapping(fields.get("init_args") or {}, f"{where}.init_args")
        if isinstance(name, str) and name in PUBLIC_PARTS:
            return {"class_path": name, "init_args": self._arguments(name, arguments, where)}
        if isinstance(name, str) and name.startswith(OPTIMIZERS):
            if not name.removeprefix(OPTIMIZERS).isidentifier():
                self._refuse_name(name, where)
            for argument, number in arguments.items():
                numbers = number if isinstance(number, list) else [number]
                if not all(n is None or _is_number(n) for n in numbers):
                    self.refuse(f"{where}.{argument}", number)
            return {"class_path": name, "init_args": arguments}
        if not isinstance(name, str) or not self._trusted(name):
            self._refuse_name(name, where)
        hints = _hints_of(name)
        for argument, given in arguments.items():
            self._refuse_other_names(given, hints.get(argument, Any), f"{where}.{argument}")
        return {"class_path": name, "init_args": arguments}

    def _refuse_other_names(self, value: object, hint: object, where: str) -> None:
        """Refuse in the arguments of a trusted class what the parser could take for another class.

        It imports a dotted name where anything but text is asked for, and what a `class_path` names
        wherever it stands, in YAML within a string too.
        """
        if isinstance(value, Mapping):
            if "class_path" in value:
                self.part(value, where)
            for key, inner in value.items():
                self._refuse_other_names(inner, None, f"{where}.{key}")
        elif isinstance(value, list | tuple):
            for place, inner in enumerate(value):
                self._refuse_other_names(inner, _item(hint), f"{where}[{place}]")
        elif isinstance(value, str):
            if _hides_a_class(value):
                self.refuse(where, value)
            if _DOTTED.fullmatch(value) and not self._trusted(value) and not _leaves_text(hint):
                self._refuse_name(value, where)

    def _trusted(self, name: str) -> bool:
        if _is_python_itself(name):  # which nobody means, and which can do anything
            return False
        return any(name == module or name.startswith(f"{module}.") for module in self.trust)

    def _refuse_name(self, name: object, where: str) -> None:
        module = str(name).rpartition(".")[0] or str(name)
        hint = "" if _is_python_itself(module) else f"; if you trust it, add --trust {module[:100]}"
        raise UserError(
            f"{self.source}: refused, its {where} names {_short(name)}, which is no part of "
            f"clipkit{hint}"
        )

    def _arguments(self, name: str, arguments: dict[str, Any], where: str) -> dict[str, Any]:
        module, _, attribute = name.rpartition(".")
        constructor = getattr(import_module(module), attribute).__init__
        hints = get_type_hints(constructor)
        # With what is left out, as the parser will have it: what a checkpoint carries replaces what
        # it once read from outside only where the part is still the checkpoint's.
        kept = _plain_defaults(constructor)
        for argument, value in arguments.items():
            if argument not in hints:
                self.refuse(f"{where}.{argument}", value)
            if argument == "config":
                continue  # a foreign configuration: only what is carried is used
            kept[argument] = self._value(value, hints[argument], f"{where}.{argument}")
        # Weights come from the checkpoint, whatever the parts once started from.
        for outside, instead in (("pretrained", False), ("weights", None)):
            if outside in hints:
                kept[outside] = instead
        if name == TOKENIZER:
            kept["path"] = "english"  # until the carried one takes its place
        return kept

    def _value(self, value: object, hint: object, where: str) -> object:
        if value is None or _is_number(value):
            return value
        if isinstance(value, str):
            if not _takes_text(hint) or (_is_only_choice(hint) and value not in _choices(hint)):
                self.refuse(where, value)
            return value
        if isinstance(value, list):
            return [self._value(item, _item(hint), f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, dict):
            return self._mapping_value(value, hint, where)
        self.refuse(where, value)
        return None

    def _mapping_value(self, value: dict[Any, Any], hint: object, where: str) -> object:
        if dict[int, int] in _alternatives(hint) and all(
            str(key).isdecimal() and type(number) is int for key, number in value.items()
        ):
            return {int(key): number for key, number in value.items()}
        kept = _numbers_by_name(value, hint)
        if kept is not None:
            return kept
        part = _part_of(hint)
        if part is None:
            self.refuse(where, value)
        assert part is not None
        if get_origin(hint) is dict:
            for key in value:
                if not isinstance(key, str) or not NAME.fullmatch(key) or "." in key:
                    self.refuse(where, value)
            return {k: self._mapping_value(v, part, f"{where}.{k}") for k, v in value.items()}
        if not isinstance(value, dict):
            self.refuse(where, value)
        if "class_path" in value:
            fields = self.part(value, where)
            if fields["class_path"] != _public_name(part):
                self._refuse_name(fields["class_path"], where)
            return fields
        return self._arguments(_public_name(part), self.mapping(value, where), where)

    def foreign_config(self, config: object, where: str) -> dict[str, Any]:
        """Return a transformers configuration without what would fetch or run code."""
        if not isinstance(config, dict):
            self.refuse(where, config)
        assert isinstance(config, dict)
        return {
            key: value
            for key, value in config.items()
            if isinstance(key, str)
            and key not in _RUNNING
            and not key.strip("_").endswith("_implementation")
            and not _hides_a_class(value)
        }


def _numbers_by_name(value: dict[Any, Any], hint: object) -> dict[str, Any] | None:
    """Return weights or ranges of columns, where the slot takes such and it is nothing else."""
    alternatives = list(_alternatives(hint))
    ranges = dict[str, tuple[float | None, float | None]] in alternatives
    if dict[str, float] not in alternatives and not ranges:
        return None
    for name, given in value.items():
        numbers = given if ranges and isinstance(given, list | tuple) else [given]
        if not isinstance(name, str) or not _COLUMN.fullmatch(name):
            return None
        if not all(_is_number(number) or (ranges and number is None) for number in numbers):
            return None
    return value


def _is_python_itself(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _plain_defaults(constructor: Callable[..., Any]) -> dict[str, Any]:
    defaults = {name: given.default for name, given in signature(constructor).parameters.items()}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in defaults.items()
        if name != "config" and (isinstance(value, str | tuple | list) or _is_number(value))
    }


def _hints_of(name: str) -> dict[str, Any]:
    """What a trusted class asks for; nothing where it cannot be had, which the parser will say."""
    module, _, attribute = name.rpartition(".")
    try:
        return get_type_hints(getattr(import_module(module), attribute).__init__)
    except Exception:  # whatever the user's own module raises
        return {}


def _leaves_text(hint: object) -> bool:
    """Whether the parser leaves a dotted name as it is: it asks for text first, or for anything."""
    return hint in (Any, object) or _takes_text(hint)


def _hides_a_class(value: object) -> bool:
    if isinstance(value, str):
        return "class_path" in value or "\n" in value or "{" in value
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_hides_a_class, value.values()))
    return isinstance(value, list) and any(map(_hides_a_class, value))


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float)


def _alternatives(hint: object) -> Iterator[object]:
    if get_origin(hint) in (Union, UnionType):
        for inner in get_args(hint):
            yield from _alternatives(inner)
    else:
        yield hint


def _takes_text(hint: object) -> bool:
    return any(kind is str or get_origin(kind) is Literal for kind in _alternatives(hint))


def _is_only_choice(hint: object) -> bool:
    return not any(kind is str for kind in _alternatives(hint))


def _choices(hint: object) -> set[object]:
    found: set[object] = set()
    for kind in _alternatives(hint):
        if get_origin(kind) is Literal:
            found |= set(get_args(kind))
    return found


def _item(hint: object) -> object:
    """Return what the items of a list may be."""
    for kind in _alternatives(hint):
        if get_origin(kind) in (list, tuple, Sequence) and get_args(kind):
            return get_args(kind)[0]
    return type(None)


def _part_of(hint: object) -> type | None:
    """Return the clipkit class that a slot takes, itself or as the values of a mapping."""
    for kind in _alternatives(hint):
        inner = get_args(kind)[1] if get_origin(kind) is dict else kind
        if (
            isinstance(inner, type)
            and any(name.endswith(f".{inner.__name__}") for name in PUBLIC_PARTS)
            and inner.__module__.startswith("clipkit.")
        ):
            return inner
    return None


def _public_name(part: type) -> str:
    return next(name for name in PUBLIC_PARTS if name.endswith(f".{part.__name__}"))


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def _short(value: object) -> str:
    text = _REPR.repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
