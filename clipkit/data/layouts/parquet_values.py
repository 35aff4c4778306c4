"""What a parquet page holds: how deep each row is defined, places in a dictionary, byte strings.

https://parquet.apache.org/docs/file-format/data-pages/encodings/
"""

from __future__ import annotations

import struct

import numpy as np

from clipkit.data.layouts.parquet_pages import DamagedPageError

_LENGTH = struct.Struct("<I")


def value_starts(content: memoryview, num_values: int) -> np.ndarray:
    """Where each byte string begins, and the end of the last: (num_values + 1,) uint32.

    A string follows four bytes that say how long it is (PLAIN), which count as part of it here.

    Raises:
        DamagedPageError: the strings do not fill the content.
    """
    length_at, last = _LENGTH.unpack_from, len(content)
    if num_values * _LENGTH.size > last:
        raise DamagedPageError("it is shorter than the lengths of its values")
    starts = np.empty(num_values + 1, np.uint32)
    at = 0
    try:
        for number in range(num_values):
            starts[number] = at
            at += 4 + length_at(content, at)[0]
    except (struct.error, OverflowError):  # beyond the content, or beyond 32 bits
        at = last + 1
    if at != last:
        raise DamagedPageError("its values do not fill the page")
    starts[num_values] = at
    return starts


def read_hybrid(encoded: memoryview, bit_width: int, num_values: int) -> np.ndarray:
    """Numbers (num_values,) int32 as runs of equal ones and of packed bits.

    Raises:
        DamagedPageError: there are fewer numbers.
    """
    numbers = np.zeros(num_values, np.int32)
    if bit_width == 0:
        return numbers
    if not 0 < bit_width <= 31:
        raise DamagedPageError(f"numbers of {bit_width} bits")
    at = done = 0
    num_bytes = (bit_width + 7) // 8
    while done < num_values:
        lead, at = _varint(encoded, at)
        count = lead >> 1
        if lead & 1:  # groups of eight
            end = at + count * bit_width
            # The last group may be cut where the numbers end.
            wanted = min(count * 8, num_values - done)
            unpacked = _unpack(encoded[at:end], bit_width, wanted)
            numbers[done : done + wanted] = unpacked
            done, at = done + wanted, end
        else:
            if at + num_bytes > len(encoded):
                raise DamagedPageError("its numbers are cut off")
            value = int.from_bytes(encoded[at : at + num_bytes], "little")
            if value >> bit_width:
                raise DamagedPageError("a number has too many bits")
            numbers[done : done + count] = value
            done, at = done + count, at + num_bytes
        if count == 0:
            raise DamagedPageError("a run of no numbers")
    return numbers


def _unpack(encoded: memoryview, bit_width: int, num_values: int) -> np.ndarray:
    if len(encoded) * 8 < num_values * bit_width:
        raise DamagedPageError("its numbers are cut off")
    needed = np.frombuffer(encoded, np.uint8, -(-num_values * bit_width // 8))
    bits = np.unpackbits(needed, count=num_values * bit_width, bitorder="little")
    weights = 1 << np.arange(bit_width, dtype=np.int64)
    numbers: np.ndarray = bits.reshape(num_values, bit_width) @ weights
    return numbers.astype(np.int32)


def _varint(encoded: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(encoded) and shift < 35:
        byte = encoded[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise DamagedPageError("its numbers are cut off")
