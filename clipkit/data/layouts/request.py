"""What the user asked of a data set, and the sentences about what is wrong with it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa

from clipkit.errors import UserError

# What a folder or file may be, as every message about an unknown one says.
ACCEPTED = (
    "accepted are: a folder saved by datasets or with parquet files; pictures with"
    " metadata.csv, .jsonl or .parquet; name.jpg beside name.txt; one folder a class; a csv or tsv"
    " file with a column of paths; webdataset tar shards; the id of a data set on the hub"
)


# What libraries raise where a file of unknown origin holds what nobody thought of.
_MISREAD = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError),
    pa.ArrowException,
)


class FileError(UserError):
    """A file cannot be read; `open_layout` puts the YAML key before the sentence."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Path and column names as the user wrote them, and the YAML key they were written under."""

    path: str
    image_column: str | None = None
    caption_column: str | dict[str, float] | None = None
    negative_column: str | None = None
    caption_template: str = "a photo of a {}."
    captions_required: bool = True
    image_folder: str | None = None
    cache_folder: str | None = None
    option: str = "data.dataset"

    def __post_init__(self) -> None:
        if "{}" not in self.caption_template:
            raise UserError(
                f"{self.key('caption_template')} {self.caption_template!r} has no {{}} for the"
                " name of the class, as in 'a photo of a {}.'"
            )
        if self.image_folder is not None and not os.path.isdir(self.image_folder):
            raise UserError(f"{self.key('image_folder')} {self.image_folder!r} is no folder")

    def key(self, name: str) -> str:
        """The YAML key of an option that stands beside the path's."""
        return f"{self.option.rpartition('.')[0]}.{name}".lstrip(".")

    def error(self, message: str) -> UserError:
        """A mistake in the data set: the key, the path and the sentence."""
        return UserError(f"{self.option} {self.path!r}: {message}")

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Whatever a file inside makes fail becomes a sentence.

        Raises:
            UserError: a file cannot be read, or does not hold what it should.
        """
        try:
            yield
        except FileError as error:
            raise self.error(str(error)) from error
        except UserError:
            raise
        except OSError as error:
            raise self.error(f"cannot be read ({error})") from error
        except _MISREAD as error:
            reason = next(iter(str(error).splitlines()), "")[:200]
            raise self.error(f"cannot be read ({type(error).__name__}: {reason})") from error

    def no_column(self, what: str, columns: list[str], name: str | None = None) -> UserError:
        """The column named under an option, its value where no name is given, does not exist."""
        return UserError(
            f"{self.key(what)} {name or getattr(self, what)!r} is no column of {self.path!r}; the"
            f" columns are: {', '.join(columns) or 'none'}"
        )

    def caption_of(self, class_name: str) -> str:
        """The template filled with a class name."""
        return self.caption_template.replace("{}", class_name)

    def pictures_beside(self, file: str) -> PictureFolder:
        """The folder of the pictures that a file names: the one asked for, or the file's own."""
        folder = self.image_folder or os.path.dirname(file)
        return PictureFolder(folder, file=file, option=self.key("image_folder"))


class PictureFolder:
    """The folder that paths of pictures are relative to, and may not leave but by its own links.

    Args:
        folder: its path.
        file: what names the pictures.
        option: the YAML key of another folder, for messages.
    """

    def __init__(self, folder: str, *, file: str, option: str) -> None:
        self.path = os.path.abspath(folder)  # a worker may run in another folder
        self._file = file
        self._option = option

    def file(self, path: str) -> str:
        """The whole path of a picture.

        Raises:
            UserError: it lies outside.
        """
        whole = _inside(self.path, path)
        if whole is None:
            raise FileError(
                f"{os.path.basename(self._file)} names {path!r}, which lies outside of"
                f" {self.path!r}, where it may name pictures; name the folder that holds them all"
                f" with {self._option}"
            )
        return whole

    def within(self, paths: Iterable[str]) -> list[str]:
        """Paths of pictures, relative to the folder where a plain join would leave it or not.

        Raises:
            UserError: one lies outside.
        """
        return [
            os.path.relpath(self.file(path), self.path) if _may_leave(path) else path
            for path in map(self._without_null, paths)
        ]

    def _without_null(self, path: str) -> str:
        if "\0" in path:
            name = os.path.basename(self._file)
            raise FileError(f"{name} names {path[:100]!r}, which no file can be called")
        return path


def named_file(folder: str, path: str, *, by: str) -> str:
    """The path, relative to a data set's folder, of what a file of it names; a pattern, maybe.

    Args:
        folder: of the data set.
        path: relative to it, as it is written.
        by: the name of the file that it is written in.

    Raises:
        UserError: it lies outside.
    """
    folder = os.path.abspath(folder)
    whole = _inside(folder, path)
    if whole is None:
        raise FileError(f"{by} names {path!r}, which lies outside of {folder!r}")
    return os.path.relpath(whole, folder)


def _inside(folder: str, path: str) -> str | None:
    """The whole path of a file within a folder; None where it leads out, but by a link of its."""
    # `..` is taken as it is written: behind a link it would lead elsewhere.
    whole = os.path.normpath(os.path.join(folder, path))
    return whole if whole.startswith(os.path.join(folder, "")) else None


def _may_leave(path: str) -> bool:
    return ".." in path or os.path.isabs(path)
