"""Every way of keeping pictures with captions is read alike, and what is wrong is said."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.data.images import decode_image
from clipkit.data.layouts import open_layout
from clipkit.data.rows import Rows, group_by_picture, hold_out
from clipkit.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "data"
COLORS = {"blue ball": (0, 0, 255), "gelbe Tür": (255, 255, 0), "red_car": (255, 0, 0)}


class Pair(NamedTuple):
    file: str  # its name, in the order of the pairs
    png: bytes
    label: str

    @property
    def caption(self) -> str:
        return f"a photo of a {self.label.replace('_', ' ')}."


def draw(label: str, number: int) -> bytes:
    pixels = np.full((6, 8, 3), COLORS[label], np.uint8)
    pixels[number % 6, number % 8] = number
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    labels = [label for label in sorted(COLORS) for _ in range(67)][:200]
    return [
        Pair(f"{label} {n:03d}.{'PNG' if n % 9 == 0 else 'png'}", draw(label, n), label)
        for n, label in enumerate(labels)
    ]


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_images(root: Path, pairs: list[Pair]) -> Path:
    for pair in pairs:
        write(root / pair.file, pair.png)
    return root


def write_csv(path: Path, rows: list[list[str]], separator: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=separator).writerows(rows)
    return path


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def as_parquet(root: Path, pairs: list[Pair]) -> Path:
    root.mkdir()
    images = [{"bytes": pair.png, "path": pair.file} for pair in pairs]
    table = pa.table({"image": images, "caption": [pair.caption for pair in pairs]})
    pq.write_table(table[:150], root / "train-00000-of-00002.parquet", row_group_size=40)
    pq.write_table(table[150:], root / "train-00001-of-00002.parquet")
    return root


def as_metadata(root: Path, pairs: list[Pair]) -> Path:
    write_images(root, pairs)
    write_csv(
        root / "metadata.csv",
        [["file_name", "text"], *([pair.file, pair.caption] for pair in pairs)],
    )
    return root


def as_jsonl(root: Path, pairs: list[Pair]) -> Path:
    write_images(root / "train", pairs)
    lines = [json.dumps({"file_name": p.file, "captions": [p.caption]}) for p in pairs]
    write(root / "train" / "metadata.jsonl", "\n".join(lines))
    return root


def as_text_files(root: Path, pairs: list[Pair]) -> Path:
    write_images(root, pairs)
    for pair in pairs:
        write(root / Path(pair.file).with_suffix(".txt"), pair.caption + "\n")
    return root


def as_class_folders(root: Path, pairs: list[Pair]) -> Path:
    for pair in pairs:
        write(root / pair.label / pair.file, pair.png)
    return root


def as_csv(root: Path, pairs: list[Pair]) -> Path:
    write_images(root / "pictures", pairs)
    rows = [[f"pictures/{pair.file}", pair.caption] for pair in pairs]
    return write_csv(root / "list.csv", [["filepath", "title"], *rows], ";")


def as_tar(root: Path, pairs: list[Pair]) -> Path:
    for number in range(4):
        members = []
        for pair in pairs[number * 50 : number * 50 + 50]:
            name, kind = os.path.splitext(pair.file)
            members += [(name + kind, pair.png), (name + ".txt", pair.caption.encode())]
        write_tar(root / f"shards-{number:03d}.tar", members)
    return root / "shards-{000..003}.tar"


def as_saved(root: Path, pairs: list[Pair]) -> Path:
    import datasets

    rows = {
        "image": [{"bytes": pair.png, "path": pair.file} for pair in pairs],
        "caption": [pair.caption for pair in pairs],
    }
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": data}).save_to_disk(str(root))
    return root


LAYOUTS = [
    as_parquet,
    as_metadata,
    as_jsonl,
    as_text_files,
    as_class_folders,
    as_csv,
    as_tar,
    as_saved,
]


def pixels(rows: Rows) -> list[bytes]:
    return [decode_image(rows.image(i)).tobytes() for i in range(len(rows))]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_pairs_in_every_layout(
    layout: Callable[[Path, list[Pair]], Path], pairs: list[Pair], tmp_path: Path
) -> None:
    found = open_layout(str(layout(tmp_path / "data", pairs)))
    rows = found.split("train")
    stems = [os.path.splitext(pair.file)[0] for pair in pairs]
    assert list(found.splits) == ["train"]
    assert rows.keys() == stems == [row.key for row in rows]
    assert [row.captions for row in rows] == [[pair.caption] for pair in pairs]
    assert list(rows.all_captions()) == [[pair.caption] for pair in pairs]
    assert pixels(rows) == [decode_image(pair.png).tobytes() for pair in pairs]
    train, validation = hold_out(rows)
    assert len(validation) == 10
    # Written down, so that a change of the hash, which would move pictures across, is noticed.
    assert validation.keys()[:2] == ["blue ball 023", "blue ball 029"]
    assert sorted(train.keys() + validation.keys()) == stems
    copy = pickle.loads(pickle.dumps(validation))
    assert pixels(copy) == pixels(validation)
    assert "200 pairs" in found.describe()
    assert found.fingerprint == open_layout(str(as_parquet(tmp_path / "b", pairs))).fingerprint


def fails(path: Path | str, *words: str, **options: str) -> None:
    """One line names the key, the path and all of the words."""
    with pytest.raises(UserError) as caught:
        open_layout(str(path), **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(options.get("option", "data."))
    for word in (*words, "'"):
        assert word in message, message


# --- splits ----------------------------------------------------------------------------------


def test_names_of_splits(pairs: list[Pair], tmp_path: Path) -> None:
    for folder, part in (("Training", pairs[:5]), ("dev", pairs[5:9]), ("testing", pairs[9:12])):
        as_text_files(tmp_path / folder, part)
    found = open_layout(str(tmp_path))
    assert {name: len(rows) for name, rows in found.splits.items()} == {
        "train": 5,
        "validation": 4,
        "test": 3,
    }
    assert found.split("test").keys() == [os.path.splitext(p.file)[0] for p in pairs[9:12]]
    assert found.split("val") is found.split("validation")
    with pytest.raises(UserError, match="no split 'unseen'; it has: train, validation, test"):
        found.split("unseen")


def test_splits_of_tables_by_name(pairs: list[Pair], tmp_path: Path) -> None:
    table = pq.read_table(as_parquet(tmp_path / "all", pairs))
    (tmp_path / "hub").mkdir()
    for name in ("train", "valid", "extra_hard"):
        pq.write_table(table[:7], tmp_path / "hub" / f"{name}-00000-of-00001.parquet")
    assert list(open_layout(str(tmp_path / "hub")).splits) == ["train", "validation", "extra_hard"]
    (tmp_path / "nested" / "test").mkdir(parents=True)
    pq.write_table(table[:7], tmp_path / "nested" / "test" / "part-3.parquet")
    pq.write_table(table[:5], tmp_path / "nested" / "coco_val2017.parquet")
    assert list(open_layout(str(tmp_path / "nested")).splits) == ["validation", "test"]
    pq.write_table(table[:7], tmp_path / "emoji.parquet")
    assert list(open_layout(str(tmp_path / "emoji.parquet")).splits) == ["train"]


def test_readme_declares_the_files(pairs: list[Pair], tmp_path: Path) -> None:
    table = pq.read_table(as_parquet(tmp_path / "all", pairs))
    root = tmp_path / "repository"
    (root / "data").mkdir(parents=True)
    pq.write_table(table[:9], root / "data" / "a.parquet")
    pq.write_table(table[9:12], root / "data" / "b.parquet")
    files = "[{split: train, path: data/a.parquet}, {split: val, path: [data/b*]}]"
    write(root / "README.md", f"---\nconfigs:\n- config_name: x\n  data_files: {files}\n---\n# x\n")
    assert {n: len(r) for n, r in open_layout(str(root)).splits.items()} == {
        "train": 9,
        "validation": 3,
    }
    (root / "data" / "b.parquet").unlink()
    assert open_layout(str(root)).describe().endswith("no files of split 'validation' are here")


def test_one_list_of_several_splits(pairs: list[Pair], tmp_path: Path) -> None:
    write_images(tmp_path, pairs[:4])
    names = ["train", "restval", "val", "test"]
    rows = [[pair.file, "a", name] for pair, name in zip(pairs[:4], names, strict=True)]
    path = write_csv(tmp_path / "karpathy.csv", [["file", "caption", "split"], *rows])
    assert list(open_layout(str(path)).splits) == ["train", "validation", "test", "restval"]
    folders = tmp_path / "folders"
    write_images(folders / "train", pairs[:3])
    write_images(folders / "test", pairs[3:5])
    where = ["train"] * 3 + ["test"] * 2
    rows = [[f"{folder}/{pair.file}", "a"] for folder, pair in zip(where, pairs, strict=False)]
    write_csv(folders / "metadata.csv", [["file_name", "caption"], *rows])
    assert {n: len(r) for n, r in open_layout(str(folders)).splits.items()} == {
        "train": 3,
        "test": 2,
    }


# --- columns ---------------------------------------------------------------------------------


def parquet_of(path: Path, pairs: list[Pair], **columns: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [pair.png for pair in pairs], **columns}), path)
    return path


def test_which_column_is_the_caption(pairs: list[Pair], tmp_path: Path) -> None:
    columns = {"title": ["t"] * 3, "TEXT": ["x"] * 3, "n": [1, 2, 3]}
    path = parquet_of(tmp_path / "a.parquet", pairs[:3], **columns)
    found = open_layout(str(path))
    assert (found.caption_column, found.split("train").captions(0)) == ("TEXT", ["x"])
    assert open_layout(str(path), caption_column="title").split("train").captions(2) == ["t"]
    fails(path, "data.caption_column 'label'", "title, TEXT, n", caption_column="label")
    fails(path, "holds int64", "title, TEXT", caption_column="n")
    fails(path, "data.image_column 'picture'", "image, title", image_column="picture")
    bare = parquet_of(tmp_path / "b.parquet", pairs[:3], n=[1, 2, 3])
    parquet_of(tmp_path / "c.parquet", pairs[:3], title=[["a"]] * 3)
    fails(tmp_path / "[ac].parquet", "'title' holds string in", "and list", caption_column="title")
    fails(tmp_path / "[ab].parquet", "b.parquet' has no column 'TEXT'")
    fails(bare, "no caption column", "data.caption_column", "n")
    assert open_layout(str(bare), captions_required=False).split("train").captions(0) == []


def test_several_captions(pairs: list[Pair], tmp_path: Path) -> None:
    listed = parquet_of(
        tmp_path / "a.parquet", pairs[:3], captions=[["one", " two "], ["three", "", None], ["4"]]
    )
    rows = open_layout(str(listed)).split("train")
    assert list(rows.all_captions()) == [["one", "two"], ["three"], ["4"]]
    columns = {"caption_0": ["a", "b", "c"], "caption_1": ["d", "", None], "id": [7, 8, 9]}
    numbered = open_layout(str(parquet_of(tmp_path / "b.parquet", pairs[:3], **columns)))
    assert numbered.caption_column == "caption_0, caption_1"
    assert [row.captions for row in numbered.split("train")] == [["a", "d"], ["b"], ["c"]]
    one = open_layout(str(tmp_path / "b.parquet"), caption_column="*_0").split("train")
    assert [row.captions for row in one] == [["a"], ["b"], ["c"]]
    json_text = parquet_of(tmp_path / "c.parquet", pairs[:3], caption=['["a", "b"]'] * 3)
    assert open_layout(str(json_text)).split("train").captions(0) == ["a", "b"]
    write_images(tmp_path / "mixed", pairs[:2])
    lines = [{"image": pairs[0].file, "text": "one"}, {"image": pairs[1].file, "text": ["1", "2"]}]
    write(tmp_path / "mixed" / "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    mixed = open_layout(str(tmp_path / "mixed")).split("train")
    assert [row.captions for row in mixed] == [["one"], ["1", "2"]]


def test_classes_become_captions(pairs: list[Pair], tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"label": datasets.ClassLabel(names=["cat", "sea_lion"])})
    data = datasets.Dataset.from_dict({"label": [1, 0, 1]}, features=features)
    schema = data.features.arrow_schema
    table = pa.table({"image": [p.png for p in pairs[:3]], "label": pa.array([1, 0, 1])})
    pq.write_table(table.replace_schema_metadata(schema.metadata), tmp_path / "a.parquet")
    rows = open_layout(str(tmp_path / "a.parquet"), caption_template="{}!").split("train")
    assert [row.captions for row in rows] == [["sea lion!"], ["cat!"], ["sea lion!"]]
    assert rows.column("label") == [1, 0, 1]
    assert rows[1:].labels("label").ids.tolist() == [0, 1]
    assert rows.class_names("label") == rows.labels("label").names == ["cat", "sea_lion"]
    with pytest.raises(UserError, match="no column 'class'; the columns are: label"):
        rows.column("class")
    fails(tmp_path / "a.parquet", "data.caption_template", "{}", caption_template="a photo")

    found = open_layout(str(as_class_folders(tmp_path / "test", pairs)))
    assert "caption column label as 'a photo of a {}.'" in found.describe()
    folders = found.split("train")
    assert folders.class_names("label") == ["blue ball", "gelbe Tür", "red car"]
    assert folders.labels("label").ids.tolist() == [0] * 67 + [1] * 67 + [2] * 66
    texts = parquet_of(tmp_path / "b.parquet", pairs[:3], label=["b", "a", "b"])
    words = open_layout(str(texts)).split("train")
    assert words.captions(0) == ["a photo of a b."]
    assert words.labels("label").ids.tolist() == [1, 0, 1]
    # Numbers keep their places although no row is of class 1, also where they are text.
    numbers = parquet_of(tmp_path / "c.parquet", pairs[:3], label=[10, 0, 2], text=["10", "0", "2"])
    for column in ("label", "text"):
        labels = open_layout(str(numbers)).split("train").labels(column)
        assert labels.ids.tolist() == [10, 0, 2]
        assert labels.names == [str(number) for number in range(11)]
    gaps = parquet_of(tmp_path / "d.parquet", pairs[:3], text=["x", None, "y"], caption=["a"] * 3)
    with pytest.raises(UserError, match=r"'text' names no class in 1 of 3 rows \(row 2\)"):
        open_layout(str(gaps)).split("train").labels("text")


def test_paths_within_a_table(pairs: list[Pair], tmp_path: Path) -> None:
    write_images(tmp_path / "pictures", pairs[:3])
    table = pa.table({"image_path": [p.file for p in pairs[:3]], "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "list.parquet")
    found = open_layout(str(tmp_path / "list.parquet")).split("train")
    assert pixels(found) == [decode_image(pair.png).tobytes() for pair in pairs[:3]]
    assert (
        open_layout(str(tmp_path)).describe().endswith("pictures beside the tables are not read: 3")
    )
    empty = {"bytes": None, "path": f"pictures/{pairs[0].file}"}
    image = pa.array([empty], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(pa.table({"image": image, "text": ["a"]}), tmp_path / "struct.parquet")
    assert pixels(open_layout(str(tmp_path / "struct.parquet")).split("train")) == pixels(found[:1])


# --- keys ------------------------------------------------------------------------------------


def test_key_tells_pictures_apart(pairs: list[Pair], tmp_path: Path) -> None:
    for folder, pair in (("cat", pairs[0]), ("dog", pairs[70])):
        write(tmp_path / "folders" / folder / "1.png", pair.png)
    assert open_layout(str(tmp_path / "folders")).split("train").keys() == [
        "cat/1.png",
        "dog/1.png",
    ]
    named = parquet_of(tmp_path / "a.parquet", pairs[:2], caption=["a", "b"], image_id=[11, 12])
    assert open_layout(str(named)).split("train").keys() == ["11", "12"]
    # The same picture twice and neither path nor id: its content is the key.
    twice = [pairs[0], pairs[70], pairs[0]]
    path = parquet_of(tmp_path / "b.parquet", twice, caption=["a", "b", "c"])
    first, second, third = open_layout(str(path)).split("train").keys()
    assert first == third != second
    # One name for every picture, as some converters write, says nothing.
    images = [{"bytes": pair.png, "path": "image.png"} for pair in (pairs[0], pairs[70])]
    longer = [*images, {"bytes": pairs[3].png + b" ", "path": "image.png"}]
    pq.write_table(pa.table({"image": longer, "caption": ["a", "b", "c"]}), tmp_path / "c.parquet")
    assert len(set(open_layout(str(tmp_path / "c.parquet")).split("train").keys())) == 3


def test_hold_out_keeps_a_picture_on_one_side(pairs: list[Pair], tmp_path: Path) -> None:
    write_images(tmp_path, pairs)
    rows = [[pair.file, str(n)] for n in range(5) for pair in pairs]
    path = write_csv(tmp_path / "list.csv", [["image", "caption"], *rows])
    found = open_layout(str(path)).split("train")
    train, validation = hold_out(found)
    assert (len(train), len(validation)) == (950, 50)
    assert not set(train.keys()) & set(validation.keys())
    assert len(hold_out(found, maximum=3)[1]) == 15
    grouped = group_by_picture(found)
    assert len(grouped) == 200
    assert grouped[7] == (found.image(7), ["0", "1", "2", "3", "4"], found.key(7))
    alone, other = hold_out(found[:2])
    assert (len(alone), len(other)) == (1, 1)
    with pytest.raises(UserError, match="at least two pictures"):
        hold_out(found[:1])


# --- lists -----------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_separator_is_found(separator: str, pairs: list[Pair], tmp_path: Path) -> None:
    write_images(tmp_path, pairs[:2])
    caption = f'A "tall" one{separator} with a hat,\nand more'
    rows = [["id", "Filename ", " comment"], *(["1", pair.file, caption] for pair in pairs[:2])]
    path = write_csv(tmp_path / "captions.txt", rows, separator)
    rows_found = open_layout(str(path)).split("train")
    assert rows_found.captions(1) == [caption]
    assert open_layout(str(tmp_path)).split("train").captions(0) == [caption]


def test_lists_as_they_are_found(pairs: list[Pair], tmp_path: Path) -> None:
    write_images(tmp_path, pairs[:3])
    a, b, c = (pair.file for pair in pairs[:3])
    raw = write(
        tmp_path / "raw.tsv", f'\ufefffile\tcaption\r\n{a}\t"half\r\n{b}\t"a" b\n\n{c}\tc\n'
    )
    assert [row.captions[0] for row in open_layout(str(raw)).split("train")] == [
        '"half',
        '"a" b',
        "c",
    ]
    fails(write(tmp_path / "b.csv", f"file,caption\n{a},one, two\n"), "line 2", "comma", "quotes")
    fails(
        write(tmp_path / "c.csv", f"{a},one\n{b},two\n"),
        "no column of picture paths",
        "image_column",
    )
    own = write(tmp_path / "own.csv", f"Bild;Was man sieht\n{a};eins\n{b};zwei\n")
    assert [row.captions for row in open_layout(str(own)).split("train")] == [["eins"], ["zwei"]]
    fails(write(tmp_path / "d.csv", "file,file\na,b"), "two columns of one name")
    fails(write(tmp_path / "e.csv", " \n"), "is empty")
    fails(write(tmp_path / "f.csv", "file,caption\n"), "'train' is empty")
    fails(write(tmp_path / "g.csv", b"file,caption\na,\xff\n"), "UTF-8", "line 2")
    fails(write(tmp_path / "h.jsonl", '{"file": "a"}\n{]'), "line 2")
    address = write(tmp_path / "i.csv", "image,caption\nhttp://x/y.jpg,a")
    fails(address, "addresses", "http://x/y.jpg")
    for name in ("NFC", "NFD"):
        write(tmp_path / unicodedata.normalize(name, f"{name}-é.png"), pairs[0].png)
    names = ["NFC-é.png", "NFD-é.png", f".\\{a}", str(tmp_path / b)]
    spelled = write_csv(tmp_path / "j.csv", [["file", "text"], *([name, "x"] for name in names)])
    assert len(pixels(open_layout(str(spelled)).split("train"))) == 4


def test_missing_pictures_are_an_error_or_a_note(pairs: list[Pair], tmp_path: Path) -> None:
    write_images(tmp_path, pairs)
    rows = [[pair.file, "a"] for pair in pairs]
    rows[4][0] = "gone.png"
    path = write_csv(tmp_path / "list.csv", [["file", "caption"], *rows])
    found = open_layout(str(path))
    assert len(found.split("train")) == 199
    assert (
        "left out of train: 1 of 200 pairs without a picture (row 5: gone.png)" in found.describe()
    )
    rows[9][1], rows[10][1], rows[11][1] = "", " ", ""
    write_csv(path, [["file", "caption"], *rows])
    fails(path, "1 of 200 pairs without a picture (row 5: gone.png)", "3 of 200", "row 10", "1%")


def test_metadata_lists_every_picture(pairs: list[Pair], tmp_path: Path) -> None:
    root = as_metadata(tmp_path / "a", pairs)
    write(root / "loose.png", pairs[0].png)
    assert "not in metadata.csv: 1 of 201 pictures (loose.png)" in open_layout(str(root)).describe()
    for number in range(4):
        write(root / f"loose{number}.png", pairs[0].png)
    fails(root, "not in metadata.csv: 5 of 205 pictures", "loose.png")
    assert len(open_layout(str(root / "metadata.csv")).split("train")) == 200
    write(root / "sub" / "metadata.csv", "file_name,text\n")
    fails(root, "several lists", "sub/metadata.csv")


# --- folders ---------------------------------------------------------------------------------


def test_text_files_need_partners(pairs: list[Pair], tmp_path: Path) -> None:
    root = as_text_files(tmp_path, pairs[:100])
    write(root / "LICENSE.txt", "free")
    write(root / "docs" / "about.txt", "in a folder without pictures")
    write(root / "blue ball 001.txt", "\ufeffone\r\n\r\ntwo\n")
    write(root / "lone.txt", "nothing")
    found = open_layout(str(root))
    assert len(found.split("train")) == 100
    assert found.split("train").captions(1) == ["one", "two"]
    assert "text files without a picture of their name: 1 (lone.txt)" in found.describe()
    write(root / "lone2.txt", "nothing")
    fails(root, "of their name: 2 (lone.txt, lone2.txt)")
    (root / "lone2.txt").unlink()
    for number in range(4):
        write(root / f"sub/{number}.png", pairs[0].png)
    fails(
        root,
        "text file of their name beside them: 4 of 104",
        "sub/0.png, sub/1.png, sub/2.png, ...",
    )


def test_clutter_and_links(pairs: list[Pair], tmp_path: Path) -> None:
    root = as_class_folders(tmp_path / "data", pairs[60:80])
    for clutter in (".hidden/x/a.png", "__MACOSX/y/._a.png", "blue ball/._b.png"):
        write(root / clutter, b"no picture")
    write(root / "Thumbs.db", b"")
    (root / "blue ball" / "again").symlink_to(root, target_is_directory=True)
    (root / "blue ball" / "twice").symlink_to(root / "gelbe Tür", target_is_directory=True)
    assert len(open_layout(str(root)).split("train")) == 20
    outside = write(tmp_path / "elsewhere" / "far.png", pairs[0].png)
    (root / "gelbe Tür" / "linked.png").symlink_to(outside)
    (root / "red").symlink_to(outside.parent, target_is_directory=True)
    (outside.parent / "back").symlink_to(root, target_is_directory=True)
    (root / "gelbe Tür" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (root / "itself").symlink_to(root / "itself")
    assert len(open_layout(str(root)).split("train")) == 22


def test_classes_below_splits_and_wrappers(pairs: list[Pair], tmp_path: Path) -> None:
    as_class_folders(tmp_path / "a" / "set" / "train", pairs[60:80])
    as_class_folders(tmp_path / "a" / "set" / "val", pairs[130:140])
    found = open_layout(str(tmp_path / "a"))
    assert {name: len(rows) for name, rows in found.splits.items()} == {
        "train": 20,
        "validation": 10,
    }
    names = ["blue ball", "gelbe Tür", "red car"]
    assert all(rows.class_names("label") == names for rows in found.splits.values())
    write(tmp_path / "a" / "set" / "train" / "loose.png", pairs[0].png)
    fails(tmp_path / "a", "outside the folders of classes: 1 of 31", "set/train/loose.png")
    write(tmp_path / "c" / "set" / "cat" / "1.png", pairs[0].png)
    write(tmp_path / "c" / "set" / "2.png", pairs[0].png)
    fails(tmp_path / "c", "outside the folders of classes: 1 of 2", "set/2.png")
    # A class may be called train, as long as another is not called test.
    write(tmp_path / "b" / "train" / "1.png", pairs[0].png)
    write(tmp_path / "b" / "plane" / "2.png", pairs[1].png)
    assert open_layout(str(tmp_path / "b")).split("train").class_names("label") == [
        "plane",
        "train",
    ]


# --- tar shards ------------------------------------------------------------------------------


def test_tar_fields(pairs: list[Pair], tmp_path: Path) -> None:
    record = json.dumps({"caption": ["a", "b"], "width": 8}).encode()
    members = [
        (f"x/{n}.{kind}", content)
        for n in range(3)
        for kind, content in (
            ("Seg.png", b"mask"),
            ("png", pairs[n].png),
            ("json", record),
            ("cls", b"1"),
        )
    ]
    write(tmp_path / "classnames.txt", "cat\nsea_lion\n")
    path = write_tar(tmp_path / "test" / "0.tar", members)
    rows = open_layout(str(tmp_path)).split("test")
    assert (rows.keys(), rows.captions(2)) == (["0", "1", "2"], ["a", "b"])
    assert (rows.column("width"), rows.class_names("cls")) == ([8, 8, 8], ["cat", "sea lion"])
    assert open_layout(str(path), caption_column="cls").split("train").captions(0) == [
        "a photo of a sea lion."
    ]
    assert open_layout(str(path), image_column="seg.png").split("train").image(0) == b"mask"
    fails(path, "data.image_column 'jpg'", "seg.png, png, json, cls", image_column="jpg")
    broken = [("a.png", pairs[0].png), ("a.json", b"{")]
    fails(write_tar(tmp_path / "c.tar", broken), "a.json", "is no JSON object")
    lines = [("a.png", pairs[0].png), ("a.txt", b"one\ntwo\n"), ("b.jpg", b"x"), ("b.txt", b"y")]
    several = open_layout(str(write_tar(tmp_path / "d.tar", lines))).split("train")
    assert list(several.all_captions()) == [["one", "two"], ["y"]]
    fails(write_tar(tmp_path / "b.tar", [("a.txt", b"x")]), "no pictures were found")


def test_names_that_shards_repeat(pairs: list[Pair], tmp_path: Path) -> None:
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", [("0.png", pairs[0].png), ("0.txt", b"x")])
    assert open_layout(str(tmp_path)).split("train").keys() == ["a/0", "b/0"]
    path = write_tar(tmp_path / "c.tar", [("0.png", b"x"), ("0.png", b"y")])
    fails(path, "holds '0.png' twice")


def test_damaged_tars(pairs: list[Pair], tmp_path: Path) -> None:
    content = Path(str(as_tar(tmp_path / "a", pairs)).replace("{000..003}", "000")).read_bytes()
    fails(write(tmp_path / "cut.tar", content[:700]), "cut.tar", "cannot be read as tar")
    bad = content[:5120] + b"x" * 512 + content[5632:]
    fails(write(tmp_path / "bad.tar", bad), "damaged after 5120 bytes")
    fails(write(tmp_path / "no.tar", b"no tar at all"), "no.tar", "cannot be read as tar")
    packed = tmp_path / "packed.tar"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(tmp_path / "no.tar")
    fails(packed, "compressed")
    fails(tmp_path / "a" / "shards-{000..005}.tar", "2 of 6 files are missing", "shards-004.tar")
    fails(tmp_path / "a" / "shard-{0..5}.tar", "matches no file", "shard-0.tar")
    write(tmp_path / "a" / "loose.png", pairs[0].png)
    fails(tmp_path / "a", "tar files (shards-000.tar", "pictures (loose.png)")


# --- what fits nothing -----------------------------------------------------------------------


def test_what_fits_no_layout(pairs: list[Pair], tmp_path: Path) -> None:
    write(tmp_path / "emoji" / "notes.pdf", b"")
    fails(tmp_path / "emojis", "data.dataset", "does not exist; close to it", "/emoji")
    fails(tmp_path / "emoji", "holds 1 .pdf", "accepted are", "webdataset")
    fails(tmp_path / "emoji" / "notes.pdf", ".pdf", "accepted are")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "holds no files", option="EvalData.path")
    fails(write_images(tmp_path / "flat", pairs[:3]), "3 pictures, but neither captions")
    fails(write(tmp_path / "a.parquet", b"no parquet"), "a.parquet", "cannot be read as parquet")
    fails(write(tmp_path / "b.parquet", b"version https://git-lfs.github.com"), "git lfs pull")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "c.parquet")
    fails(tmp_path / "c.parquet", "no column of pictures", "data.image_column", "one of: a")
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    pq.write_table(schema.empty_table(), tmp_path / "d.parquet")
    fails(tmp_path / "d.parquet", "split 'train' is empty")


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    fails("org/name", "data.dataset", "is no path here, and the hub cannot give", "Offline")


# --- real data -------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not here")
@pytest.mark.parametrize(
    ("folder", "sizes", "captions"),
    [
        ("emoji_vendors", [3161, 78, 841, 175, 175], "caption"),
        ("grocery_store", [2640, 296, 2485, 81], "caption"),
        ("lucide_icons", [1326, 150, 300], "caption"),
        ("coco_mini", [51], "captions"),
        ("dreambooth_subjects", [158], "label"),
    ],
)
def test_real_data(folder: str, sizes: list[int], captions: str) -> None:
    found = open_layout(str(REAL / folder))
    assert [len(rows) for rows in found.splits.values()] == sizes
    assert found.caption_column == captions
    assert not found.notes
    for rows in found.splits.values():
        row = rows[len(rows) // 2]
        assert row.captions
        assert decode_image(row.image).mode == "RGB"
        assert len(set(rows.keys())) == len(rows)
    if "label" in found.columns:
        assert len(found.split("test").labels("label").names) == (81 if folder[0] == "g" else 15)
