"""Tables that hold the pictures: parquet and arrow files, folders saved by `datasets`.

Read with pyarrow alone: `datasets` would copy into its cache and drop what does not fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.data.layouts.assembly import Found, Part, assemble
from clipkit.data.layouts.columns import IMAGE_COLUMNS, find, keys_of_rows
from clipkit.data.layouts.fields import storable
from clipkit.data.layouts.listing import in_order, split_name, suffix
from clipkit.data.layouts.manifests import listed_parts
from clipkit.data.layouts.parquet_column import BinaryColumn
from clipkit.data.layouts.parquet_pages import DamagedPageError
from clipkit.data.layouts.request import FileError, PictureFolder, Request, named_file
from clipkit.data.picture_files import ImageDecodeError
from clipkit.data.progress import progress
from clipkit.data.rows import Source, file_size, file_stamp

# pyarrow raises whatever its parts do, among them errors of Unicode, which are of values.
_UNREADABLE = (pa.ArrowException, OSError, ValueError)

TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".feather"})


class Column(Protocol):
    """Byte strings by row."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> bytes | None: ...

    def __iter__(self) -> Iterator[bytes | None]: ...

    def null_rows(self) -> np.ndarray:
        """Which rows (K,) are null."""

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Bytes of the values of some rows (K,) int64, -1 for null."""


class TableSource(Source):
    """Rows of parquet or arrow files, pictures included; a column is read when it is asked for.

    Pictures stay in the files: of parquet a page is read, arrow files are mapped.

    Args:
        files: of one kind.
        image_column: a column of byte strings, or of structs with `bytes` and maybe `path`.
        folder: what paths kept with the pictures are relative to.
    """

    def __init__(self, files: Sequence[str], image_column: str, folder: PictureFolder) -> None:
        self._files = [os.path.abspath(file) for file in files]
        self._image_column = image_column
        self._folder = folder
        schema = read_schema(self._files[0])
        self._features = features_of(schema)
        self.columns = [name for name in schema.names if name != image_column]
        kind = schema.field(image_column).type
        fields = [field.name for field in kind] if pa.types.is_struct(kind) else []
        self._paths_column = f"{image_column}.path" if "path" in fields else None
        self._pictures = _pictures(self._files, image_column, kind)
        # Of rows without content, which may name a file instead.
        self._empty = self._pictures.null_rows()
        self._paths = self.image_paths() if len(self._empty) else None

    def __len__(self) -> int:
        return len(self._pictures)

    def image(self, position: int) -> bytes | str:
        content = self._pictures[position]
        return content or self._beside(position)

    def images(self) -> Iterator[bytes | str]:
        for position, content in enumerate(self._pictures):
            path = None if content else self._path(position)
            yield self._folder.file(path) if path else content or b""

    def without_image(self) -> np.ndarray:
        sizes = (self._size_beside(position) for position in self._empty.tolist())
        return self._empty[np.fromiter(sizes, np.int64, len(self._empty)) <= 0]

    def image_sizes(self, positions: np.ndarray) -> np.ndarray:
        sizes = self._pictures.sizes(positions)
        for place in np.flatnonzero(sizes <= 0):
            sizes[place] = self._size_beside(int(positions[place]))
        return sizes

    def stamp(self) -> bytes:
        digest = blake2b(self._image_column.encode(), digest_size=16)
        for file in self._files:
            digest.update(file_stamp(file))
        for position in self._empty.tolist():
            path = self._path(position)
            digest.update(file_stamp(self._folder.file(path)) if path else b"-")
        return digest.digest()

    def image_paths(self) -> pa.ChunkedArray | None:
        """The paths kept with the pictures."""
        if self._paths_column is None:
            return None
        paths = read_column(self._files, self._image_column, "path")
        return pa.chunked_array([pa.concat_arrays(paths.chunks)]) if paths.num_chunks else paths

    def column(self, name: str) -> pa.ChunkedArray:
        return read_column(self._files, name)

    def class_names(self, name: str) -> list[str] | None:
        return class_names(self._features, name)

    def _path(self, position: int) -> str | None:
        if self._paths is None:
            self._paths = self.image_paths()
        path: str | None = None if self._paths is None else self._paths[position].as_py()
        return path

    def _beside(self, position: int) -> str:
        path = self._path(position)
        if not path:
            raise ImageDecodeError("the row holds no picture", "no picture")
        return self._folder.file(path)

    def _size_beside(self, position: int) -> int:
        path = self._path(position)
        return file_size(self._folder.file(path)) if path else -1


class _MappedColumn:
    """Byte strings of arrow files, which are mapped by each process; it pickles to their paths."""

    def __init__(self, files: Sequence[str], name: str) -> None:
        self._files = files
        self._name = name
        self._mapped: pa.ChunkedArray | None = None
        self._num_rows = len(self._values)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": None}

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, row: int) -> bytes | None:
        value: bytes | None = self._values[row].as_py()
        return value

    def __iter__(self) -> Iterator[bytes | None]:
        rows = progress(self._values, "reading pictures", self._num_rows, "picture")
        return (value.as_py() for value in rows)

    def null_rows(self) -> np.ndarray:
        # An empty string is no more of a picture than none.
        return np.flatnonzero(self._all_sizes() <= 0)

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        sizes: np.ndarray = self._all_sizes()[rows]
        return sizes

    @property
    def _values(self) -> pa.ChunkedArray:
        if self._mapped is None:
            kind = read_schema(self._files[0]).field(self._name).type
            field = "bytes" if pa.types.is_struct(kind) else None
            self._mapped = read_column(self._files, self._name, field)
        return self._mapped

    def _all_sizes(self) -> np.ndarray:
        sizes: np.ndarray = pc.fill_null(pc.binary_length(self._values), -1).to_numpy()
        return sizes.astype(np.int64)


def _pictures(files: Sequence[str], image_column: str, kind: pa.DataType) -> Column:
    if suffix(files[0]) != ".parquet":
        return _MappedColumn(files, image_column)
    for file in files:
        found = read_schema(file)
        if image_column not in found.names:
            raise FileError(f"{file!r} has no column {image_column!r}, which {files[0]!r} has")
        if pa.types.is_struct(found.field(image_column).type) != pa.types.is_struct(kind):
            raise _differs(image_column, files[0], kind, file, found.field(image_column).type)
    try:
        return BinaryColumn(
            files, f"{image_column}.bytes" if pa.types.is_struct(kind) else image_column
        )
    except DamagedPageError as error:
        raise FileError(f"cannot be read as parquet: {error}") from error
    except _UNREADABLE as error:
        raise _unreadable(files[0], error) from error


def read_tables(request: Request, root: str, files: dict[str, list[str]], name: str) -> Found:
    """Rows of table files, given for each split relative to a folder.

    Raises:
        UserError: an unreadable file, a column that does not exist, too many incomplete rows.
    """
    image_column = ""
    parts: dict[str, Part] = {}
    for split, names in in_order(files).items():
        paths = [os.path.join(root, path) for path in names]
        schema = read_schema(paths[0])
        image_column = image_column or choose_image(request, schema)
        if image_column not in schema.names:
            raise request.error(f"split {split!r} has no column {image_column!r}, as others have")
        if holds_pictures(schema.field(image_column).type):
            source = TableSource(paths, image_column, request.pictures_beside(paths[0]))
            parts[split] = Part(source, keys_of_rows(source, source.image_paths()))
        else:
            alone = len(files) == 1
            parts |= _listed(request, paths, schema, image_column, split=split, alone=alone)
    return assemble(request, parts, name=name, image_column=image_column)


def saved_files(root: str) -> dict[str, list[str]] | None:
    """The arrow files of each split of a folder written by `save_to_disk`, else None.

    Raises:
        UserError: a split that the folder promises is not there.
    """
    if os.path.isfile(os.path.join(root, "dataset_dict.json")):
        names = _texts_in(os.path.join(root, "dataset_dict.json"), "splits")
        folders = {split_name(n): named_file(root, n, by="dataset_dict.json") for n in names}
    elif os.path.isfile(os.path.join(root, "state.json")):
        folders = {"train": ""}
    else:
        return None
    files = {}
    for split, folder in folders.items():
        state = os.path.join(root, folder, "state.json")
        if not os.path.isfile(state):
            raise FileError(f"{root!r} was saved by datasets, but {state!r} is missing")
        names = _texts_in(state, "_data_files", "filename")
        by = os.path.join(folder, "state.json")
        files[split] = [named_file(root, os.path.join(folder, name), by=by) for name in names]
    return files


def _texts_in(file: str, field: str, of_each: str | None = None) -> list[str]:
    """The texts that a field of a JSON object lists, or a field of each object that it lists.

    Raises:
        UserError: they do not stand there.
    """
    try:
        with open(file, encoding="utf-8") as stream:
            listed = json.load(stream)[field]
        texts = listed if of_each is None else [item[of_each] for item in listed]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise TypeError
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise FileError(f"{file!r} is not as datasets writes it: no {field!r} in it") from error
    return texts


def read_schema(file: str) -> pa.Schema:
    """The columns of a parquet or arrow file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        schema = pq.read_schema(file) if suffix(file) == ".parquet" else open_arrow(file).schema
        for field in schema:
            _ = [part.name for part in field.flatten()]  # raises where a name is no text
        return schema
    except _UNREADABLE as error:
        raise _unreadable(file, error) from error


