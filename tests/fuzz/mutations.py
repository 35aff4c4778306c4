"""Ways in which a picture's file comes to harm, each a function of it and of random numbers."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from typing import NamedTuple

from tests.fuzz.blocks import Block, blocks_of


class Victim(NamedTuple):
    """A whole file, its blocks, and another file of its format."""

    form: str
    data: bytes
    blocks: list[Block]
    other: bytes

    @classmethod
    def of(cls, form: str, data: bytes, other: bytes) -> Victim:
        return cls(form, data, blocks_of(data, form), other)


def flipped_bits(victim: Victim, rng: random.Random) -> bytes:
    return _flip(victim.data, range(len(victim.data)), rng.choice((1, 1, 2, 8, 64)), rng)


def flipped_pixel_bit(victim: Victim, rng: random.Random) -> bytes:
    block = rng.choice([block for block in victim.blocks if block.pixels])
    return _flip(victim.data, block.pixels, 1, rng)


def overwritten_bytes(victim: Victim, rng: random.Random) -> bytes:
    broken = bytearray(victim.data)
    size = rng.choice((1, 4, 64, 512))
    start = rng.randrange(len(broken))
    run = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    broken[start : start + size] = run[: len(broken) - start]
    return bytes(broken)


def removed_bytes(victim: Victim, rng: random.Random) -> bytes:
    start = rng.randrange(len(victim.data))
    return victim.data[:start] + victim.data[start + rng.choice((1, 2, 16, 512)) :]


def inserted_bytes(victim: Victim, rng: random.Random) -> bytes:
    start = rng.randrange(len(victim.data))
    return victim.data[:start] + rng.randbytes(rng.choice((1, 2, 16, 512))) + victim.data[start:]


def cut_off(victim: Victim, rng: random.Random) -> bytes:
    return victim.data[: rng.randrange(len(victim.data))]


def cut_off_and_closed(victim: Victim, rng: random.Random) -> bytes:
    last = victim.blocks[-1]
    start = rng.randrange(len(victim.data) - 1)
    return victim.data[:start] + victim.data[last.start : last.stop]


def removed_block(victim: Victim, rng: random.Random) -> bytes:
    block = rng.choice(victim.blocks)
    return victim.data[: block.start] + victim.data[block.stop :]


def doubled_block(victim: Victim, rng: random.Random) -> bytes:
    block = rng.choice(victim.blocks)
    return victim.data[: block.stop] + victim.data[block.start :]


def exchanged_blocks(victim: Victim, rng: random.Random) -> bytes:
    order = list(victim.blocks)
    first, second = rng.sample(range(len(order)), 2)
    order[first], order[second] = order[second], order[first]
    return b"".join(victim.data[block.start : block.stop] for block in order)


def changed_length(victim: Victim, rng: random.Random) -> bytes:
    field = rng.choice([block.length for block in victim.blocks if block.length])
    return _overwrite(victim.data, field, rng)


def changed_kind(victim: Victim, rng: random.Random) -> bytes:
    field = rng.choice([block.kind for block in victim.blocks if block.kind])
    if rng.random() < 0.5:  # the kind of another block
        like = [block.kind for block in victim.blocks if len(block.kind) == len(field)]
        other = rng.choice(like)
        broken = bytearray(victim.data)
        broken[field.start : field.stop] = victim.data[other.start : other.stop]
        return bytes(broken)
    return _overwrite(victim.data, field, rng)


def spliced(victim: Victim, rng: random.Random) -> bytes:
    head, tail = rng.randrange(len(victim.data)), rng.randrange(len(victim.other))
    return victim.data[:head] + victim.other[tail:]


def spliced_blocks(victim: Victim, rng: random.Random) -> bytes:
    head, tail = rng.choice(victim.blocks), rng.choice(blocks_of(victim.other, victim.form))
    return victim.data[: head.start] + victim.other[tail.start :]


def mended_checksum(victim: Victim, rng: random.Random) -> bytes:
    """Damage that somebody hid: a chunk's checksum is right again."""
    block = rng.choice([block for block in victim.blocks if block.stop - block.start > 12])
    inside = range(block.start + 8, block.stop - 4)
    broken = bytearray(_flip(victim.data, inside, 1, rng))
    checksum = zlib.crc32(broken[block.start + 4 : block.stop - 4])
    broken[block.stop - 4 : block.stop] = checksum.to_bytes(4, "big")
    return bytes(broken)


def _flip(data: bytes, within: range, number: int, rng: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(number):
        broken[rng.choice(within)] ^= 1 << rng.randrange(8)
    return bytes(broken)


def _overwrite(data: bytes, field: range, rng: random.Random) -> bytes:
    broken = bytearray(data)
    size = rng.randint(1, len(field))
    start = rng.randint(field.start, field.stop - size)
    broken[start : start + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return bytes(broken)


MUTATIONS: tuple[Callable[[Victim, random.Random], bytes], ...] = (
    flipped_bits,
    flipped_pixel_bit,
    overwritten_bytes,
    removed_bytes,
    inserted_bytes,
    cut_off,
    cut_off_and_closed,
    removed_block,
    doubled_block,
    exchanged_blocks,
    changed_length,
    changed_kind,
    spliced,
    spliced_blocks,
)


def mutate(victim: Victim, number: int, seed: int) -> tuple[str, bytes]:
    """Return the name of a mutation and the file after it: the same ones for the same numbers."""
    rng = random.Random(f"{seed} {number}")
    choices = MUTATIONS + ((mended_checksum,) if victim.form == "png" else ())
    mutation = rng.choice(choices)
    return mutation.__name__.replace("_", " "), mutation(victim, rng)
