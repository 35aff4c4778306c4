"""Which column is the caption, which the picture, and what identifies a picture."""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipkit.data.layouts.fields import Field, locate, texts_of_field, texts_of_json
from clipkit.data.layouts.request import Request
from clipkit.data.rows import BLOCK, Picture, Source, caption_list, is_list, trimmed
from clipkit.errors import named

# Searched in this order, whatever the case of the letters.
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "txt", "title", "sentence", "sentences"),
    *("description", "descriptions", "comment", "alt_text", "alttext", "alt", "prompt"),
)
# Names of a class rather than sentences: the template makes a caption of them.
CLASS_COLUMNS = ("label", "class", "class_name", "classname", "category", "cls", "fine_label")
IMAGE_COLUMNS = (
    *("image", "images", "img", "picture", "photo", "jpg", "jpeg", "png", "webp"),
    *("file_name", "filename", "file", "filepath", "file_path", "path"),
    *("image_path", "img_path", "image_file", "image_name", "image_filename"),
)
KEY_COLUMNS = ("__key__", "key", "id", "image_id", "img_id", "filename", "file_name")


def find(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of the names that is a column, as the column spells it."""
    spelled = {column.strip().lower(): column for column in reversed(columns)}
    return next((spelled[name] for name in names if name in spelled), None)


def choose_captions(request: Request, source: Source) -> list[list[str]]:
    """What captions come from: one column, several numbered ones, or none, as one group.

    Where the request weighs columns, a group for each weight.

    Raises:
        UserError: a column named in YAML does not exist, or none is found and one is required.
    """
    wanted = request.caption_column
    if isinstance(wanted, dict):
        return [named_columns(request, source, "caption_column", name) for name in wanted]
    if wanted is not None:
        return [named_columns(request, source, "caption_column", wanted)]
    found = _find_captions(request, source)
    return [found] if found else []


def named_columns(request: Request, source: Source, option: str, name: str) -> list[str]:
    """The columns that a name, a pattern or a place within objects stands for.

    Raises:
        UserError: there is none.
    """
    if name in source.columns:
        return [name]
    # A pattern takes several: 'caption_*' where each of five captions has its own column.
    chosen = [column for column in source.columns if fnmatch.fnmatchcase(column, name)]
    if not chosen and locate(source, name) is None:
        raise request.no_column(option, source.columns, name)
    return chosen or [name]


def _find_captions(request: Request, source: Source) -> list[str]:
    columns = source.columns
    if column := find(columns, CAPTION_COLUMNS):
        return [column]
    numbered = [column for column in columns if re.fullmatch(r"(?i)captions?[_-]?\d+", column)]
    if numbered:
        return numbered
    if column := find(columns, CLASS_COLUMNS):
        return [column]
    if len(columns) == 1 and _is_text_column(source.column(columns[0]).type):
        return [columns[0]]  # nothing else stands beside the picture
    if request.captions_required:
        raise request.error(
            f"no caption column was found; name it with {request.key('caption_column')}, one of:"
            f" {', '.join(columns) or 'none'}"
        )
    return []


def read_captions(request: Request, source: Source, columns: Sequence[str]) -> pa.Array:
    """Captions of every row (N): strings, or lists of strings.

    Raises:
        UserError: a column that holds no text.
    """
    if not columns:
        return pa.nulls(len(source), pa.string())
    texts = [_texts(request, source, column) for column in columns]
    return texts[0] if len(texts) == 1 else _side_by_side(texts)[0]


def read_weighed_captions(
    request: Request, source: Source, groups: Sequence[Sequence[str]]
) -> tuple[pa.Array, np.ndarray]:
    """Captions of every row (N), as lists, and how many each group of columns gave (N, C).

    Raises:
        UserError: a column that holds no text.
    """
    return _side_by_side([read_captions(request, source, columns) for columns in groups])


def _side_by_side(texts: Sequence[pa.Array]) -> tuple[pa.Array, np.ndarray]:
    """The captions of several columns as one list a row, and how many each gave (N, C)."""
    lists, counts = [], []
    for start in range(0, max(len(texts[0]), 1), BLOCK):
        columns = [map(caption_list, array.slice(start, BLOCK).to_pylist()) for array in texts]
        cells = list(zip(*columns, strict=True))
        flat = [[text for cell in row for text in cell] for row in cells]
        lists.append(pa.array(flat, pa.list_(pa.string())))
        sizes = [[len(cell) for cell in row] for row in cells]
        counts.append(np.array(sizes, np.int32).reshape(len(cells), len(texts)))
    return pa.concat_arrays(lists), np.concatenate(counts)


def holds_classes(source: Source, column: str) -> bool:
    """Whether a column names classes, which only the template makes captions of."""
    return column.strip().lower() in CLASS_COLUMNS or bool(source.class_names(column))


def without_caption(captions: pa.Array) -> np.ndarray:
    """Positions (K,) of the rows that have no caption, or none but blanks."""
    empty = [np.zeros(0, np.int64)]
    for start in range(0, len(captions), BLOCK):
        counts, _ = trimmed(captions.slice(start, BLOCK))
        empty.append(np.flatnonzero(counts == 0) + start)
    return np.concatenate(empty)


def class_words(name: str) -> str:
    """A class's folder or label as words: underscores are spaces."""
    return " ".join(name.replace("_", " ").split())


def keys_of_paths(paths: Sequence[str]) -> pa.Array:
    """A key for every path (N): the file's stem where stems tell the files apart, else its path.

    Spelled in one Unicode form, as file systems differ in it.
    """
    paths = [readable(path) for path in paths]
    stems = [stem(path) for path in paths]
    return pa.array(stems if len(set(stems)) == len(set(paths)) else paths, pa.string())


def keys_of_rows(source: Source, image_paths: pa.ChunkedArray | None = None) -> pa.Array:
    """A key for every row (N) of a table that holds the pictures themselves.

    The first of these that never stands for two pictures of different size: the stem of the path
    kept with the picture, that path, a column such as `id`; where none is, a hash of the picture.
    """
    if image_paths is not None and not image_paths.null_count:
        paths = _readable_texts(image_paths)
        for keys in (_stems(paths), paths):
            if _identify(keys, source):
                return keys
    for name in KEY_COLUMNS:
        column = find(source.columns, [name])
        values = None if column is None else source.column(column)
        if values is None or values.null_count or not _may_be_key(values.type):
            continue
        keys = _readable_texts(values)
        if _identify(keys, source):
            return keys
    hashes = (_picture_hash(picture) for picture in source.images())
    return pa.array(hashes, pa.string())


def lines_of(text: str) -> list[str]:
    """The lines of a text file; unlike `splitlines`, which breaks at rare separators too."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def stem(path: str) -> str:
    """A file's name without folders and extension."""
    return os.path.splitext(os.path.basename(path))[0]


def readable(name: str) -> str:
    """A file's name as valid, composed Unicode."""
    if name.isascii():
        return name
    return unicodedata.normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))


