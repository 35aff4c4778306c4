"""Any row of a parquet file by the page it lies in: what pyarrow gives, or a clear error."""

from __future__ import annotations

import itertools
import logging
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.data.layouts import parquet_column
from clipkit.data.layouts.parquet_column import BinaryColumn
from clipkit.data.layouts.parquet_pages import DamagedPageError
from clipkit.data.layouts.recent import Recent
from clipkit.data.layouts.snappy_blocks import BLOCK, find_blocks, unpack_blocks

CODECS = ["none", "snappy", "zstd", "gzip", "lz4", "brotli"]
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def values_of(
    count: int, longest: int, *, nulls: bool = False, seed: int = 0
) -> list[bytes | None]:
    """Strings of which some compress, some repeat, some are empty, and some may be null."""
    rng = np.random.default_rng(seed)
    kinds = [
        lambda size: rng.bytes(size),
        lambda size: bytes(size),
        lambda size: b"again" * (longest // 6),
    ]
    found = [kinds[i % 3](int(rng.integers(longest))) for i in range(count)]
    return [None if nulls and rng.random() < 0.3 else value for value in found]


def column_of(values: list[bytes | None], kind: str) -> pa.Table:
    if kind == "struct":  # one that is null, and one whose content is
        cells = [
            {"bytes": value, "path": "x"} if value is not None or row % 2 else None
            for row, value in enumerate(values)
        ]
        return pa.table({"image": pa.array(cells, STRUCT)})
    array = pa.array(values, pa.large_binary() if kind == "large" else pa.binary())
    field = pa.field("image", array.type, nullable=kind != "required")
    return pa.table([array], schema=pa.schema([field]))


def check(column: BinaryColumn, expected: list[bytes | None]) -> None:
    order = np.random.default_rng(1).permutation(len(expected)).tolist()
    assert len(column) == len(expected)
    assert all(column[row] == expected[row] for row in order)
    assert list(column) == expected
    assert column.null_rows().tolist() == [r for r, value in enumerate(expected) if value is None]
    sizes = [-1 if value is None else len(value) for value in expected]
    assert column.sizes(np.arange(len(expected))).tolist() == sizes
    some = np.array([0, len(expected) // 2, len(expected) - 1])
    assert column.sizes(some).tolist() == [sizes[row] for row in some]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["struct", "plain", "large", "required"])
def test_every_row_is_what_pyarrow_gives(codec: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    options = itertools.product(["1.0", "2.0"], [True, False], [True, False], [100, 1 << 20])
    for number, (version, dictionary, nulls, page) in enumerate(options):
        if nulls and kind == "required":
            continue
        values = values_of(120, 40 if number % 2 else 2500, nulls=nulls, seed=number)
        pq.write_table(
            column_of(values, kind), path, compression=codec, data_page_version=version,
            use_dictionary=dictionary, data_page_size=page, row_group_size=50, write_batch_size=16,
            write_page_checksum=bool(number % 3), write_statistics=bool(number % 4),
        )  # fmt: skip
        column = BinaryColumn([str(path)], "image.bytes" if kind == "struct" else "image")
        check(column, values)
        assert not column._whole_groups.num_bytes  # pyarrow was not needed


def test_several_files_and_empty_row_groups(tmp_path: Path) -> None:
    values = values_of(90, 300, nulls=True)
    for number in range(3):
        table = column_of(values[number * 30 : number * 30 + 30], "plain")
        with pq.ParquetWriter(tmp_path / f"{number}.parquet", table.schema) as writer:
            for part in (table[:0], table[:11], table[:0], table[11:]):
                writer.write_table(part)
    column = BinaryColumn([str(tmp_path / f"{n}.parquet") for n in range(3)], "image")
    check(column, values)
    check(pickle.loads(pickle.dumps(column)), values)
    with pytest.raises(IndexError):
        column[90]
    with pytest.raises(DamagedPageError, match=r"no column 'picture'"):
        BinaryColumn([str(tmp_path / "0.parquet")], "picture")


def test_pages_of_large_pictures_are_entered(tmp_path: Path) -> None:
    """A page of many pictures, as pyarrow writes it, is not unpacked for one of them."""
    rng = np.random.default_rng(0)
    values: list[bytes | None] = [rng.bytes(int(rng.integers(20_000, 90_000))) for _ in range(150)]
    path = tmp_path / "a.parquet"
    for codec in ("snappy", "none"):
        pq.write_table(column_of(values, "struct"), path, compression=codec)
        column = BinaryColumn([str(path)], "image.bytes")
        check(column, values)
        assert column._unpacked.num_bytes < 1000
        assert column._places.num_bytes < 20_000


def test_what_only_pyarrow_reads_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = values_of(100, 300, nulls=True)
    path = tmp_path / "a.parquet"
    pq.write_table(
        column_of(values, "plain"), path, use_dictionary=False, row_group_size=30,
        column_encoding={"image": "DELTA_LENGTH_BYTE_ARRAY"},
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        column = BinaryColumn([str(path)], "image")
        check(column, values)
    assert column._whole_groups.num_bytes
    (said,) = [record.getMessage() for record in caplog.records]
    assert "a.parquet is read by whole row groups" in said
    assert "encoding 6" in said


def test_large_packed_pages_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_column, "_LARGE_PAGE", 100_000)
    values = [np.random.default_rng(row).bytes(5000) for row in range(100)]
    for codec, lines in {"zstd": 1, "snappy": 0}.items():
        caplog.clear()
        pq.write_table(column_of(list(values), "plain"), tmp_path / "a.parquet", compression=codec)
        with caplog.at_level(logging.INFO):
            check(BinaryColumn([str(tmp_path / "a.parquet")], "image"), list(values))
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == lines
        assert all("a page with zstd, which are unpacked for every row" in line for line in said)


def test_files_written_by_datasets(tmp_path: Path) -> None:
    import datasets

    values = [value or b"x" for value in values_of(250, 900)]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    cells = [{"bytes": value, "path": None} for value in values]
    data = datasets.Dataset.from_dict({"image": cells}, features=features)
    datasets.disable_progress_bars()
    data.to_parquet(str(tmp_path / "a.parquet"))
    check(BinaryColumn([str(tmp_path / "a.parquet")], "image.bytes"), list(values))


def test_a_damaged_file_gives_an_error_and_never_another_value(tmp_path: Path) -> None:
    """With checksums, as here, also where a picture's own bytes were changed."""
    rng = np.random.default_rng(0)
    values = values_of(60, 700, nulls=True)
    path, other = tmp_path / "a.parquet", tmp_path / "b.parquet"
    found = {"opened": 0, "refused": 0, "rows": 0, "errors": 0}
    for codec, version in itertools.product(CODECS, ["1.0", "2.0"]):
        pq.write_table(
            column_of(values, "struct"), path, compression=codec, data_page_version=version,
            use_dictionary=version == "1.0", data_page_size=3000, write_batch_size=16,
            row_group_size=40, write_page_checksum=True,
        )  # fmt: skip
        whole = path.read_bytes()
        for number in range(60):
            damaged = bytearray(whole)
            place = int(rng.integers(len(whole)))
            if number % 3 == 0:
                damaged = damaged[:place]
            elif number % 3 == 1:
                damaged[place] = (damaged[place] + int(rng.integers(1, 256))) % 256
            else:
                del damaged[place : place + int(rng.integers(1, 40))]
            other.write_bytes(damaged)
            try:
                column = BinaryColumn([str(other)], "image.bytes")
            except (OSError, ValueError, DamagedPageError):
                found["refused"] += 1
                continue
            found["opened"] += 1
            for row in range(min(len(column), len(values))):
                try:
                    value = column[row]
                except OSError as error:
                    found["errors"] += "b.parquet' is " in str(error)
                else:
                    assert value == values[row]
                    found["rows"] += 1
    assert min(found.values()) > 50


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 3 * BLOCK, 5 * BLOCK + 77])
def test_blocks_of_snappy_unpack_alone(size: int) -> None:
    rng = np.random.default_rng(size)
    content = b"".join(rng.bytes(700) + bytes(100) for _ in range(size // 800 + 1))[:size]
    packed = memoryview(pa.Codec("snappy").compress(content, asbytes=True))
    starts = find_blocks(packed, size)
    assert starts is not None
    assert len(starts) == -(-size // BLOCK) + 1
    for block, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        expected = content[block * BLOCK : (block + 1) * BLOCK]
        assert unpack_blocks(bytes(packed[start:end]), len(expected)) == expected
    assert find_blocks(packed, size + 1) is None
    assert find_blocks(packed[:-1], size) is None


def test_copies_from_before_a_block_are_noticed() -> None:
    """No known compressor writes them, but the format allows it."""
    literal = lambda content: bytes([61 << 2]) + (len(content) - 1).to_bytes(2, "little") + content  # noqa: E731
    first = bytes(range(256)) * 256
    copied = bytes([(59 << 2) | 3]) + (100).to_bytes(4, "little")  # 60 bytes from 100 before
    size = len(first) + 60
    preamble = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
    packed = preamble + literal(first) + copied
    assert len(pa.Codec("snappy").decompress(packed, size)) == size
    assert find_blocks(memoryview(packed), size) is None


def test_recent_forgets_what_was_used_longest_ago() -> None:
    recent: Recent[bytes] = Recent(10, len)
    made: list[str] = []

    def make(name: str, size: int) -> bytes:
        made.append(name)
        return bytes(size)

    for name, size in [("a", 4), ("b", 4), ("a", 4), ("c", 4), ("a", 4), ("b", 4), ("d", 50)]:
        assert len(recent.get(name, lambda name=name, size=size: make(name, size))) == size
    assert made == ["a", "b", "c", "b", "d"]
    assert recent.num_bytes == 50
