"""YAML of unknown origin: plain values only, and no more of them than the text shows.

A few lines of anchors can stand for a billion values, and brackets can be nested until a reader
falls over. Either is refused before a value is made, with the place in the file.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_VALUES = 100_000
"""How many values a text may stand for, those of anchors counted wherever they are named."""


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
        yaml.YAMLError: as `compose`, or a tag.
    """
    node = compose(text)
    try:
        return None if node is None else yaml.SafeLoader("").construct_document(node)
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="it is nested too deeply") from error


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
