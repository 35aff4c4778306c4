"""Structs of Thrift's compact protocol, in which parquet files describe themselves.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

import struct
from typing import Any

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_DEEPEST = 16


class NoThriftError(ValueError):
    """Bytes that are no struct."""


class CutOffError(Exception):
    """A struct that goes on behind the end of the bytes."""


def read_struct(encoded: bytes) -> tuple[dict[int, Any], int]:
    """The fields of a struct by their numbers, and how many bytes it takes.

    Raises:
        CutOffError: it goes on behind the end.
        NoThriftError: no struct is written so.
    """
    try:
        return _struct(encoded, 0, 0)
    except (IndexError, struct.error) as error:
        raise CutOffError from error


def number_of(fields: dict[int, Any], field: int) -> int:
    """A field that must be a whole number.

    Raises:
        NoThriftError: it is absent or something else.
    """
    value = fields.get(field)
    # bool is an int to Python, but not to the protocol.
    if not isinstance(value, int) or isinstance(value, bool):
        raise NoThriftError(f"field {field} is no number")
    return value


def _struct(encoded: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    field = 0
    while (lead := encoded[at]) != 0:
        at += 1
        if lead >> 4:
            field += lead >> 4
        else:
            field, at = _zigzag(encoded, at)
        kind = lead & 15
        if kind in (_TRUE, _FALSE):
            fields[field] = kind == _TRUE
        else:
            fields[field], at = _value(encoded, at, kind, depth)
    return fields, at + 1


def _value(encoded: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in _INTEGERS:
        return _zigzag(encoded, at)
    if kind in (_BYTE, _TRUE, _FALSE):
        return encoded[at], at + 1
    if kind == _DOUBLE:
        return struct.unpack_from("<d", encoded, at)[0], at + 8
    if kind == _BINARY:
        length, at = _varint(encoded, at)
        if at + length > len(encoded):
            raise IndexError
        return encoded[at : at + length], at + length
    if depth > _DEEPEST:
        raise NoThriftError("it is nested too deeply")
    if kind == _STRUCT:
        return _struct(encoded, at, depth + 1)
    if kind in (_LIST, _SET):
        lead = encoded[at]
        length, at = (lead >> 4, at + 1) if lead >> 4 < 15 else _varint(encoded, at + 1)
        values = []
        for _ in range(length):
            value, at = _value(encoded, at, lead & 15, depth + 1)
            values.append(value)
        return values, at
    raise NoThriftError(f"nothing is of kind {kind}")


def _varint(encoded: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = encoded[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise NoThriftError("a number has no end")


def _zigzag(encoded: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(encoded, at)
    return (value >> 1) ^ -(value & 1), at
