"""Where the fields of every sample of tar shards are.

A sample is the files of one folder whose names agree up to the first dot. Going through the headers
of large shards takes a while; the index is then kept in the cache, where it takes less than 1 % of
their size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipkit.data.array_file import ArrayFile, ArrayWriter, cache_folder, open_or_build
from clipkit.data.layouts.columns import readable, stem
from clipkit.data.layouts.request import FileError
from clipkit.data.layouts.tar_members import members
from clipkit.data.progress import progress
from clipkit.data.rows import file_stamp
from clipkit.errors import UserError

log = logging.getLogger(__name__)

_FORMAT = 1  # to be raised whenever the same shards would give another file
_WORTH_KEEPING = 4 << 30  # bytes of shards, which take some seconds
_MOST_OF_THE_DATA = 0.01


@dataclass(frozen=True)
class Samples:
    """The index of some tar files."""

    shards: list[str]
    names: pa.Array  # (N,) large strings, with folders
    shard: np.ndarray  # (N,) int32
    members: dict[str, np.ndarray]  # a field to offset and size (N, 2) int64; size -1: not there

    def __len__(self) -> int:
        return len(self.names)

    def name(self, position: int) -> str:
        """The name of a sample."""
        return str(self.names[position].as_py())

    def keys(self) -> pa.Array:
        """A key for every sample: its name, with as much before it as makes it the only one."""
        short = pc.replace_substring_regex(self.names, "(?s)^.*/", "")
        for names in (short, self.names):
            if pc.count_distinct(names).as_py() == len(names):
                return names
        stems = pa.array([stem(shard) for shard in self.shards], pa.large_string())
        return pc.binary_join_element_wise(
            stems.take(pa.array(self.shard)), self.names, pa.scalar("/", pa.large_string())
        )


def list_samples(shards: Sequence[str], folder: str | None = None) -> Samples:
    """The samples of some tar files, in the order of their first members.

    Args:
        shards: the files.
        folder: where the index of large ones is kept; the user's cache folder if None.

    Raises:
        UserError: a file that is no tar, is compressed or cut off, or repeats a member.
    """
    size = sum(os.path.getsize(shard) for shard in shards)
    if size < _WORTH_KEEPING:
        return _read(shards)
    path = cache_folder(folder) / f"shards-{_digest(shards)}.clipkit"
    found: Samples | None = None

    def build(writer: ArrayWriter) -> None:
        nonlocal found
        found = _read(shards)
        if _num_bytes(found) > _MOST_OF_THE_DATA * size:
            raise _TooLargeError
        _write(writer, found)

    try:
        file, built = open_or_build(path, build)
    except _TooLargeError:
        assert found is not None
        return found
    except UserError as error:
        if isinstance(error, FileError):
            raise
        log.info("data: the index of %d shards is not kept: %s", len(shards), error)
        return found or _read(shards)
    done = "now in" if built else "read from"
    log.info(f"data: index of {len(shards):,} shards: {done} {file.describe()}")
    return _of_file(file, shards)


class _TooLargeError(Exception):
    """The index of tiny samples, which is not worth its place."""


def _read(shards: Sequence[str]) -> Samples:
    names: list[pa.Array] = []
    fields: dict[str, dict[int, np.ndarray]] = {}
    numbered = progress(enumerate(shards), "listing tar files", len(shards), "file")
    for number, shard in numbered:
        of_shard, places = _read_shard(shard)
        names.append(pa.array(of_shard, pa.large_string()))
        for field, where in places.items():
            array = np.full((len(of_shard), 2), -1, np.int64)
            array[list(where)] = list(where.values())
            fields.setdefault(field, {})[number] = array
    counts = [len(part) for part in names]
    of_no_file = [np.full((count, 2), -1, np.int64) for count in counts]
    return Samples(
        list(shards),
        pa.concat_arrays(names) if names else pa.array([], pa.large_string()),
        np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        {
            field: np.concatenate([parts.get(n, of_no_file[n]) for n in range(len(counts))])
            for field, parts in fields.items()
        },
    )


def _read_shard(shard: str) -> tuple[list[str], dict[str, dict[int, tuple[int, int]]]]:
    """The names of a shard's samples, and of each field the samples that have it, and where."""
    seen: dict[str, int] = {}
    places: dict[str, dict[int, tuple[int, int]]] = {}
    for path, offset, size in members(shard):
        folder, file = os.path.split(path)
        name, _, field = file.partition(".")
        if not name or not field or "__MACOSX" in folder:
            continue
        number = seen.setdefault(readable(os.path.join(folder, name)), len(seen))
        of_field = places.setdefault(field.lower(), {})
        if of_field.setdefault(number, (offset, size)) != (offset, size):
            raise FileError(f"{shard!r} holds {path!r} twice")
    return list(seen), places


# --- The file ------------------------------------------------------------------------------------


def _digest(shards: Sequence[str]) -> str:
    digest = blake2b(repr(_FORMAT).encode(), digest_size=8)
    for shard in shards:
        digest.update(os.fsencode(os.path.realpath(shard)) + file_stamp(shard))
    return digest.hexdigest()


def _num_bytes(samples: Samples) -> int:
    return int(samples.names.nbytes) + sum(
        array.nbytes for array in (samples.shard, *samples.members.values())
    )


def _write(writer: ArrayWriter, samples: Samples) -> None:
    writer.append("shard", samples.shard.astype("<i4"))
    lengths = pc.binary_length(samples.names).to_numpy(zero_copy_only=False)
    writer.append("name_starts", np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"))
    writer.append("names", _bytes_of(samples.names))
    for field, array in samples.members.items():
        writer.append(f"member {field}", array.astype("<i8"))


def _of_file(file: ArrayFile, shards: Sequence[str]) -> Samples:
    starts = file["name_starts"]
    buffers = [None, pa.py_buffer(starts), pa.py_buffer(file["names"])]
    return Samples(
        list(shards),
        pa.Array.from_buffers(pa.large_string(), len(starts) - 1, buffers),
        file["shard"],
        {field: file[name].reshape(-1, 2) for field, name in _fields(file)},
    )


def _fields(file: ArrayFile) -> Iterator[tuple[str, str]]:
    for name in file.names():
        kind, _, field = name.partition(" ")
        if kind == "member":
            yield field, name


def _bytes_of(strings: pa.Array) -> np.ndarray:
    _, offsets, content = strings.buffers()
    bounds = np.frombuffer(offsets, np.int64)[strings.offset :][: len(strings) + 1]
    if content is None:
        return np.zeros(0, np.uint8)
    return np.frombuffer(content, np.uint8)[bounds[0] : bounds[-1]]
