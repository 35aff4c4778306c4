"""What a picture's file is made of: blocks with a length, a type and a content."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple


class Block(NamedTuple):
    """Where a block lies, and in it the bytes of its length, of its type and of its pixels."""

    start: int
    stop: int
    length: range = range(0)
    kind: range = range(0)
    pixels: range = range(0)


def blocks_of(data: bytes, form: str) -> list[Block]:
    return list(_READERS[form](data))


def _png(data: bytes) -> Iterator[Block]:
    yield Block(0, 8, kind=range(8))
    place = 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        stop = place + 12 + size
        pixels = data[place + 4 : place + 8] == b"IDAT"
        yield Block(
            place,
            stop,
            length=range(place, place + 4),
            kind=range(place + 4, place + 8),
            pixels=range(place + 8, stop - 4) if pixels else range(0),
        )
        place = stop


def _jpeg(data: bytes) -> Iterator[Block]:
    yield Block(0, 2, kind=range(1, 2))
    place = 2
    while place < len(data) - 2:
        size = 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        length, kind = range(place + 2, place + 4), range(place + 1, place + 2)
        yield Block(place, place + size, length=length, kind=kind)
        place += size
        if data[kind.start] == 0xDA:
            stop = place
            while data[stop] != 0xFF or data[stop + 1] == 0 or 0xD0 <= data[stop + 1] <= 0xD7:
                stop += 1
            yield Block(place, stop, pixels=range(place, stop))
            place = stop
    yield Block(place, len(data), kind=range(place + 1, place + 2))


def _webp(data: bytes) -> Iterator[Block]:
    yield Block(0, 12, length=range(4, 8), kind=range(8, 12))
    place = 12
    while place < len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        stop = min(len(data), place + 8 + size + size % 2)
        # Within the frame of an animation the pixels have a header more.
        head = {b"VP8 ": 8, b"VP8L": 8, b"ANMF": 32}.get(data[place : place + 4])
        yield Block(
            place,
            stop,
            length=range(place + 4, place + 8),
            kind=range(place, place + 4),
            pixels=range(place + head, stop) if head else range(0),
        )
        place = stop


def _gif(data: bytes) -> Iterator[Block]:
    table = 3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0
    yield Block(0, 13 + table, length=range(6, 11), kind=range(6))
    place = 13 + table
    while data[place] != 0x3B:
        is_picture = data[place] == 0x2C
        head = 2
        if is_picture:
            head = 11 + (3 << (data[place + 9] & 7) + 1 if data[place + 9] & 0x80 else 0)
        yield Block(
            place, place + head, length=range(place + 5, place + 9), kind=range(place, place + 1)
        )
        place += head
        while size := data[place]:
            inside = range(place + 1, place + 1 + size) if is_picture else range(0)
            yield Block(place, place + 1 + size, length=range(place, place + 1), pixels=inside)
            place += 1 + size
        yield Block(place, place + 1)
        place += 1
    yield Block(place, len(data), kind=range(place, place + 1))


def _bmp(data: bytes) -> Iterator[Block]:
    start = int.from_bytes(data[10:14], "little")
    yield Block(0, 14, length=range(2, 14), kind=range(2))
    yield Block(14, start, length=range(14, 26), kind=range(28, 34))
    for place in range(start, len(data), 512):
        stop = min(place + 512, len(data))
        yield Block(place, stop, pixels=range(place, stop))


_READERS: dict[str, Callable[[bytes], Iterator[Block]]] = {
    "png": _png,
    "jpeg": _jpeg,
    "webp": _webp,
    "gif": _gif,
    "bmp": _bmp,
}
