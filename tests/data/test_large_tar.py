"""Many tar shards: listed as tarfile lists them, the list kept, few files open."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from clipkit.data.filters import Filters, filtered
from clipkit.data.layouts import open_files, open_layout, tar_index
from clipkit.data.layouts.request import FileError
from clipkit.data.layouts.shards import TarSource
from clipkit.data.layouts.tar_index import list_samples
from clipkit.data.layouts.tar_members import members

FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


def write_shard(
    path: Path, names: list[str], *, form: int = tarfile.PAX_FORMAT, seed: int = 0
) -> Path:
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for number, name in enumerate(names):
            for kind in ("jpg", "txt"):
                content = rng.bytes(int(rng.integers(1, 1500))) if kind == "jpg" else name.encode()
                member = tarfile.TarInfo(f"{name}.{kind}")
                member.size, member.mtime = len(content), 1.5 if number % 3 else 7
                archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, f"{names[0]}.jpg"
        archive.addfile(link)
    return path


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_members_are_those_of_tarfile(form: int, tmp_path: Path) -> None:
    names = [f"folder/{'deep/' * (n % 3) * 12}{'é' * (n % 2)}{n:04d}" for n in range(50)]
    path = write_shard(tmp_path / "a.tar", names, form=form)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
    assert list(members(str(path))) == expected
    assert len(expected) == 100


def header(name: str, **fields: bytes) -> bytes:
    """A member's header with other bytes at some places, and the sum that fits them."""
    places = {"size": 124, "type": 156, "sparse": 386, "whole": 483}
    found = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    for field, content in fields.items():
        found[places[field] : places[field] + len(content)] = content
    found[148:156] = b" " * 8
    found[148:156] = b"%06o\0 " % sum(found)
    return bytes(found)


@pytest.mark.parametrize("said", [b"-1000", b"-1", b"1_0", b"+10", b"0o10", b"9", b"1 1"])
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"V"])
@pytest.mark.parametrize("first", [True, False])
def test_sizes_that_are_none(said: bytes, kind: bytes, first: bool, tmp_path: Path) -> None:
    whole = b"" if first else header("0.jpg", size=b"0")
    odd = header("1.jpg", size=said.ljust(12, b"\0"), type=kind)
    (tmp_path / "a.tar").write_bytes(whole + odd + bytes(1024))
    with contextlib.suppress(FileError):
        assert len(list(islice(members(str(tmp_path / "a.tar")), 9))) < 3


