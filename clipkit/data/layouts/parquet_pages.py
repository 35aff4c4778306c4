"""The pages of a column within a parquet file, by their headers alone.

A header is a small Thrift struct in front of each page, of some tens of bytes.
https://github.com/apache/parquet-format
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from clipkit.data.layouts.thrift import CutOffError, NoThriftError, number_of, read_struct

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
            header, size = read_struct(encoded)
        except NoThriftError:
            break
        except CutOffError:
            if length >= min(end - start, _LONGEST_HEADER):
                break
            length *= 8
        else:
            return header, start + size
    raise DamagedPageError(f"no page begins at byte {start:,}")


def _number(fields: dict[int, Any], field: int) -> int:
    try:
        return number_of(fields, field)
    except NoThriftError as error:
        raise DamagedPageError("a page's header lacks a number") from error
