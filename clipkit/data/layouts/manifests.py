"""Lists that name picture files: metadata.csv, .jsonl or .parquet, csv and tsv files."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipkit.data.layouts.assembly import MAX_INCOMPLETE_RATIO, Found, Part, assemble
from clipkit.data.layouts.columns import IMAGE_COLUMNS, find, keys_of_paths, readable
from clipkit.data.layouts.fields import arrow_of, storable
from clipkit.data.layouts.listing import in_order, is_image, is_split_name, split_name, suffix
from clipkit.data.layouts.request import PictureFolder, Request
from clipkit.data.progress import progress
from clipkit.data.rows import FileSource
from clipkit.errors import named

JSON_SUFFIXES = frozenset({".jsonl", ".ndjson"})
# .txt because some well-known sets hand out their list as captions.txt.
MANIFEST_SUFFIXES = JSON_SUFFIXES | {".csv", ".tsv", ".txt"}
_SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}


def read_manifests(request: Request, root: str, files: dict[str, list[str]], name: str) -> Found:
    """Rows of lists of picture files, given for each split relative to a folder.

    A single list is divided by its column `split`, or by the folders that its paths begin with,
    where these are the names of splits.

    Raises:
        UserError: a file that cannot be read, has no column of paths, or names too many missing
            pictures.
    """
    image_column = ""
    parts: dict[str, Part] = {}
    for split, names in in_order(files).items():
        if len(names) > 1:
            raise request.error(
                f"{len(names)} lists stand for the split {split!r} ({named(names)}); pass the one"
                " that is meant"
            )
        file = os.path.join(root, names[0])
        table = read_manifest(request, file)
        image_column = image_column or _choose_paths(request, table, names[0])
        if image_column not in table.column_names:
            raise request.error(f"{names[0]} has no column {image_column!r}, as other splits have")
        paths = table.column(image_column).to_pylist()
        table = table.drop_columns([image_column])
        parts |= listed_parts(request, file, paths, table, split=split, alone=len(files) == 1)
    return assemble(request, parts, name=name, image_column=image_column)


def read_metadata(request: Request, root: str, files: Sequence[str]) -> Found:
    """Pictures with metadata.csv, .jsonl or .parquet, in one folder or in a folder a split.

    Raises:
        UserError: more than one such file for a split, or pictures that they do not list.
    """
    lists = [path for path in files if is_metadata(path)]
    folders = {path: os.path.dirname(path) for path in lists}
    if len(lists) > 1 and "" in folders.values():
        raise request.error(
            f"holds several lists, in the folder itself and below it ({named(lists)}); keep one,"
            " or one in the folder of every split"
        )
    splits: dict[str, list[str]] = {}
    for path, folder in folders.items():
        splits.setdefault(_split_of_folder(folder, alone=len(lists) == 1), []).append(path)
    kinds = sorted({os.path.basename(path) for path in lists})
    found = read_manifests(request, root, splits, f"pictures with {' and '.join(kinds)}")
    listed = {_spot(path) for rows in found.splits.values() for path in rows.image_files()}
    images = [path for path in files if is_image(path)]
    unlisted = [path for path in images if _spot(os.path.join(root, path)) not in listed]
    note = f"not in {kinds[0]}: {len(unlisted):,} of {len(images):,} pictures ({named(unlisted)})"
    if len(unlisted) > MAX_INCOMPLETE_RATIO * len(images):
        raise request.error(
            f"{note}; list them, take them out, or pass the path of {kinds[0]} itself to use only"
            " what it lists"
        )
    return replace(found, notes=found.notes + [note] * bool(unlisted))


def is_metadata(path: str) -> bool:
    """Whether a file is the list that describes the pictures of its folder."""
    name = os.path.basename(path).lower()
    return name in ("metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.parquet")


def is_list(request: Request, root: str, path: str) -> bool:
    """Whether a file's first two lines make it a list of pictures."""
    if suffix(path) not in MANIFEST_SUFFIXES:
        return False
    with open(os.path.join(root, path), encoding="utf-8-sig", errors="replace") as stream:
        first, second = stream.readline(1 << 16), stream.readline(1 << 16)
    if suffix(path) in JSON_SUFFIXES:
        names, cells = re.findall(r'"([^"]+)"\s*:', first), re.findall(r':\s*"([^"]+)"', first)
    else:
        separator = _separator(request, first)
        names, cells = _cells(first, separator), _cells(second, separator)
    known = request.image_column in names or find(names, IMAGE_COLUMNS) is not None
    return len(names) > 1 and (known or any(map(is_image, cells)))