def _identify(keys: pa.Array, source: Source) -> bool:
    """Whether no key is empty or stands for pictures of two sizes.

    Only the pictures of keys that repeat are looked at.
    """
    if pc.any(pc.equal(keys, "")).as_py():
        return False
    # The dictionary is let go at once: it is as large as the keys.
    number = keys.dictionary_encode().indices.to_numpy()
    repeated = np.flatnonzero(np.bincount(number)[number] > 1)
    if not len(repeated):
        return True
    sizes = source.image_sizes(repeated)
    size_of = np.zeros(number.max() + 1, np.int64)
    size_of[number[repeated]] = sizes  # the last one's
    return bool((size_of[number[repeated]] == sizes).all())


def _may_be_key(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return _is_text(kind) or bool(pa.types.is_integer(kind))


def _readable_texts(values: pa.ChunkedArray) -> pa.Array:
    """Names or numbers as `readable` texts (N)."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    texts = in_one(values.cast(pa.large_string()))
    if pc.all(pc.string_is_ascii(texts)).as_py() is not False:
        return texts
    return pa.array([readable(text) for text in texts.to_pylist()], pa.large_string())


def _stems(paths: pa.Array) -> pa.Array:
    """What `stem` gives for each path."""
    names = pc.replace_substring_regex(paths, "(?s)^.*/", "")
    return pc.replace_substring_regex(names, r"(?s)^(.*[^.].*)\.[^.]*$", r"\1")


def in_one(values: pa.ChunkedArray) -> pa.Array:
    """A column of large texts as one array."""
    return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)


def _picture_hash(image: Picture) -> str:
    assert isinstance(image, bytes | str)  # no layout holds decoded pictures
    content = image if isinstance(image, bytes) else os.fsencode(image)
    return blake2b(content, digest_size=12).hexdigest()


def _texts(request: Request, source: Source, name: str) -> pa.Array:
    column, path = locate(source, name) or Field(name)
    values = source.column(column)
    values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    kind = values.type
    if path:
        return texts_of_field(values, path)
    names = source.class_names(column)
    if names and pa.types.is_integer(kind):
        captions = pa.array([request.caption_of(class_words(name)) for name in names], pa.string())
        known = pc.and_(pc.greater_equal(values, 0), pc.less(values, len(names)))
        return captions.take(pc.if_else(known, values, pa.scalar(None, kind)))
    if pa.types.is_dictionary(kind):
        values, kind = values.dictionary_decode(), kind.value_type
    if _is_text(kind):
        if holds_classes(source, column):
            cells = [cell and class_words(cell) for cell in values.to_pylist()]
            return pa.array([cell and request.caption_of(cell) for cell in cells], pa.string())
        within = texts_of_json(values)
        return values if within is None else within
    if is_list(kind) and _is_text(kind.value_type):
        return values
    if pa.types.is_null(kind):
        return values.cast(pa.string())
    if request.caption_column is None and not request.captions_required:
        return pa.nulls(len(source), pa.string())
    text = [name for name in source.columns if _is_text_column(source.column(name).type)]
    raise request.error(
        f"column {column!r} holds {kind}, not captions; name a column of text with"
        f" {request.key('caption_column')}, one of: {named(text, 20) or 'none'}"
    )


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_text_column(kind: pa.DataType) -> bool:
    return _is_text(getattr(kind, "value_type", kind))
