"""The parser's many-line messages as one sentence: the key, the value, what is accepted."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module

from lightning.pytorch.callbacks import Callback

from clipkit.data.pairs import PairDataModule
from clipkit.encoders import ImageEncoder, TextEncoder
from clipkit.errors import did_you_mean
from clipkit.heads import Head
from clipkit.losses import ContrastiveLoss

_KEY = re.compile(r'(?:Parser key|Key) "([^"]+)":?$')
_FRAME = re.compile(
    r"(Problem with given class_path .*:$|Does not validate against|Subtypes:|Errors:|Given value)"
)
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
_NO_CLASS = re.compile(r"Expected a path but (\S+) either not accessible or invalid")
_CALLABLE = re.compile(
    r"Type .* expects a function or a callable class: (.*?)(?:\. Got value: .*)?$"
)
_NOT_ACCEPTED = re.compile(
    r"(?:Option '(.+)' is not accepted|Subcommand '\w+' does not accept option '(.+)')"
)
_CLASS_PATH = re.compile(r"Problem with given class_path '(.+)'")
_NO_NUMBER = re.compile(r"invalid literal for int\(\) with base 10: '(.*)'")
_REQUIRED = "the following arguments are required: "
_UNKNOWN = "unrecognized arguments: "
_IN_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "dict": "a mapping, as in '{key: value}' with a space behind the colon",
}
_OF_PART: dict[str, type] = {
    "data": PairDataModule,
    "model.image_encoder": ImageEncoder,
    "model.text_encoder": TextEncoder,
    "model.image_head": Head,
    "model.text_head": Head,
    "model.loss": ContrastiveLoss,
    "trainer.callbacks": Callback,
}


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Return one sentence for a message of the parser.

    Args:
        message: as jsonargparse writes it, a tree of alternatives over many lines.
        options: every ``--option`` there is, for a hint about a misspelt one.
    """
    lines = [line.strip().removeprefix("- ") for line in message.strip().splitlines()]
    key, leaves = _key_and_leaves(lines)
    first = leaves[0] if leaves else one_line(message)
    if first.startswith(_UNKNOWN):
        return _unknown_option(first.removeprefix(_UNKNOWN), options)
    if first.startswith(_REQUIRED):
        missing = [f"{key}.{name}" if key else name for name in first[len(_REQUIRED) :].split(", ")]
        return _required(missing)
    if callable_ := _CALLABLE.match(first):
        first = callable_[1]
    if unknown := _NOT_ACCEPTED.match(first):
        return _unknown_argument(key, unknown[1] or unknown[2], lines, options)
    if no_class := _NO_CLASS.match(first):
        return _unknown_class(key, no_class[1], leaves[1:])
    expected = [match for leaf in leaves if (match := _EXPECTED.match(leaf))]
    if expected and _EXPECTED.match(first):
        given = expected[0][2] or _given(lines)
        accepted = [kind for match in expected for kind in _kinds(match[1])]
        return f"{key}: {given} is not accepted; it takes {' or '.join(dict.fromkeys(accepted))}"
    if no_number := _NO_NUMBER.match(first):
        return f"{key}: {no_number[1]} is not accepted; it takes a whole number"
    # A sentence of our own names its key already.
    if not key or re.match(r"(data|model|trainer|EvalData)\b[\w.]*[: ]", first):
        return one_line(first)
    return one_line(f"{key}: {first}")


def one_line(message: str) -> str:
    """Return the message without line breaks and repeated blanks."""
    return re.sub(r"\s+", " ", message).strip()


def _key_and_leaves(lines: Sequence[str]) -> tuple[str, list[str]]:
    """Return the dotted key down to the first real complaint, and the complaints."""
    keys: list[str] = []
    leaves: list[str] = []
    for line in lines:
        if named := _KEY.match(line):
            if not leaves:
                keys.append(named[1])
        elif line and not _FRAME.match(line):
            leaves.append(line)
    return ".".join(keys), leaves


def _given(lines: Sequence[str]) -> str:
    values = [line.partition(": ")[2] for line in lines if line.startswith("Given value: ")]
    return values[0] if values else "the value"


def _kinds(kind: str) -> Iterator[str]:
    """Yield the names of what a type takes; that nothing may be given goes without saying."""
    if kind.startswith("typing.Literal["):
        yield from (f"{value.strip()}" for value in kind[len("typing.Literal[") : -1].split(","))
    elif "NoneType" not in kind:
        name = re.sub(r"<class '(?:.*\.)?([^'.]+)'>", r"\1", kind)
        yield _IN_WORDS.get(name, name)


def _unknown_class(key: str, name: str, others: Sequence[str]) -> str:
    for other in others:
        if "No module named" in other or "has no attribute" in other:
            reason = other.rpartition(": ")[2]
            return (
                f"{key}: {name} cannot be imported ({reason}); your own file lies in this folder?"
            )
    base = _OF_PART.get(key)
    known = sorted(part.__name__ for part in _subclasses(base)) if base else []
    hint = did_you_mean(name, known)
    shipped = f"there are {', '.join(known)}, or " if known else ""
    return f"{key}: {name} is no class that fits here; {hint}{shipped}your own as my_code.MyClass"


def _subclasses(base: type) -> Iterator[type]:
    subclasses: list[type] = base.__subclasses__()
    for subclass in subclasses:
        if subclass.__module__.startswith("clipkit."):
            yield subclass
        yield from _subclasses(subclass)


def _required(missing: Sequence[str]) -> str:
    names = [re.sub(r"^(fit|validate|test)\.", "", name) for name in missing]
    if len(names) > 3:
        return (
            f"{', '.join(names[:3])} and {len(names) - 3} more are not given; begin with a recipe, "
            "as in -c base -c pairs, or with --ckpt_path"
        )
    return f"{', '.join(names)}: required, but not given"


def _unknown_argument(key: str, name: str, lines: Sequence[str], options: Iterable[str]) -> str:
    paths = [match[1] for line in lines if (match := _CLASS_PATH.match(line))]
    if not paths:
        return _unknown_option(f"--{key}.{name}" if key else f"--{name}", options).lstrip("-")
    first = next(i for i, line in enumerate(lines) if _NOT_ACCEPTED.search(line))
    path = [match[1] for line in lines[:first] if (match := _CLASS_PATH.match(line))][-1]
    module, _, attribute = path.rpartition(".")
    takes = list(inspect.signature(getattr(import_module(module), attribute)).parameters)
    hint = did_you_mean(name, takes)
    return f"{key}.{name}: {attribute} takes no {name}; {hint}it takes {', '.join(takes)}"


def _unknown_option(words: str, options: Iterable[str]) -> str:
    key = words.split()[0].partition("=")[0]
    known = [option for option in options if not option.endswith(".help")]
    close = get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else "; --help lists what there is"
    return f"{key}: no such option{hint}"
