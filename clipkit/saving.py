"""Checkpoint files that are whole or not there: written beside, then renamed; proved when read."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast
from zlib import crc32

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from clipkit.errors import UserError

LAST, BEFORE_LAST = "last.ckpt", "before_last.ckpt"
"""What a run goes on from, and what it had before."""


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint into a file of another name, to the disk, and then gives it its own.

    Whoever reads finds the old file or the new one, never half of one, whatever kills the writer.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                writer = _Writer(file)
                try:
                    torch.save(checkpoint, cast("IO[bytes]", writer))
                except RuntimeError as error:
                    # torch hides what the file said behind an assertion of its own.
                    raise writer.failure or error from error
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            _sync_folder(path.parent)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise NotSavedError(path, error) from error

    def load_checkpoint(self, path: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        if "://" not in str(path):
            refuse_damaged(path)
        loaded: dict[str, Any] = super().load_checkpoint(path, *arguments, **keywords)
        return loaded


class NotSavedError(UserError):
    """A checkpoint could not be written."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"checkpoint {path}: cannot be written ({error.strerror or error})")


class _Writer:
    """A file that remembers why it could not be written."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return int(self._file.write(content))
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self._file.flush()


def damage(path: str | Path) -> str | None:
    """Return what is wrong with a checkpoint file, by its own checksums; None where it is whole."""
    try:
        found = os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    return _damage(str(path), (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(maxsize=64)
def _damage(path: str, state: tuple[int, ...]) -> str | None:
    """Read all of a file, once for the state it is in: whoever chooses it, loads it next."""
    try:
        return _unlike_its_checksums(path)
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # zipfile and torch raise what they like at a damaged file
        return _said(error)


def _unlike_its_checksums(path: str) -> str | None:
    """Return what of a file torch reads otherwise than it was written."""
    with zipfile.ZipFile(path) as archive:
        written = archive.infolist()
        for record in written:  # whose name stands in two places
            archive.open(record).close()
    # torch's own reader, which goes by other fields than Python's, and looks at no checksum.
    reader = torch._C.PyTorchFileReader(path)
    top = written[0].filename.partition("/")[0] if written else ""
    if sorted(f"{top}/{name}" for name in reader.get_all_records()) != sorted(
        record.filename for record in written
    ):
        return "its list of records is not whole"
    for record in written:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            return f"the record {record.filename} is not as torch writes it"
        content = reader.get_record(record.filename.removeprefix(f"{top}/"))
        if len(content) != record.file_size or crc32(content) != record.CRC:
            return f"the record {record.filename} does not fit its checksum"
    return None


def _said(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return "it is cut short" if "not a zip file" in text else text or type(error).__name__


def refuse_damaged(path: str | Path) -> None:
    """Raise a UserError for a checkpoint that is not whole."""
    found = damage(path)
    if found is not None:
        raise UserError(f"checkpoint {path}: damaged, {found}")


def _sync_folder(folder: Path) -> None:
    # The name too is to survive a power cut; not every file system lets a folder be synced.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