def read_manifest(request: Request, file: str) -> pa.Table:
    """A csv, tsv, jsonl or parquet file as a table; cells of csv files are strings.

    Raises:
        UserError: the file cannot be read.
    """
    if suffix(file) == ".parquet":
        try:
            return pq.read_table(file)
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise request.error(f"{file!r} cannot be read as parquet: {reason}") from error
    with open(file, "rb") as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise request.error(f"{file!r} is not UTF-8 text, as line {line} shows") from error
    if not text.strip():
        raise request.error(f"{file!r} is empty")
    if suffix(file) in JSON_SUFFIXES:
        return _read_jsonl(request, file, text)
    return _read_csv(request, file, text)


def listed_parts(
    request: Request,
    file: str,
    paths: Sequence[str | None],
    table: pa.Table,
    *,
    split: str,
    alone: bool = True,
    class_names: dict[str, list[str]] | None = None,
) -> dict[str, Part]:
    """Pictures whose paths stand in a file, relative to its folder or the one asked for.

    Args:
        request: what the user asked.
        file: the list.
        paths: the path in each row (N).
        table: the other columns (N rows).
        split: the split that the list stands for.
        alone: no other list stands for another split, so that this one may hold several.
        class_names: names of the classes that a column's integers stand for.
    """
    folder = request.pictures_beside(file)
    if address := next((path for path in paths if path and "://" in path), None):
        raise request.error(
            f"{os.path.basename(file)} names addresses, not files ({address}); download the"
            " pictures first (img2dataset writes tar shards that can be read)"
        )
    found = _find_files(folder, [path or "" for path in paths])
    keys = keys_of_paths(found)
    split_of = (_splits_of_rows(found, table) if alone else None) or [split] * len(found)
    parts = {}
    for name in dict.fromkeys(split_of) or [split]:
        rows = [row for row, of in enumerate(split_of) if of == name]
        source = FileSource(
            folder.path,
            [found[row] for row in rows],
            table.take(pa.array(rows, pa.int64())),
            class_names=class_names,
            numbers=[row + 1 for row in rows],
        )
        parts[name] = Part(source, keys.take(pa.array(rows, pa.int64())))
    return in_order(parts)


def _splits_of_rows(paths: Sequence[str], table: pa.Table) -> list[str] | None:
    """The split of each row, by the column `split` or by the first folder of its path."""
    for values in (
        table.column("split").to_pylist() if "split" in table.column_names else [],
        [path.split("/")[0] if "/" in path else "" for path in paths],
    ):
        # "restval" is Karpathy's name for the rest of COCO's validation pictures.
        usual = all(isinstance(v, str) and (is_split_name(v) or v == "restval") for v in values)
        if values and usual:
            return [split_name(value) for value in values]
    return None


def _spot(path: str) -> str:
    return readable(os.path.abspath(path))


def _split_of_folder(folder: str, *, alone: bool) -> str:
    names = folder.split("/")
    split = next((split_name(name) for name in names if is_split_name(name)), None)
    return split or ("train" if alone else names[-1])


def _find_files(pictures: PictureFolder, paths: list[str]) -> list[str]:
    """The paths as the disk spells them; one that is not there stays as it is written.

    Raises:
        UserError: a path leads out of the folder.
    """
    folder, paths = pictures.path, pictures.within(paths)
    first = next((path for path in paths if path), "")
    inside = ""
    if first and not os.path.exists(os.path.join(folder, first)):
        # Lists are often handed out beside a folder of pictures that their paths leave out.
        with os.scandir(folder) as entries:
            folders = sorted(entry.name for entry in entries if entry.is_dir())
        inside = next((f for f in folders if os.path.exists(os.path.join(folder, f, first))), "")
    rows = progress(paths, "looking for pictures", len(paths), "picture")
    return [_spelled(pictures, os.path.join(inside, path) if path else path) for path in rows]


