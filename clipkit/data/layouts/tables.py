"""Tables that hold the pictures: parquet and arrow files, folders saved by `datasets`.

Read with pyarrow alone: `datasets` would copy into its cache and drop what does not fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipkit.data.layouts.assembly import Found, Part, assemble
from clipkit.data.layouts.columns import IMAGE_COLUMNS, find, keys_of_rows
from clipkit.data.layouts.listing import in_order, split_name, suffix
from clipkit.data.layouts.manifests import listed_parts
from clipkit.data.layouts.request import FileError, Request
from clipkit.data.rows import Source, file_size, file_stamp

TABLE_SUFFIXES = frozenset({".parquet", ".arrow", ".feather"})


class TableSource(Source):
    """Rows of parquet or arrow files, pictures included; a column is read when it is asked for.

    Arrow files stay on disk, mapped; the pictures of parquet files are held in memory.
    """

    def __init__(self, files: Sequence[str], image_column: str) -> None:
        self._files = [os.path.abspath(file) for file in files]
        self._image_column = image_column
        schema = read_schema(self._files[0])
        self._features = _features(schema)
        self.columns = [name for name in schema.names if name != image_column]
        self._num_rows = sum(_num_rows(file) for file in self._files)
        self._pictures: tuple[pa.ChunkedArray, pa.ChunkedArray | None] | None = None

    def __len__(self) -> int:
        return self._num_rows

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_pictures": None}

    def image(self, position: int) -> bytes | str:
        encoded, paths = self._read_pictures()
        content: bytes | None = encoded[position].as_py()
        if content:
            return content
        assert paths is not None
        return self._beside(paths[position].as_py())

    def image_sizes(self) -> np.ndarray:
        encoded, paths = self._read_pictures()
        sizes: np.ndarray = pc.fill_null(pc.binary_length(encoded), 0).to_numpy().astype(np.int64)
        for position in np.flatnonzero(sizes == 0):
            path = None if paths is None else paths[int(position)].as_py()
            sizes[position] = file_size(self._beside(path)) if path else -1
        return sizes

    def stamp(self) -> bytes:
        digest = blake2b(self._image_column.encode(), digest_size=16)
        for file in self._files:
            digest.update(file_stamp(file))
        encoded, paths = self._read_pictures()
        sizes = pc.fill_null(pc.binary_length(encoded), 0).to_numpy()
        for position in np.flatnonzero(sizes == 0):
            path = None if paths is None else paths[int(position)].as_py()
            digest.update(file_stamp(self._beside(path)) if path else b"-")
        return digest.digest()

    def image_paths(self) -> list[str | None] | None:
        """The paths kept with the pictures."""
        _, paths = self._read_pictures()
        return None if paths is None else paths.to_pylist()

    def column(self, name: str) -> pa.ChunkedArray:
        return read_column(self._files, name)

    def class_names(self, name: str) -> list[str] | None:
        return class_names(self._features, name)

    def _read_pictures(self) -> tuple[pa.ChunkedArray, pa.ChunkedArray | None]:
        if self._pictures is None:
            pictures = read_column(self._files, self._image_column)
            if pa.types.is_struct(pictures.type):
                names = [field.name for field in pictures.type]
                fields = dict(zip(names, pictures.flatten(), strict=True))
                self._pictures = (fields["bytes"], fields.get("path"))
            else:
                self._pictures = (pictures, None)
        return self._pictures

    def _beside(self, path: str) -> str:
        return os.path.join(os.path.dirname(self._files[0]), path)


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
        image_column = image_column or _choose_image(request, schema)
        if image_column not in schema.names:
            raise request.error(f"split {split!r} has no column {image_column!r}, as others have")
        if _holds_pictures(schema.field(image_column).type):
            source = TableSource(paths, image_column)
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
        with open(os.path.join(root, "dataset_dict.json"), encoding="utf-8") as stream:
            folders = {split_name(name): name for name in json.load(stream)["splits"]}
    elif os.path.isfile(os.path.join(root, "state.json")):
        folders = {"train": ""}
    else:
        return None
    files = {}
    for split, folder in folders.items():
        state = os.path.join(root, folder, "state.json")
        if not os.path.isfile(state):
            raise FileError(f"{root!r} was saved by datasets, but {state!r} is missing")
        with open(state, encoding="utf-8") as stream:
            parts = json.load(stream)["_data_files"]
        files[split] = [os.path.join(folder, part["filename"]) for part in parts]
    return files


def read_schema(file: str) -> pa.Schema:
    """The columns of a parquet or arrow file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        if suffix(file) == ".parquet":
            return pq.read_schema(file)
        return _map(file).schema
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def read_column(files: Sequence[str], name: str) -> pa.ChunkedArray:
    """One column of several files.

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
                batches = pq.ParquetFile(file).iter_batches(1024, columns=[name])
                columns = [batch.column(0) for batch in batches]
            else:
                columns = _map(file).column(name).chunks
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(file, error) from error
        kind = (chunks or columns)[0].type if columns else None
        try:
            chunks += [column if column.type == kind else column.cast(kind) for column in columns]
        except pa.ArrowException as error:
            raise FileError(
                f"column {name!r} holds {kind} in {files[0]!r} and {columns[0].type} in {file!r}"
            ) from error
    if not chunks:
        return pa.chunked_array([], read_schema(files[0]).field(name).type)
    return pa.chunked_array(chunks)


def class_names(features: dict[str, Any], name: str) -> list[str] | None:
    """The names of a ClassLabel column."""
    feature = features.get(name)
    names = feature.get("names") if isinstance(feature, dict) else None
    return list(names) if names else None


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
    classes = {name: class_names(_features(schema), name) for name in others}
    return listed_parts(
        request,
        files[0],
        read_column(files, image_column).to_pylist(),
        pa.table({name: read_column(files, name) for name in others}),
        split=split,
        alone=alone,
        class_names={name: names for name, names in classes.items() if names},
    )


def _choose_image(request: Request, schema: pa.Schema) -> str:
    pictures = [field.name for field in schema if _holds_pictures(field.type)]
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


def _holds_pictures(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_pictures(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _features(schema: pa.Schema) -> dict[str, Any]:
    described = (schema.metadata or {}).get(b"huggingface")
    info = json.loads(described).get("info") if described else None
    features = info.get("features") if isinstance(info, dict) else None
    return features if isinstance(features, dict) else {}


def _num_rows(file: str) -> int:
    try:
        if suffix(file) == ".parquet":
            return int(pq.ParquetFile(file).metadata.num_rows)
        return int(_map(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _map(file: str) -> pa.Table:
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