def read_column(files: Sequence[str], name: str, field: str | None = None) -> pa.ChunkedArray:
    """One column of several files, or one field of a column of structs.

    Raises:
        UserError: a file cannot be read, or its column differs from the first file's.
    """
    chunks: list[pa.Array] = []
    for file in files:
        if name not in read_schema(file).names:
            raise FileError(f"{file!r} has no column {name!r}, which {files[0]!r} has")
        try:
            if suffix(file) == ".parquet":
                # In batches, because a whole row group may exceed what one array can address.
                wanted = name if field is None else f"{name}.{field}"
                with pq.ParquetFile(file) as opened:
                    batches = opened.iter_batches(1 << 14, columns=[wanted])
                    columns = [batch.column(0) for batch in batches]
            else:
                columns = open_arrow(file).column(name).chunks
            for column in columns:
                # What is mapped may point anywhere, and text be no text.
                column.validate(full=True)
            if field is not None:
                columns = [_field(column, field) for column in columns]
        except _UNREADABLE as error:
            raise _unreadable(file, error) from error
        kind = (chunks or columns)[0].type if columns else None
        try:
            chunks += [column if column.type == kind else column.cast(kind) for column in columns]
        except pa.ArrowException as error:
            raise _differs(name, files[0], kind, file, columns[0].type) from error
    if not chunks:
        kind = read_schema(files[0]).field(name).type
        return pa.chunked_array([], kind if field is None else kind.field(field).type)
    return pa.chunked_array(chunks)


