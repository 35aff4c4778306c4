"""YAML of unknown origin: plain values only, and no more of them than the text shows.

A few lines of anchors can stand for a billion values, and brackets can be nested until a reader
falls over. Either is refused before a value is made, with the place in the file.
"""

from __future__ import annotations

import reprlib
from typing import Any

import yaml

MOST_VALUES = 100_000
"""How many values a text may stand for, those of anchors counted wherever they are named."""

MOST_BITS = 63
"""How wide a whole number may be: Python counts no further, and cannot even print the widest."""


def compose(text: str) -> yaml.Node | None:
    """Return the nodes of a text, None of an empty one; nothing is constructed.

    Raises:
        yaml.YAMLError: it is no YAML, nested too deeply, or stands for more than `MOST_VALUES`.
    """
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _count(node, {})
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from error
    return node


def load(text: str) -> Any:
    """Return what a text means; tags that stand for anything but plain values are refused.

    Raises:
        yaml.YAMLError: as `compose` and `construct`.
    """
    node = compose(text)
    return None if node is None else construct(node)


def construct(node: yaml.Node) -> Any:
    """Return what a node means.

    Raises:
        yaml.MarkedYAMLError: a tag that stands for no plain value, a text that is not what its tag
            says, or a whole number too wide for what it could count.
    """
    return _PlainLoader("").construct_object(node, deep=True)


# What PyYAML's constructors of plain values run into where a text does not fit its tag.
_CARELESS = (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError)


class _PlainLoader(yaml.SafeLoader):
    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except RecursionError as error:
            raise _refusal(node, "it is nested too deeply") from error
        except _CARELESS as error:
            written = reprlib.repr(node.value) if isinstance(node, yaml.ScalarNode) else "this"
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise _refusal(node, f"{written} is no {tag}; text wants quotes") from error
        if isinstance(value, int) and value.bit_length() > MOST_BITS:
            raise _refusal(node, f"a whole number of more than {MOST_BITS} bits")
        return value


_OPEN = -1


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values a node stands for, each anchor counted once and added wherever it is used."""
    known = counted.get(id(node))
    if known == _OPEN:
        raise _refusal(node, "it holds itself")
    if known is not None:
        return known
    counted[id(node)] = _OPEN
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    total = 1 + sum(_count(child, counted) for child in children)
    if total > MOST_VALUES:
        raise _refusal(node, f"it stands for more than {MOST_VALUES:,} values")
    counted[id(node)] = total
    return total


def _refusal(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
