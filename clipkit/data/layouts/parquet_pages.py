"""The pages of a column within a parquet file, by their headers alone.

A header is a small Thrift struct in front of each page, of some tens of bytes.
https://github.com/apache/parquet-format
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

# Kinds of pages.
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_FIRST_GUESS, _LONGEST_HEADER = 256, 1 << 24  # bytes; statistics may make a header long


class DamagedPageError(Exception):
    """What the file says of itself cannot be; the message says what."""


class Page(NamedTuple):
    """A page of values: of the rows themselves, or the dictionary that they are taken from."""

    start: int  # where its content begins in the file
    size: int  # bytes of its content
    full_size: int  # bytes of its content when unpacked
    num_values: int
    encoding: int
    is_dictionary: bool
    # Data pages of version 2 hold their levels in front, never compressed.
    levels_size: int | None
    is_packed: bool
    checksum: int | None


def list_pages(
    read: Callable[[int, int], bytes], start: int, end: int, num_values: int
) -> list[Page]:
    """The pages of a column chunk, its dictionary first where there is one.

    Args:
        read: gives some bytes of the file from a place on.
        start: where the chunk begins.
        end: where everything that may belong to it ends.
        num_values: how many values it holds, those that are null included.

    Raises:
        DamagedPageError: the headers do not fit the chunk.
    """
    pages: list[Page] = []
    found = 0
    while found < num_values:
        page, start = _page_at(read, start, end)
        if page is None:
            continue
        if page.is_dictionary and pages:
            raise DamagedPageError("a dictionary follows other pages")
        pages.append(page)
        found += 0 if page.is_dictionary else page.num_values
    if found > num_values:
        raise DamagedPageError(f"pages of {found:,} values where {num_values:,} were promised")
    return pages


def _page_at(read: Callable[[int, int], bytes], start: int, end: int) -> tuple[Page | None, int]:
    """The page at a place, None for one without values, and where the next one begins."""
    header, content = _header_at(read, start, end)
    kind, full_size, size = (_number(header, field) for field in (1, 2, 3))
    if min(full_size, size) < 0 or content + size > end:
        raise DamagedPageError(f"the page at byte {start:,} reaches beyond its column")
    about = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, -1))
    if not isinstance(about, dict):
        if kind in (_DATA, _DICTIONARY, _DATA_V2):
            raise DamagedPageError(f"the page at byte {start:,} does not say what it holds")
        return None, content + size
    levels_size = None
    if kind == _DATA_V2:
        if _number(about, 6):
            raise DamagedPageError(f"the page at byte {start:,} holds lists")
        levels_size = _number(about, 5)
        if not 0 <= levels_size <= min(size, full_size):
            raise DamagedPageError(f"the page at byte {start:,} is shorter than its levels")
    num_values = _number(about, 1)
    if num_values < 0:
        raise DamagedPageError(f"the page at byte {start:,} holds {num_values} values")
    checksum = header.get(4)
    page = Page(
        start=content,
        size=size,
        full_size=full_size,
        num_values=num_values,
        encoding=_number(about, 4 if kind == _DATA_V2 else 2),
        is_dictionary=kind == _DICTIONARY,
        levels_size=levels_size,
        is_packed=about.get(7, True) is True if kind == _DATA_V2 else True,
        checksum=checksum & 0xFFFFFFFF if isinstance(checksum, int) else None,
    )
    return page, content + size


def _header_at(
    read: Callable[[int, int], bytes], start: int, end: int
) -> tuple[dict[int, Any], int]:
    """The header at a place, and where it ends."""
    length = _FIRST_GUESS
    while start < end:
        encoded = read(start, min(length, end - start))
        try:
            header, size = _read_struct(encoded, 0)
        except (IndexError, struct.error):
            if length >= min(end - start, _LONGEST_HEADER):
                break
            length *= 8
        else:
            return header, start + size
    raise DamagedPageError(f"no page begins at byte {start:,}")


def _number(fields: dict[int, Any], field: int) -> int:
    value = fields.get(field)
    # bool is an int to Python, but not to the format.
    if not isinstance(value, int) or isinstance(value, bool):
        raise DamagedPageError("a page's header lacks a number")
    return value


# --- Thrift's compact protocol -------------------------------------------------------------------

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_DEEPEST = 8


def _read_struct(encoded: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of a struct by their numbers, and where it ends.

    Raises:
        IndexError: it goes on behind the end.
        DamagedPageError: no struct is written so.
    """
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
            fields[field], at = _read_value(encoded, at, kind, depth)
    return fields, at + 1


def _read_value(encoded: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise DamagedPageError("a page's header is nested too deeply")
    if kind in _INTEGERS:
        return _zigzag(encoded, at)
    if kind == _BYTE or kind in (_TRUE, _FALSE):
        return encoded[at], at + 1
    if kind == _DOUBLE:
        return struct.unpack_from("<d", encoded, at)[0], at + 8
    if kind == _BINARY:
        length, at = _varint(encoded, at)
        if at + length > len(encoded):
            raise IndexError
        return None, at + length  # nothing that is needed is a text
    if kind == _STRUCT:
        return _read_struct(encoded, at, depth + 1)
    if kind in (_LIST, _SET):
        lead = encoded[at]
        length, at = (lead >> 4, at + 1) if lead >> 4 < 15 else _varint(encoded, at + 1)
        for _ in range(length):
            _, at = _read_value(encoded, at, lead & 15, depth + 1)
        return None, at
    raise DamagedPageError("a page's header holds what no header does")


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
            raise DamagedPageError("a page's header holds no number where one belongs")


def _zigzag(encoded: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(encoded, at)
    return (value >> 1) ^ -(value & 1), at