def _spelled(pictures: PictureFolder, path: str) -> str:
    folder = pictures.path
    if os.path.exists(os.path.join(folder, path)):
        return path
    (slashes,) = pictures.within([path.replace("\\", "/")])
    forms = (slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD")))
    return next((form for form in forms if os.path.exists(os.path.join(folder, form))), path)


def _choose_paths(request: Request, table: pa.Table, file: str) -> str:
    columns = table.column_names
    if request.image_column is not None:
        if request.image_column not in columns:
            raise request.no_column("image_column", columns)
        return request.image_column
    # Under a name of the user's own, the column is known by what it holds.
    of_pictures = [
        name for name in columns if not is_image(name) and _holds_paths(table.column(name))
    ]
    chosen = find(columns, IMAGE_COLUMNS) or (of_pictures[0] if len(of_pictures) == 1 else None)
    if chosen is None:
        raise request.error(
            f"{file} has no column of picture paths; name it with {request.key('image_column')},"
            f" one of: {', '.join(columns)} (the first line must hold the names of the columns)"
        )
    return chosen


def _holds_paths(column: pa.ChunkedArray) -> bool:
    cells = column.slice(0, 100).to_pylist()
    return bool(cells) and all(isinstance(cell, str) and is_image(cell) for cell in cells)


def _read_csv(request: Request, file: str, text: str) -> pa.Table:
    separator = _separator(request, text.split("\n", 1)[0])
    try:
        names, rows = _parse(text, separator)
        sound = all(len(row) <= len(names) for _, row in rows)
    except csv.Error:
        sound = False
    if not sound:
        # A stray quote, then. Tab-separated files are mostly written without any quoting.
        try:
            names, rows = _parse(text, separator, strict=False, quoted=separator != "\t")
        except csv.Error as error:
            raise request.error(f"{file!r} cannot be read as csv: {error}") from error
    if len(set(names)) < len(names):
        raise request.error(f"{file!r} has two columns of one name in: {', '.join(names)}")
    for line, row in rows:
        if len(row) > len(names):
            raise request.error(
                f"{file!r} has {len(row)} values in line {line} and {len(names)} columns; a caption"
                f" that holds a {_SEPARATORS[separator]} must stand in quotes"
            )
    columns = {
        name: [row[place].strip() or None if place < len(row) else None for _, row in rows]
        for place, name in enumerate(names)
    }
    return pa.table({name: pa.array(cells, pa.string()) for name, cells in columns.items()})


def _parse(
    text: str, separator: str, *, strict: bool = True, quoted: bool = True
) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of the columns, and the line and values of every row."""
    csv.field_size_limit(1 << 24)  # a stray quote may make one value of many lines
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=strict,
        skipinitialspace=True,
    )
    header = [name.strip() for name in next(reader)]
    return header, [(reader.line_num, row) for row in reader if any(map(str.strip, row))]


def _separator(request: Request, header: str) -> str:
    """The separator that makes columns of the first line, one of them of paths if possible."""

    def score(separator: str) -> tuple[bool, int]:
        names = _cells(header, separator)
        wanted = request.image_column
        return (
            find(names, IMAGE_COLUMNS) is not None if wanted is None else wanted in names,
            len(names),
        )

    return max(_SEPARATORS, key=score)


def _cells(line: str, separator: str) -> list[str]:
    return [cell.strip().strip('"') for cell in line.split(separator)]


def _read_jsonl(request: Request, file: str, text: str) -> pa.Table:
    records: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:  # also a number of thousands of digits
            raise request.error(f"{file!r} has no JSON in line {number}: {error}") from error
        except RecursionError as error:
            raise request.error(f"{file!r} nests too deeply in line {number}") from error
        if not isinstance(record, dict):
            raise request.error(f"{file!r} has no JSON object in line {number}")
        records.append(record)
    names = list(dict.fromkeys(name for record in records for name in record))
    return pa.table(
        {storable(name): arrow_of([record.get(name) for record in records]) for name in names}
    )
