"""Broken rows: others stand in, counts add up, and too many end the run."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from clipkit.callbacks import quarantine
from clipkit.data import Filters, HuggingFacePairs
from clipkit.data.broken import ATTEMPTS, Broken
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer


def damage(path, how):
    content = path.read_bytes()
    {
        "truncated": lambda: path.write_bytes(content[: len(content) // 2]),
        "empty file": lambda: path.write_bytes(b""),
        "not a picture": lambda: path.write_bytes(b"<html>not found</html>"),
        "missing file": path.unlink,
        "too large": lambda: Image.new("1", (20_000, 20_000)).save(path),
    }[how]()


@pytest.fixture
def many(tmp_path):
    """400 pictures in a list, 400 captions."""
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    with (folder / "list.csv").open("w") as file:
        file.write("path,caption\n")
        for number in range(400):
            pixels = rng.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:03d}.png")
            file.write(f"{number:03d}.png,picture number {number}\n")
    return folder


def fit(command, data, *words):
    return command(
        "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", data / "list.csv",
        "--run_name=run", "--data.batch_size=20", "--trainer.max_epochs=2", *words,
    )  # fmt: skip


def named(run="runs/tiny/run"):
    return [json.loads(line) for line in Path(run, "quarantine.jsonl").read_text().splitlines()]


def replaced(run="runs/tiny/run"):
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return [line["data/replaced"] for line in lines if "data/replaced" in line]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_few_are_replaced(workdir, command, many, capsys, workers):
    kinds = ["truncated", "not a picture", "too large"]
    data = HuggingFacePairs(
        str(many / "list.csv"), image_size=16, tokenizer=Tokenizer("english"), batch_size=20
    )
    train = data.evaluation_rows("train")
    chosen = {train.key(row): kind for row, kind in zip((0, 20, 40), kinds, strict=True)}
    for key, kind in chosen.items():
        damage(many / f"{key}.png", kind)
    assert fit(command, many, f"--data.num_workers={workers}") == 0
    assert {line["key"]: line["reason"] for line in named()} == chosen
    assert {line["source"] for line in named()} == {"train"}
    # 380 pairs, all of them once an epoch, by 20: each broken one is met twice.
    assert replaced()[-1] == 6
    output = capsys.readouterr().out
    assert "6 (" in output
    assert all(f"{kind} 2" in output for kind in kinds)
    assert "of 760 samples were replaced" in output


def test_too_many_end_the_run(workdir, command, many, capsys):
    for path in sorted(many.glob("*.png"))[::20]:
        damage(path, "truncated")
    assert fit(command, many) == 2
    captured = capsys.readouterr()
    assert "data.max_broken_ratio, 0.01, allows" in captured.err
    assert "truncated" in captured.err
    assert captured.err.count("\n") == 1
    assert fit(command, many, "--data.max_broken_ratio=0.1", "--run_name=allowed") == 0
    assert len(named("runs/tiny/allowed")) == 20


def test_what_stands_in_is_a_function_of_the_seed(many):
    def batches(workers):
        data = HuggingFacePairs(
            str(many / "list.csv"), image_size=16, tokenizer=Tokenizer("english"), batch_size=20,
            num_workers=workers, seed=3,
        )  # fmt: skip
        data.setup("fit")
        return data.load("train"), list(data.train_dataloader())

    for path in sorted(many.glob("*.png"))[::25]:
        damage(path, "truncated")
    (train, alone), (_, shared) = batches(0), batches(2)
    assert Counter(len(batch["rows"]) for batch in alone) == {20: 19}
    assert sum(not b.stands_in for batch in alone for b in batch["broken"]) > 10
    for ours, theirs in zip(alone, shared, strict=True):
        assert ours["broken"] == theirs["broken"]
        assert (ours["images"] == theirs["images"]).all()
        assert (ours["rows"] == theirs["rows"]).all()
        broken = {b.row for b in ours["broken"]}
        assert not broken & set(map(train.position, ours["rows"].tolist()))


def test_a_row_is_named_as_the_data_set_counts_it(many):
    """Whatever filters and validation leave of it, and once for all its captions."""
    damage(many / "199.png", "truncated")
    (many / "list.csv").write_text(
        "path,caption_1,caption_2\n"
        + "".join(f"{n:03d}.png,{'a cat' if n % 2 else 'x'},a dog {n}\n" for n in range(400))
    )
    data = HuggingFacePairs(
        str(many / "list.csv"), image_size=16, tokenizer=Tokenizer("english"), batch_size=20,
        caption_column="caption_*", filters=Filters(min_words=2, max_words=2), captions="all",
    )  # fmt: skip
    data.setup("fit")
    broken = {(b.row, b.key) for batch in data.train_dataloader() for b in batch["broken"]}
    assert broken == {(199, "199")}


def test_names_of_any_letters_are_read_back(tmp_path):
    """Some separate lines to Python; and a line that a kill has torn takes no other with it."""
    file = tmp_path / quarantine.FILE

    def append(row, name):
        found = Broken(row, name, "damaged", "", shard="shard" * (row % 2))
        place = quarantine._place("train", found)
        quarantine._append(file, [quarantine._line(place, found)])
        return place

    names = ("a\u2028b", "a\x85b", "a\x0cb", "\udcff\n")
    places = {append(row, name) for row, name in enumerate(names)}
    assert len(places) == len(names)
    assert quarantine._named_in(file) == places
    with file.open("a") as stream:
        stream.write('{"source": "train", "ro')
    assert quarantine._named_in(file) == places
    places.add(append(7, "behind it"))
    assert quarantine._named_in(file) == places


def test_nothing_but_broken_pictures(many):
    for path in many.glob("*.png"):
        damage(path, "truncated")
    data = HuggingFacePairs(
        str(many / "list.csv"), image_size=16, tokenizer=Tokenizer("english"), batch_size=20
    )
    data.setup("fit")
    with pytest.raises(UserError, match=f"{ATTEMPTS + 1} pairs tried in turn"):
        next(iter(data.train_dataloader()))


def test_broken_validation_pictures_are_left_out(workdir, command, many):
    shutil.copytree(many, workdir / "broken")
    data = HuggingFacePairs(
        "broken/list.csv", image_size=16, tokenizer=Tokenizer("english"), batch_size=20
    )
    key = data.evaluation_rows("validation").key(0)
    damage(workdir / "broken" / f"{key}.png", "truncated")
    words = ["--data.max_broken_ratio=0.1", "--model.optimizer.lr=0"]
    assert fit(command, workdir / "broken", *words) == 0
    assert [(line["source"], line["key"]) for line in named()] == [("validation", key)]
    assert replaced() == []


@pytest.fixture
def grocery(tmp_path, shared_data):
    """A copy of the photos, some of them damaged: gives where, and each one's key and reason."""
    folder = shared_data / "grocery_store" / "data"

    def damaged(share):
        table = parquet.read_table(folder / "train-00000-of-00001.parquet")
        pictures = [row["bytes"] for row in table["image"].to_pylist()]
        rng = np.random.default_rng(7)
        chosen = rng.choice(len(pictures), round(share * len(pictures)), replace=False)
        reasons = {}
        for place, row in enumerate(chosen.tolist()):
            reason, content = [
                ("truncated", pictures[row][: len(pictures[row]) * 2 // 3]),
                ("not a picture", b"<html>" + pictures[row]),
                ("no picture", b""),
            ][place % 3]
            pictures[row], reasons[row] = content, reason
        column = pa.array([{"bytes": content, "path": None} for content in pictures])
        table = table.set_column(table.column_names.index("image"), "image", column)
        copy = tmp_path / f"grocery-{share}" / "data"
        copy.mkdir(parents=True)
        parquet.write_table(table, copy / "train-00000-of-00001.parquet")
        shutil.copy(folder / "validation-00000-of-00001.parquet", copy)
        return copy.parent, reasons

    return damaged


@pytest.mark.parametrize("workers", [0, 2])
def test_photos_of_which_one_in_two_hundred_is_damaged(workdir, command, grocery, capsys, workers):
    data, reasons = grocery(0.005)
    assert len(reasons) == 13
    assert fit_photos(command, data, f"--data.num_workers={workers}") == 0
    found = {line["row"]: line["reason"] for line in named() if line["source"] == "train"}
    assert found == reasons
    # 66 batches of 40: every one of the 2640 once.
    assert replaced()[-1] == len(reasons)
    assert "of 2,640 samples were replaced" in capsys.readouterr().out


def test_photos_of_which_one_in_twenty_is_damaged(workdir, command, grocery, capsys):
    data, reasons = grocery(0.05)
    assert len(reasons) == 132
    assert fit_photos(command, data) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "data.max_broken_ratio, 0.01, allows" in error
    told = error.split("(")[1].split(")")[0].split(", ")
    counts = {words.rpartition(" ")[0]: int(words.rpartition(" ")[2]) for words in told}
    # Rows are named too that were to stand in for others.
    assert Counter(counts) <= Counter(line["reason"] for line in named())
    assert sum(counts.values()) == int(error.removeprefix("clipkit: data: ").split()[0])
    assert {line["row"] for line in named()} <= set(reasons)


def fit_photos(command, data, *words):
    return command(
        "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", data, "--run_name=run",
        "--data.batch_size=40", *words,
    )  # fmt: skip