def _field(structs: pa.Array, name: str) -> pa.Array:
    """A field of each struct, null where the struct is."""
    return structs.flatten()[[field.name for field in structs.type].index(name)]


def _differs(
    name: str, first: str, kind: pa.DataType, other: str, other_kind: pa.DataType
) -> FileError:
    return FileError(f"column {name!r} holds {kind} in {first!r} and {other_kind} in {other!r}")


def class_names(features: dict[str, Any], name: str) -> list[str] | None:
    """The names of a ClassLabel column."""
    feature = features.get(name)
    names = feature.get("names") if isinstance(feature, dict) else None
    return [storable(str(name)) for name in names] if names and isinstance(names, list) else None


def _listed(
    request: Request,
    files: list[str],
    schema: pa.Schema,
    image_column: str,
    *,
    split: str,
    alone: bool,
) -> dict[str, Part]:
    others = [name for name in schema.names if name != image_column]
    classes = {name: class_names(features_of(schema), name) for name in others}
    return listed_parts(
        request,
        files[0],
        read_column(files, image_column).to_pylist(),
        pa.table({name: read_column(files, name) for name in others}),
        split=split,
        alone=alone,
        class_names={name: names for name, names in classes.items() if names},
    )


def choose_image(request: Request, schema: pa.Schema) -> str:
    """The column of pictures, or else of their paths.

    Raises:
        UserError: there is none, or not the one that was asked for.
    """
    pictures = [field.name for field in schema if holds_pictures(field.type)]
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    wanted = request.image_column
    if wanted is not None:
        if wanted not in schema.names:
            raise request.no_column("image_column", schema.names)
        if wanted not in pictures + texts:
            raise request.error(
                f"column {wanted!r} holds {schema.field(wanted).type}, neither encoded pictures"
                " nor paths of files"
            )
        return wanted
    chosen = find(pictures, IMAGE_COLUMNS) or (pictures[0] if len(pictures) == 1 else None)
    chosen = chosen or (None if pictures else find(texts, IMAGE_COLUMNS))
    if chosen is None:
        raise request.error(
            f"no column of pictures was found; name it with {request.key('image_column')}, one of:"
            f" {', '.join(schema.names)}"
        )
    return chosen


def holds_pictures(kind: pa.DataType) -> bool:
    """Whether a column of this type holds encoded pictures."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and holds_pictures(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """What `datasets` wrote about the columns."""
    described = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(described)["info"]["features"] if described else None
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}  # not written by it; the columns say enough
    return features if isinstance(features, dict) else {}


def open_arrow(file: str) -> pa.Table:
    """An arrow file, mapped.

    Raises:
        ArrowException: it is none.
    """
    mapped = pa.memory_map(file)
    try:
        return pa.ipc.open_file(mapped).read_all()
    except pa.ArrowInvalid:
        mapped.seek(0)
        return pa.ipc.open_stream(mapped).read_all()


def _unreadable(file: str, error: Exception) -> FileError:
    kind = "parquet" if suffix(file) == ".parquet" else "arrow"
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if os.path.isfile(file):
        with open(file, "rb") as stream:
            if stream.read(40).startswith(b"version https://git-lfs"):
                reason = "it is a Git LFS pointer; `git lfs pull` fetches the file"
    return FileError(f"{file!r} cannot be read as {kind}: {reason}")
