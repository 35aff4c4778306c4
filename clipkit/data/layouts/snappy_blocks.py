"""Parts of what snappy packed, unpacked without what is before them.

Snappy's own compressor, and those written after it, pack 64 kB at a time and copy nothing from
before. So a page of a thousand pictures can be entered at each such block, once it is known where
they begin. Pictures hardly compress, so that finding that out is quick.
https://github.com/google/snappy/blob/main/format_description.txt
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

BLOCK = 1 << 16
# An element is a few bytes to copy, or literal bytes. Content of more elements than one in so many
# bytes takes longer to look through than to unpack.
_BYTES_AN_ELEMENT = 24


def find_blocks(packed: memoryview, size: int) -> np.ndarray | None:
    """Where each block begins in packed content, and its end; None where it has no such blocks.

    Args:
        packed: all of it.
        size: bytes that it unpacks to.

    Returns:
        (ceil(size / BLOCK) + 1,) uint32.
    """
    length, at = _preamble(packed)
    if length != size:
        return None
    starts = np.zeros(-(-size // BLOCK) + 1, np.uint32)
    unpacked = block = next_block = 0
    last = len(packed)
    elements_left = size // _BYTES_AN_ELEMENT + 64
    try:
        while at < last:
            if unpacked == next_block:
                starts[block] = at
                block, next_block = block + 1, next_block + BLOCK
            elements_left -= 1
            if elements_left < 0:
                return None
            tag = packed[at]
            kind = tag & 3
            if kind == 0:
                count = (tag >> 2) + 1
                at += 1
                if count > 60:
                    extra = count - 60
                    count = int.from_bytes(packed[at : at + extra], "little") + 1
                    at += extra
                at += count
            else:
                if kind == 1:
                    count = 4 + (tag >> 2 & 7)
                    offset = (tag >> 5) << 8 | packed[at + 1]
                    at += 2
                elif kind == 2:
                    count = (tag >> 2) + 1
                    offset = packed[at + 1] | packed[at + 2] << 8
                    at += 3
                else:
                    count = (tag >> 2) + 1
                    offset = int.from_bytes(packed[at + 1 : at + 5], "little")
                    at += 5
                if offset > unpacked - next_block + BLOCK:
                    return None  # copied from before the block
            unpacked += count
            if unpacked > next_block:
                return None
    except IndexError:
        return None
    if unpacked != size or at != last:
        return None
    starts[-1] = last
    return starts


def unpack_blocks(packed: bytes, size: int) -> pa.Buffer:
    """Blocks that follow one another, without what leads the whole.

    Raises:
        OSError, pyarrow.ArrowInvalid: they are no such blocks.
    """
    leading = bytearray()
    rest = size
    while rest > 127:
        leading.append(rest & 127 | 128)
        rest >>= 7
    leading.append(rest)
    return pa.Codec("snappy").decompress(bytes(leading) + packed, size)


def unpacked_size(packed: memoryview) -> int:
    """Bytes that packed content says it unpacks to; -1 where it says nothing."""
    return _preamble(packed)[0]


def _preamble(packed: memoryview) -> tuple[int, int]:
    value = 0
    for at, byte in enumerate(packed[:5]):
        value |= (byte & 127) << 7 * at
        if byte < 128:
            return value, at + 1
    return -1, 0
