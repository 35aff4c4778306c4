"""Rows of a stream of which nothing can be made: others of the batch stand in, and say so."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.data.streaming.reading import SHARD_CANNOT_BE_READ
from clipkit.errors import UserError

from .conftest import WRITERS, encoded


def write_with(folder, bad, size=64):
    """One parquet file in which some rows are not what they should be."""
    pictures, captions = [], []
    for row in range(size):
        picture, text = encoded(0, row), f"picture {row}"
        match bad.get(row):
            case "truncated":
                picture = picture[: len(picture) // 2] + f"{row}".encode()
            case "not a picture":
                picture = b"<html>"
            case "no picture":
                picture = None
            case "no caption":
                text = "  "
        pictures.append({"bytes": picture, "path": None})
        captions.append(text)
    names = [f"row {row}" for row in range(size)]
    table = pa.table({"image": pictures, "caption": captions, "id": names})
    Path(folder).mkdir()
    pq.write_table(table, f"{folder}/train.parquet", row_group_size=16)
    return folder


BAD = {5: "truncated", 17: "not a picture", 18: "no caption", 40: "no picture"}


@pytest.mark.parametrize("workers", [0, 2])
def test_others_stand_in(pairs, tmp_path, workers):
    data = pairs(write_with(f"{tmp_path}/data", BAD), num_workers=workers)
    batches = list(data.train_dataloader())
    data.teardown("fit")
    assert {len(batch["rows"]) for batch in batches} == {4}
    broken = [broken for batch in batches for broken in batch["broken"]]
    held_out = {row.key for row in data.load("validation")}
    file = f"{tmp_path}/data/train.parquet"
    assert {(b.shard, b.row, b.key): b.reason for b in broken} == {
        (file, row, f"row {row}"): reason
        for row, reason in BAD.items()
        if f"row {row}" not in held_out
    }
    for batch in batches:
        bad = {b.row for b in batch["broken"]}
        rows = batch["rows"].tolist()
        assert len(set(rows)) == 4 - len(bad)


@pytest.mark.parametrize("layout", ["parquet", "arrow", "tar", "list"])
def test_rows_are_named_as_their_file_counts_them(pairs, write, layout):
    """Behind the first piece of a file too, and once, however many captions a row has."""
    path = write(layout, [2100])
    damage(path, layout, 1050)
    data = pairs(path, captions="all", batch_size=20, shuffle_window=128, max_validation_pairs=1)
    broken = [b for batch in data.train_dataloader() for b in batch["broken"]]
    data.teardown("fit")
    shard = "" if layout == "list" else f"{path}/train-000.{layout}"
    assert {(b.shard, b.row) for b in broken} == {(shard, 1050)}
    assert {b.reason for b in broken} == {"not a picture"}


def damage(path, layout, row):
    """Put in place of one picture what is none, and give its row two captions."""
    picture, file = encoded(0, row), Path(path) / f"train-000.{layout}"
    if layout == "list":
        (Path(path).parent / f"0-{row}.png").write_bytes(b"<html>" + picture)
        return
    if layout == "tar":
        content = file.read_bytes()
        assert content.count(picture) == 1
        file.write_bytes(content.replace(picture, b"<html>".ljust(len(picture))))
        return
    table = pq.read_table(file) if layout == "parquet" else pa.ipc.open_stream(str(file)).read_all()
    pictures = table.column("image").to_pylist()
    pictures[row]["bytes"] = b"<html>"
    texts = [[text, text + " again"] for text in table.column("caption").to_pylist()]
    table = table.set_column(0, "image", pa.array(pictures)).set_column(1, "caption", [texts])
    new = file.with_name("new")  # the old one is mapped
    if layout == "parquet":
        pq.write_table(table, new, row_group_size=100)
    else:
        with pa.ipc.new_stream(str(new), table.schema) as writer:
            writer.write_table(table)
    new.replace(file)


def test_a_share_of_one_pair(pairs, tmp_path):
    data = pairs(write_with(f"{tmp_path}/data", BAD), batch_size=1)
    with pytest.raises(UserError, match=r"only the 1 pairs of a rank's share .* data\.batch_size"):
        list(data.train_dataloader())
    data.teardown("fit")


def test_nothing_but_broken_rows(pairs, tmp_path):
    folder = write_with(f"{tmp_path}/data", dict.fromkeys(range(64), "truncated"))
    data = pairs(folder)
    with pytest.raises(UserError, match="4 pairs tried in turn cannot be used"):
        list(data.train_dataloader())
    data.teardown("fit")


def fit(command, folder, *words):
    return command(
        "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", folder, "--run_name=run",
        "--data.streaming=true", "--trainer.max_steps=16", "--trainer.max_epochs=2", *words,
    )  # fmt: skip


def test_the_quarantine_names_them(workdir, command, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS["tar"](folder, [20, 20, 20, 20, 20], damage=[3])
    assert fit(command, folder, "--data.max_broken_ratio=0.1") == 0
    text = Path("runs/tiny/run/quarantine.jsonl").read_text()
    (line,) = [json.loads(line) for line in text.splitlines()]
    assert line["reason"] == SHARD_CANNOT_BE_READ
    assert line["key"] == line["shard"] == str(folder / "train-003.tar")
    assert line["row"] == 3
    assert "unexpected end of data" in line["detail"]
    assert line["source"] == "train"
    logged = map(json.loads, Path("runs/tiny/run/metrics.jsonl").read_text().splitlines())
    assert [entry["data/replaced"] for entry in logged if "data/replaced" in entry][-1] == 2


def test_too_many_end_the_run(workdir, command, tmp_path, capsys):
    folder = write_with(f"{tmp_path}/data", dict.fromkeys(range(0, 64, 3), "truncated"))
    assert fit(command, folder) == 2
    assert "data.max_broken_ratio, 0.01, allows" in capsys.readouterr().err


def test_a_sample_without_text_and_one_with_bad_json(pairs, tmp_path):
    """One bad sample of a tar costs nothing but itself."""
    import io
    import tarfile

    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "train.tar", "w") as archive:
        for row in range(80):
            fields = {"png": encoded(0, row), "json": json.dumps({"caption": f"p {row}"}).encode()}
            if row == 50:
                fields["json"] = b"{"
            if row == 51:
                del fields["json"]
            if row == 52:
                del fields["png"]
            for field, content in fields.items():
                member = tarfile.TarInfo(f"{row}.{field}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    data = pairs(str(folder))
    batches = list(data.train_dataloader())
    data.teardown("fit")
    broken = Counter(b.reason for batch in batches for b in batch["broken"])
    assert broken == {"wrong type": 2, "no caption": 1} or broken.total() == 3 - len(
        {"50", "51", "52"} & {row.key for row in data.load("validation")}
    )


def test_a_damaged_page_in_the_middle(pairs, write):
    """Of a parquet file that is damaged within, the rest of the shard is given up, and no more."""
    folder = write("parquet", [3000, 8])
    path = Path(folder) / "train-000.parquet"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    path.write_bytes(bytes(content))
    data = pairs(folder, shuffle_window=512)
    batches = list(data.train_dataloader())
    data.teardown("fit")
    reasons = Counter(b.reason for batch in batches for b in batch["broken"])
    assert reasons.total() > 0
    assert set(reasons) <= {SHARD_CANNOT_BE_READ, "damaged", "not a picture", "truncated",
                            "empty file", "wrong type"}  # fmt: skip
    assert sum(len(batch["rows"]) for batch in batches) > 1500
