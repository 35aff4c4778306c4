"""Which rows and captions are trained on: rules that need no picture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import numpy as np

from clipkit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from clipkit.data.rows import StoredRows

WIDTH_COLUMNS = ("width", "original_width", "image_width", "img_width", "w")
HEIGHT_COLUMNS = ("height", "original_height", "image_height", "img_height", "h")
LANGUAGE_COLUMNS = ("language", "lang", "languages", "language_code")


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What a training row has to be; all bounds are inclusive, what is left out is not asked.

    Captions that do not fit are dropped, and rows of which none is left. A row that does not say
    what is asked of it (no width, no score) is left out.

    Args:
        min_characters: of a caption.
        max_characters: of a caption.
        min_words: of a caption.
        max_words: of a caption.
        min_side: pixels of the shorter side, by the columns of width and height.
        max_aspect_ratio: of the longer side to the shorter, by these columns.
        width_column: found by its name where left out: `width`, `original_width` and the like.
        height_column: found by its name where left out.
        languages: which languages a row may be of, such as `[en, de]`.
        language_column: found by its name where left out: `language`, `lang`.
        columns: ranges of columns of numbers, such as `{clip_score: [0.28, null]}`.
    """

    min_characters: int | None = None
    max_characters: int | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_side: int | None = None
    max_aspect_ratio: float | None = None
    width_column: str | None = None
    height_column: str | None = None
    languages: list[str] | None = None
    language_column: str | None = None
    columns: dict[str, tuple[float | None, float | None]] | None = None


class Kept(NamedTuple):
    """What filters have left of some rows."""

    rows: StoredRows
    removed: dict[str, int]  # by the filter
    total: int

    def describe(self) -> str:
        """Return how many rows each filter has removed; empty without filters."""
        if not self.removed:
            return ""
        each = ", ".join(f"{name} {number:,}" for name, number in self.removed.items() if number)
        left_out = f"{self.total - len(self.rows):,} of {self.total:,} training rows"
        return f"; filters leave out {left_out}" + (f" ({each})" if each else "")


def filtered(rows: StoredRows, filters: Filters | None, *, option: str) -> Kept:
    """Return the rows that fit; a row that several filters would remove is counted at the first.

    Args:
        rows: of training.
        filters: what they have to be.
        option: the YAML key of the filters, for messages.

    Raises:
        UserError: a column is missing, a bound is no bound, or nothing is left.
    """
    removed: dict[str, int] = {}
    total = len(rows)
    if filters is None:
        return Kept(rows, removed, total)
    fits = np.ones(total, bool)
    asked = _Asked(rows, filters, option)
    for name, fitting in asked.of_rows():
        removed[name] = int((fits & ~fitting).sum())
        fits &= fitting
    rows = rows if fits.all() else rows.select(np.flatnonzero(fits))
    for name, of_captions in asked.of_captions():
        rows = rows.fitting(of_captions)
        there = rows.have_captions()
        removed[name] = int((~there).sum())
        rows = rows if there.all() else rows.select(np.flatnonzero(there))
    if not len(rows):
        most = max(removed, key=removed.__getitem__)
        raise UserError(
            f"{option}: no training row of {total:,} is left; {most} removed most of them, "
            f"{removed[most]:,}"
        )
    return Kept(rows, removed, total)


class RowFilters:
    """Filters of rows that are looked at some at a time.

    Args:
        filters: what the rows have to be.
        option: the YAML key of the filters, for messages.
    """

    def __init__(self, filters: Filters, *, option: str) -> None:
        self._filters = filters
        self._option = option

    @property
    def digest(self) -> int:
        """A number that changes with the filters."""
        return crc32(repr(self._filters).encode())

    def check(self, rows: StoredRows) -> None:
        """Look at some rows for whether all rows can be.

        Raises:
            UserError: a column is missing, or a bound is no bound.
        """
        asked = _Asked(rows, self._filters, self._option)
        for _ in (*asked.of_rows(), *asked.of_captions()):
            pass

    def left(self, rows: StoredRows) -> list[CaptionsLeft | None]:
        """What is left of the captions of each row; None where the row is left out."""
        asked = _Asked(rows, self._filters, self._option)
        fits = np.ones(len(rows), bool)
        try:
            for _, fitting in asked.of_rows():
                fits &= fitting
        except UserError:  # none of them says what is asked
            return [None] * len(rows)
        rules = [rule for _, rule in asked.of_captions()]
        return [_left(rows, row, rules) if fits[row] else None for row in range(len(rows))]


class CaptionsLeft(NamedTuple):
    """The captions of a row that fit, and how many of them each of several columns gave."""

    texts: list[str]
    counts: np.ndarray | None


def _left(
    rows: StoredRows, row: int, rules: list[Callable[[pa.Array], np.ndarray]]
) -> CaptionsLeft | None:
    import pyarrow as pa

    texts, counts = rows.captions(row), rows.caption_counts(row)
    column = None if counts is None else np.repeat(np.arange(len(counts)), counts)
    for rule in rules if texts else ():
        fits = np.flatnonzero(rule(pa.array(texts, pa.string())))
        texts = [texts[place] for place in fits]
        column = None if column is None else column[fits]
    if rules and not texts:
        return None
    if counts is not None and column is not None:
        counts = np.bincount(column, minlength=len(counts))
    return CaptionsLeft(texts, counts)


