"""What the user asked of a data set, and the sentences about what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass

from clipkit.errors import UserError

# What a folder or file may be, as every message about an unknown one says.
ACCEPTED = (
    "accepted are: a folder saved by datasets or with parquet files; pictures with"
    " metadata.csv, .jsonl or .parquet; name.jpg beside name.txt; one folder a class; a csv or tsv"
    " file with a column of paths; webdataset tar shards; the id of a data set on the hub"
)


class FileError(UserError):
    """A file cannot be read; `open_layout` puts the YAML key before the sentence."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Path and column names as the user wrote them, and the YAML key they were written under."""

    path: str
    image_column: str | None = None
    caption_column: str | None = None
    caption_template: str = "a photo of a {}."
    captions_required: bool = True
    option: str = "data.dataset"

    def __post_init__(self) -> None:
        if "{}" not in self.caption_template:
            raise UserError(
                f"{self.key('caption_template')} {self.caption_template!r} has no {{}} for the"
                " name of the class, as in 'a photo of a {}.'"
            )

    def key(self, name: str) -> str:
        """The YAML key of an option that stands beside the path's."""
        return f"{self.option.rpartition('.')[0]}.{name}".lstrip(".")

    def error(self, message: str) -> UserError:
        """A mistake in the data set: the key, the path and the sentence."""
        return UserError(f"{self.option} {self.path!r}: {message}")

    def no_column(self, what: str, columns: list[str]) -> UserError:
        """The column named under `image_column` or `caption_column` does not exist."""
        return UserError(
            f"{self.key(what)} {getattr(self, what)!r} is no column of {self.path!r}; the"
            f" columns are: {', '.join(columns) or 'none'}"
        )

    def caption_of(self, class_name: str) -> str:
        """The template filled with a class name."""
        return self.caption_template.replace("{}", class_name)
