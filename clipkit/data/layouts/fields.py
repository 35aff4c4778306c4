"""Captions within JSON: text that is JSON, and a field of an object, named `column.field`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from clipkit.data.rows import BLOCK, Source

_LOOKED_AT = 100  # cells by which a column is known to be JSON


class Field(NamedTuple):
    """A column, or the place of a field within the objects that it holds."""

    column: str
    path: tuple[str, ...] = ()


def locate(source: Source, name: str) -> Field | None:
    """Find what a name means: a column, or one before a dot and a field of its objects."""
    if name in source.columns:
        return Field(name)
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        column = ".".join(parts[:length])
        if column in source.columns or column in source.objects:
            return Field(column, tuple(parts[length:]))
    return None


def texts_of_field(values: pa.Array, path: Sequence[str]) -> pa.Array:
    """The texts (N) that a field of each object holds, as lists; empty where it holds none.

    Args:
        values: objects, or text that is JSON of such (N).
        path: the names of the field, from the outermost object inwards.
    """

    def texts(cell: object) -> list[str]:
        return _texts_within(_inside(_parsed(cell) if isinstance(cell, str) else cell, path))

    return _each(values, texts)


def texts_of_json(values: pa.Array) -> pa.Array | None:
    """The texts (N) of JSON strings and lists, as lists; None where the cells are plain text."""
    seen = 0
    for cell in values:
        text = (cell.as_py() or "").strip()
        if text and not isinstance(_json_text(text), str | list):
            return None
        seen += bool(text)
        if seen == _LOOKED_AT:
            break
    return _each(values, lambda cell: _texts_within(_json_text(cell or ""))) if seen else None


def arrow_of(values: list[Any]) -> pa.Array:
    """JSON values as an array, also where they are of several types.

    One caption here, several there: lists of strings. What else stands among texts is empty, as it
    is no caption. Other mixtures are kept as their JSON.
    """
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        pass
    given = [value for value in values if value is not None]
    texts = [_texts_within(value) for value in given]
    if 2 * sum(map(bool, texts)) > len(given):
        several = any(isinstance(value, list) for value in given)
        if several:
            return pa.array(map(_texts_within, values), pa.list_(pa.string()))
        return pa.array([next(iter(_texts_within(v)), None) for v in values], pa.string())
    dumped = (v if v is None or isinstance(v, str) else json.dumps(v) for v in values)
    return pa.array([text and storable(text) for text in dumped], pa.string())


def _each(values: pa.Array, texts: Callable[[Any], list[str]]) -> pa.Array:
    blocks = [
        pa.array(map(texts, values.slice(start, BLOCK).to_pylist()), pa.list_(pa.string()))
        for start in range(0, max(len(values), 1), BLOCK)
    ]
    return pa.concat_arrays(blocks)


def _json_text(text: str) -> object:
    """What the JSON of a string or list says; None for other text, a number's among it."""
    return _parsed(text) if text.lstrip()[:1] in ('"', "[") else None


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _inside(value: object, path: Sequence[str]) -> object:
    """What stands at a path; of a list, what stands there in each of its items."""
    for place, name in enumerate(path):
        if isinstance(value, list):
            found = [_inside(item, path[place:]) for item in value]
            return [one for item in found for one in (item if isinstance(item, list) else [item])]
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _texts_within(value: object) -> list[str]:
    """A string, or the strings of a list; whatever else there is, is no caption."""
    texts = value if isinstance(value, list) else [value]
    return [storable(text) for text in texts if isinstance(text, str)]


def storable(text: str) -> str:
    """A text without halves of characters, which JSON may spell and no file may hold."""
    return (
        text
        if text.isascii()
        else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    )