class _Asked:
    """The filters that are asked for, by their names."""

    def __init__(self, rows: StoredRows, filters: Filters, option: str) -> None:
        self.rows = rows
        self.filters = filters
        self.option = option

    def of_rows(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield which rows fit each filter that looks at columns."""
        with self.rows.together(self._columns()):
            yield from self._of_columns()

    def _of_columns(self) -> Iterator[tuple[str, np.ndarray]]:
        filters = self.filters
        for name, bounds in (filters.columns or {}).items():
            low, high = self._range(f"columns.{name}", bounds)
            values = self._numbers(name, f"columns.{name}")
            yield name, (values >= low) & (values <= high)
        if filters.languages is not None:
            yield "languages", self._of_languages(filters.languages)
        if filters.min_side is not None or filters.max_aspect_ratio is not None:
            least, ratio = self._sides()
            if filters.min_side is not None:
                yield "min_side", least >= self._positive("min_side", filters.min_side)
            if filters.max_aspect_ratio is not None:
                most = self._positive("max_aspect_ratio", filters.max_aspect_ratio, least=1)
                yield "max_aspect_ratio", ratio <= most

    def of_captions(self) -> Iterator[tuple[str, Callable[[pa.Array], np.ndarray]]]:
        """Yield which captions fit each filter that looks at them."""
        for what, count in (("characters", _characters), ("words", _words)):
            bounds = [getattr(self.filters, f"{side}_{what}") for side in ("min", "max")]
            if any(bound is not None for bound in bounds):
                yield what, _within(count, *self._range(f"min_{what}", bounds))

    def _of_languages(self, languages: list[str]) -> np.ndarray:
        if not languages:
            raise UserError(f"{self.option}.languages: [] names no language")
        name = self._column("language_column", LANGUAGE_COLUMNS, needed_by="languages")
        wanted = {language.lower() for language in languages}
        cells = self.rows.column(name)
        return np.array([isinstance(c, str) and c.strip().lower() in wanted for c in cells], bool)

    def _sides(self) -> tuple[np.ndarray, np.ndarray]:
        """The shorter side of every picture, and how many times as long the longer one is."""
        asked = "min_side" if self.filters.min_side is not None else "max_aspect_ratio"
        sides = []
        for option, names in (("width_column", WIDTH_COLUMNS), ("height_column", HEIGHT_COLUMNS)):
            values = self._numbers(self._column(option, names, needed_by=asked), option)
            sides.append(np.where(values > 0, values, np.nan))
        width, height = sides
        return np.minimum(width, height), np.maximum(width, height) / np.minimum(width, height)

    def _columns(self) -> list[str]:
        """The columns that may be looked at, as far as they are there."""
        from clipkit.data.layouts.columns import find

        filters, there = self.filters, self.rows.columns
        names = [
            *(filters.columns or {}),
            filters.width_column or find(there, WIDTH_COLUMNS),
            filters.height_column or find(there, HEIGHT_COLUMNS),
            filters.language_column or find(there, LANGUAGE_COLUMNS),
        ]
        return [name for name in names if name in there]

    def _column(self, option: str, names: tuple[str, ...], *, needed_by: str) -> str:
        from clipkit.data.layouts.columns import find

        name: str | None = getattr(self.filters, option)
        if name is not None and name not in self.rows.columns:
            raise self._no_column(option, name)
        name = name or find(self.rows.columns, names)
        if name is None:
            raise UserError(
                f"{self.option}.{needed_by}: the data has no column {names[0]!r} or the like; name "
                f"it with {self.option}.{option}, one of: {self._names()}"
            )
        return name

    def _numbers(self, name: str, option: str) -> np.ndarray:
        """The numbers (N,) of a column, nan where there is none."""
        if name not in self.rows.columns:
            raise self._no_column(option, name)
        values = self.rows.cells(name)
        try:
            numbers: np.ndarray = values.cast("float64").to_numpy()
            return numbers
        except (ValueError, NotImplementedError):  # also pyarrow's own
            return np.array([_number(cell) for cell in values.to_pylist()], np.float64)

    def _range(self, name: str, bounds: Any) -> tuple[float, float]:
        low, high = bounds
        low, high = (-np.inf if low is None else low), (np.inf if high is None else high)
        if not low <= high:
            raise UserError(f"{self.option}.{name}: nothing lies from {low:g} to {high:g}")
        return low, high

    def _positive(self, name: str, bound: float, least: float = 0) -> float:
        if not bound >= least:
            raise UserError(f"{self.option}.{name}: {bound:g} is less than {least:g}")
        return bound

    def _no_column(self, option: str, name: str) -> UserError:
        return UserError(
            f"{self.option}.{option}: {name!r} is no column of the data; the columns are: "
            f"{self._names()}"
        )

    def _names(self) -> str:
        return ", ".join(self.rows.columns) or "none"


def _within(
    count: Callable[[pa.Array], np.ndarray], low: float, high: float
) -> Callable[[pa.Array], np.ndarray]:
    def fits(texts: pa.Array) -> np.ndarray:
        counts = count(texts)
        within: np.ndarray = (counts >= low) & (counts <= high)
        return within

    return fits


def _characters(texts: pa.Array) -> np.ndarray:
    import pyarrow.compute as pc

    counts: np.ndarray = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
    return counts


def _words(texts: pa.Array) -> np.ndarray:
    import pyarrow.compute as pc

    words = pc.list_value_length(pc.utf8_split_whitespace(texts))
    counts: np.ndarray = words.to_numpy(zero_copy_only=False)
    return counts


def _number(cell: object) -> float:
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return np.nan
