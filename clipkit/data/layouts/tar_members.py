"""The members of a tar by their headers alone: a small read each, and no object is kept."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator

from clipkit.data.layouts.request import FileError

# gzip, bzip2, xz, zstandard
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"(\xb5/\xfd")
_BLOCK = tarfile.BLOCKSIZE
_NUMBER = re.compile(rb"[ \0]*([0-7]*)[ \0]*")


def members(file: str) -> Iterator[tuple[str, int, int]]:
    """Path, offset and size of every file within a tar.

    Raises:
        UserError: it is no tar, is compressed, cut off or damaged.
    """
    try:
        with open(file, "rb", buffering=0) as stream, tarfile.open(file, "r:") as archive:
            size_of_all = os.fstat(stream.fileno()).st_size
            # Opening has read the first header already.
            first = _next(archive, 0)
            if first is not None and first.isfile():
                yield first.name, first.offset_data, first.size
            start = archive.offset
            while True:
                stream.seek(start)
                header = stream.read(_BLOCK)
                plain = _plain_file(header)
                if plain is not None:
                    name, size = plain
                    yield name, start + _BLOCK, size
                    start += _BLOCK + -(-size // _BLOCK) * _BLOCK
                    if start > size_of_all:
                        raise tarfile.ReadError("unexpected end of data")
                    continue
                # Long names, links, folders and whatever else there is: tarfile knows them all.
                archive.offset = start
                member = _next(archive, start)
                if member is None:
                    break
                if member.isfile():
                    yield member.name, member.offset_data, member.size
                start = archive.offset
            stream.seek(archive.offset)
            # tarfile takes a damaged header for the end of the archive.
            if stream.read(_BLOCK).strip(b"\0"):
                raise tarfile.ReadError(f"damaged after {archive.offset} bytes")
    # What tarfile makes of headers that contradict themselves is not of its own kind.
    except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
        with open(file, "rb") as stream:
            begin = stream.read(4)
        reason = str(error)
        if begin.startswith(_COMPRESSED):
            reason = "it is compressed, so that nothing can be read by its position; unpack it"
        raise FileError(f"{file!r} cannot be read as tar: {reason}") from error


def _next(archive: tarfile.TarFile, start: int) -> tarfile.TarInfo | None:
    """The member that an archive is at; None at its end.

    Raises:
        ReadError: it ends before it begins, or its bytes are not all there one behind the other.
    """
    member = archive.next()
    archive.members = []  # type: ignore[attr-defined]  # it would keep all
    if member is None:
        return None
    # tarfile takes any number for a size, and would come by this member for ever.
    if member.size < 0 or archive.offset <= start:
        raise tarfile.ReadError(f"{member.name!r} is said to take {member.size:,} bytes")
    if member.issparse():
        raise tarfile.ReadError(f"{member.name!r} is kept sparse; pack it again without --sparse")
    return member


def _plain_file(header: bytes) -> tuple[str, int] | None:
    """Name and size where a header is that of an ordinary file of a short name."""
    # The kind of the member, and the first letter of what stands before a long name.
    if len(header) < _BLOCK or header[156] not in b"0\0" or header[345]:
        return None
    size, said = header[124:136], header[148:156]
    digits = _NUMBER.fullmatch(size)
    if digits is None:  # too large for octal digits, or no size at all
        return None
    try:
        if sum(header) - sum(said) + 8 * 32 != int(said.strip(b" \0"), 8):
            return None
        name = header[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
        is_file = name != "" and not name.endswith("/")
        return (name, int(digits[1] or b"0", 8)) if is_file else None
    except ValueError:
        return None