@pytest.mark.parametrize("said", [b"00000000003", b"3", b"  3", b"3 ", b"0000003\0"])
def test_sizes_are_padded_as_they_may_be(said: bytes, tmp_path: Path) -> None:
    plain = header("1.jpg", size=said.ljust(12, b"\0")) + b"abc".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(header("0.jpg") + plain + bytes(1024))
    assert list(members(str(tmp_path / "a.tar"))) == [("0.jpg", 512, 0), ("1.jpg", 1024, 3)]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_sparse_members_are_refused_by_name(form: str, first: bool, tmp_path: Path) -> None:
    """Of such a member the tar holds pieces, and its size is that of the whole."""
    path = tmp_path / "a.tar"
    piece = b"abc".ljust(512, b"\0")
    with tarfile.open(path, "w") as archive:
        if not first:
            archive.addfile(tarfile.TarInfo("0.jpg"))
        member = tarfile.TarInfo("holes.jpg")
        member.pax_headers = {"GNU.sparse.map": "0,3", "GNU.sparse.size": "9000"}
        member.size = 3
        if form == "pax":
            archive.addfile(member, io.BytesIO(b"abc"))
        else:
            assert archive.fileobj is not None
            map_of_pieces = b"%011o\0%011o\0" % (0, 3)
            odd = {"size": b"%011o\0" % 3, "sparse": map_of_pieces, "whole": b"%011o\0" % 9000}
            archive.fileobj.write(header("holes.jpg", type=b"S", **odd) + piece)
    with tarfile.open(path) as archive:
        assert archive.getmember("holes.jpg").size == 9000
    with pytest.raises(FileError, match=r"'holes\.jpg' is kept sparse; pack it again"):
        list(members(str(path)))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache in which the index of any shards is kept."""
    monkeypatch.setattr(tar_index, "_WORTH_KEEPING", 1)
    monkeypatch.setattr(tar_index, "_MOST_OF_THE_DATA", 1)
    return tmp_path / "cache"


def test_the_index_is_kept_and_built_again(kept: Path, tmp_path: Path) -> None:
    shards = [str(write_shard(tmp_path / f"{n}.tar", [f"{n}é{m}" for m in range(5)], seed=n))
              for n in range(3)]  # fmt: skip
    first = list_samples(shards, str(kept))
    (file,) = kept.glob("shards-*.clipkit")
    written = file.stat().st_mtime_ns
    again = list_samples(shards, str(kept))
    assert file.stat().st_mtime_ns == written
    assert again.names.to_pylist() == first.names.to_pylist() == again.keys().to_pylist()
    assert again.shard.tolist() == first.shard.tolist()
    assert {f: m.tolist() for f, m in again.members.items()} == {
        f: m.tolist() for f, m in first.members.items()
    }
    content = file.read_bytes()
    file.unlink()  # what is mapped of it stays as it was
    file.write_bytes(content[:100] + b"x" + content[101:])
    assert list_samples(shards, str(kept)).names.to_pylist() == first.names.to_pylist()
    assert file.read_bytes() == content
    # Other shards under the same names have another index.
    write_shard(tmp_path / "0.tar", ["other"])
    os.utime(tmp_path / "0.tar", ns=(1, 1))
    assert list_samples(shards, str(kept)).name(0) == "other"
    assert len(list(kept.glob("shards-*.clipkit"))) == 2


def test_no_index_is_kept_that_is_large_or_has_no_folder(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = str(write_shard(tmp_path / "a.tar", ["a", "b"]))
    kept.write_text("a file in its place")
    assert list_samples([shard], str(kept)).names.to_pylist() == ["a", "b"]
    monkeypatch.setattr(tar_index, "_MOST_OF_THE_DATA", 0)
    assert list_samples([shard], str(tmp_path / "other")).names.to_pylist() == ["a", "b"]
    assert not list((tmp_path / "other").glob("*.clipkit"))


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    count = 3 * open_files.MAX_OPEN
    for number in range(count):
        write_shard(tmp_path / f"{number:04d}.tar", [f"{number:04d}"], seed=number)
    before = len(os.listdir("/proc/self/fd"))
    rows = open_layout(str(tmp_path)).split("train")
    assert [row.captions[0] for row in rows] == rows.keys()
    order = np.random.default_rng(0).permutation(count).tolist()
    for row in order:
        path = tmp_path / f"{row:04d}.tar"
        with tarfile.open(path) as archive:
            member = archive.extractfile(f"{row:04d}.jpg")
            assert member is not None
            assert rows.image(row) == member.read()
    assert len(os.listdir("/proc/self/fd")) <= before + open_files.MAX_OPEN
    child = os.fork()  # what is open may be shared, since every read names its place
    if child == 0:
        same = all(len(rows.image(row)) for row in reversed(order))
        os._exit(0 if same else 1)
    assert all(rows.image(row) for row in order)
    assert os.waitpid(child, 0)[1] == 0


def test_the_json_of_a_sample_is_parsed_once_for_several_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"caption_1": "a", "caption_2": "b", "wrong": "c", "width": 9, "height": 9, "n": 1}
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(50):
            for field, content in (("jpg", b"x"), ("json", json.dumps(record).encode())):
                member = tarfile.TarInfo(f"{number}.{field}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    read: list[int] = []
    of_file = TarSource._read
    monkeypatch.setattr(TarSource, "_read", lambda *its: (read.append(1), of_file(*its))[1])
    options = {"caption_column": "caption_*", "negative_column": "wrong"}
    rows = open_layout(str(tmp_path), **options).split("train")  # type: ignore[arg-type]
    assert rows.captions(7) == ["a", "b"]
    assert rows.column("n") == [1] * 50
    assert len(read) == 1 + 50 + 50  # the first one tells the columns
    read.clear()
    filters = Filters(min_side=1, max_aspect_ratio=2, columns={"n": (0, 1)})
    assert len(filtered(rows, filters, option="filters").rows) == 50
    assert len(read) == 50
