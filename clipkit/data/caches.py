"""What of a data module's work is kept on disk, and where."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.data.array_file import cache_folder
from clipkit.data.cached_tokens import CachedTokens, cached_tokens
from clipkit.data.prepared_pictures import Prepare, PreparedPictures, kept_pictures
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer

if TYPE_CHECKING:
    from clipkit.data.rows import Rows

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caches:
    """The caches of a data module; they change how long a batch takes, never what is in it.

    Args:
        tokens: whether the tokens of all captions are kept.
        pictures_gb: what the prepared pictures of a split may take, in 1e9 bytes; 0 for none.
        folder: where the files belong; the user's cache folder if None.
    """

    tokens: bool
    pictures_gb: float
    folder: str | None

    def __post_init__(self) -> None:
        if not 0 <= self.pictures_gb < float("inf"):
            raise UserError(
                f"data.cache_pictures_gb: {self.pictures_gb} is no number of gigabytes from 0 on"
            )

    def __bool__(self) -> bool:
        return self.tokens or self.pictures_gb > 0

    def tokens_of(self, rows: Rows, tokenizer: Tokenizer, *, split: str) -> CachedTokens | None:
        """Return the tokens of all captions, if they are to be kept."""
        return cached_tokens(rows, tokenizer, self._folder(), split=split) if self.tokens else None

    def pictures_of(self, rows: Rows, prepare: Prepare, *, split: str) -> PreparedPictures:
        """Return the prepared pictures, kept as far as they may be."""
        pictures = rows.pictures_digest() if self.pictures_gb else None
        if pictures is None:
            if self.pictures_gb:
                log.info("data: the pictures of %s are made, not read; none is kept", split)
            return PreparedPictures(rows, prepare)
        return kept_pictures(
            rows,
            prepare,
            self._folder(),
            pictures=pictures,
            max_bytes=int(self.pictures_gb * 1e9),
            split=split,
        )

    def _folder(self) -> Path:
        return cache_folder(self.folder)
