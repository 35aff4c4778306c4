"""SugarCrepe: for each picture a right caption and a wrong one."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from clipkit.data.layouts.columns import keys_of_paths
from clipkit.data.rows import FileSource, StoredRows
from clipkit.errors import UserError, named
from clipkit.suite.clip_benchmark.names import read_json


def open_sugar_crepe(path: str, *, option: str = "data.path") -> StoredRows:
    """Open a JSON file of SugarCrepe; the captions of a row are the right one, then the wrong one.

    The file maps a number to `filename`, `caption`, `negative_caption`; the pictures lie in
    `val2017` beside it, or directly beside it.

    Raises:
        UserError: no such file, or a picture is missing.
    """
    try:
        entries = read_json(path)
        parts: list[dict[str, str]] = list(entries.values()) if isinstance(entries, dict) else []
        wanted = ("filename", "caption", "negative_caption")
        if not parts or not all(
            isinstance(part, dict) and all(isinstance(part.get(key), str) for key in wanted)
            for part in parts
        ):
            raise UserError(f"is no list of {', '.join(wanted)} by number")
        folder = os.path.dirname(os.path.abspath(path))
        beside = os.path.join(folder, "val2017")
        root = beside if os.path.isdir(beside) else folder
        files = [part["filename"] for part in parts]
        leading_out = [file for file in files if os.path.isabs(file) or ".." in Path(file).parts]
        if leading_out:
            raise UserError(f"names pictures outside of its folder ({named(leading_out)})")
        missing = [file for file in files if not os.path.isfile(os.path.join(root, file))]
        if missing:
            raise UserError(f"{len(missing):,} pictures are not in {root} ({named(missing)})")
    except UserError as error:
        raise UserError(f"{option} {path!r}: {error}") from error
    captions = [[part["caption"], part["negative_caption"]] for part in parts]
    table = pa.table({"captions": pa.array(captions, pa.list_(pa.string()))})
    source = FileSource(root, files, table)
    return StoredRows(
        source, captions=table["captions"].combine_chunks(), keys=keys_of_paths(files)
    )
