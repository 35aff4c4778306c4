"""Where a column is in each row group, as the end of a parquet file says.

pyarrow says so too, but ends the process where a damaged file says nonsense.
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from clipkit.data.layouts.parquet_pages import DamagedPageError
from clipkit.data.layouts.thrift import CutOffError, NoThriftError, number_of, read_struct

_MARK = b"PAR1"


class Chunk(NamedTuple):
    """A column in a row group."""

    num_rows: int
    num_values: int
    num_nulls: int | None  # None: not said
    start: int
    codec: int
    encodings: list[int]
    is_elsewhere: bool  # in another file, or encrypted


def list_chunks(read: Callable[[int, int], bytes], size: int, column: str) -> Iterator[Chunk]:
    """A column of byte strings, row group by row group.

    Args:
        read: gives some bytes of the file from a place on.
        size: bytes of the file.
        column: the column's path, its names joined by dots.

    Raises:
        DamagedPageError: the end of the file says nothing that can be.
    """
    end = read(max(size - 8, 0), min(size, 8))
    length = int.from_bytes(end[:4], "little")
    if len(end) < 8 or end[4:] != _MARK or length > size - 12:
        raise DamagedPageError("it does not end as parquet files do")
    try:
        footer, _ = read_struct(read(size - 8 - length, length))
        for group in footer[4]:
            yield _chunk(group, column)
    except (NoThriftError, CutOffError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise DamagedPageError("what it says of its row groups cannot be read") from error


def _chunk(group: dict[int, Any], column: str) -> Chunk:
    (chunk,) = [
        chunk
        for chunk in group[1]
        if 3 not in chunk or b".".join(chunk[3][3]).decode("utf-8", "replace") == column
    ]
    described = chunk[3]
    starts = [number_of(described, field) for field in (9, 11) if described.get(field) is not None]
    nulls = described.get(12, {}).get(3)
    num_rows, num_values = number_of(group, 3), number_of(described, 5)
    if min(num_rows, num_values, *starts) < 0 or num_rows >= 1 << 31:
        raise NoThriftError("a number is out of all bounds")
    return Chunk(
        num_rows=num_rows,
        num_values=num_values,
        num_nulls=nulls if isinstance(nulls, int) else None,
        # Some writers say 0 where there is no dictionary.
        start=min(start for start in starts if start > 0),
        codec=number_of(described, 4),
        encodings=list(described[2]),
        is_elsewhere=1 in chunk or 8 in chunk,
    )
