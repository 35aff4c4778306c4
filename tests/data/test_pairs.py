"""Batches: the same from any layout, any number of workers and ranks."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data import HuggingFacePairs, ShapesPairs
from clipkit.data.drawing import captions as captions_of
from clipkit.data.drawing import draw, sample
from clipkit.data.sampling import EvaluationSampler, Permutation, TrainSampler
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer

SIZE = 16


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("english", context_length=24)


def data_module(folder, tokenizer, **arguments):
    arguments = {"batch_size": 8, "seed": 3, **arguments}
    return HuggingFacePairs(str(folder), image_size=SIZE, tokenizer=tokenizer, **arguments)


def epoch(data, number=0, stage="fit"):
    data.setup(stage)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def same(left, right):
    def equal(one, other):
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    return len(left) == len(right) and all(
        all(equal(a[name], b[name]) for name in a) for a, b in zip(left, right, strict=True)
    )


# --- The same pairs in six layouts ---------------------------------------------------------------


@pytest.fixture(scope="module")
def six_layouts(tmp_path_factory):
    """200 drawn pictures with captions, kept in six ways."""
    import io
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path_factory.mktemp("layouts")
    pairs = []
    for index in range(200):
        drawing = sample(7, "test", index)
        buffer = io.BytesIO()
        Image.fromarray(draw(drawing, 20)).save(buffer, "PNG")
        pairs.append((f"{index:04d}", buffer.getvalue(), f"a photo of a {drawing.shape}."))

    def folder(name):
        (root / name).mkdir()
        return root / name

    pictures = folder("metadata")
    with (pictures / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        for key, image, caption in pairs:
            (pictures / f"{key}.png").write_bytes(image)
            writer.writerow([f"{key}.png", caption])
    beside = folder("beside")
    for key, image, caption in pairs:
        (beside / f"{key}.png").write_bytes(image)
        (beside / f"{key}.txt").write_text(caption)
    table = folder("tsv")
    (table / "images").mkdir()
    lines = ["filepath\ttitle"]
    for key, image, caption in pairs:
        (table / "images" / f"{key}.png").write_bytes(image)
        lines.append(f"images/{key}.png\t{caption}")
    (table / "pairs.tsv").write_text("\n".join(lines))
    parquet = folder("parquet")
    pq.write_table(
        pa.table(
            {
                "image": [{"bytes": image, "path": f"{key}.png"} for key, image, _ in pairs],
                "caption": [caption for *_, caption in pairs],
            }
        ),
        parquet / "train.parquet",
    )
    shards = folder("shards")
    for shard in range(4):
        with tarfile.open(shards / f"{shard:03d}.tar", "w") as tar:
            for key, image, caption in pairs[50 * shard : 50 * shard + 50]:
                for name, content in ((f"{key}.png", image), (f"{key}.txt", caption.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    jsonl = folder("jsonl")
    for key, image, _ in pairs:
        (jsonl / f"{key}.png").write_bytes(image)
    (jsonl / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f"{key}.png", "text": text}) for key, _, text in pairs)
    )
    return {
        "metadata.csv": pictures,
        "metadata.jsonl": jsonl,
        "text beside pictures": beside,
        "tsv": table / "pairs.tsv",
        "parquet": parquet,
        "tar shards": f"{shards}/{{000..003}}.tar",
    }


def test_six_layouts_give_the_same_batches(six_layouts, tokenizer):
    reference = None
    for name, path in six_layouts.items():
        data = data_module(path, tokenizer)
        batches = epoch(data, 1)
        held_out = list(data.val_dataloader())
        assert len(batches) == 190 // 8
        assert sum(len(b["rows"]) for b in held_out) == 10
        if reference is None:
            reference = batches, held_out
        assert same(batches, reference[0]), name
        assert same(held_out, reference[1]), name


# --- Order, augmentation, workers, ranks ---------------------------------------------------------


def test_workers_change_nothing(pictures, tokenizer):
    with_none = epoch(data_module(pictures, tokenizer, num_workers=0), 2)
    with_two = epoch(data_module(pictures, tokenizer, num_workers=2), 2)
    assert same(with_none, with_two)


def test_epochs_and_seeds_differ_and_repeat(pictures, tokenizer):
    data = data_module(pictures, tokenizer)
    assert same(epoch(data, 1), epoch(data_module(pictures, tokenizer), 1))
    assert not same(epoch(data, 1), epoch(data, 2))
    assert not same(epoch(data, 1), epoch(data_module(pictures, tokenizer, seed=4), 1))


def test_one_picture_is_augmented_anew_each_epoch(pictures, tokenizer):
    def picture_of_row_0(number):
        for batch in epoch(data_module(pictures, tokenizer, batch_size=1), number):
            if batch["rows"].item() == 0:
                return batch["images"]
        return None

    assert not torch.equal(picture_of_row_0(0), picture_of_row_0(1))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_same_global_batches(world_size):
    def keys(rank, size):
        order = Permutation(50, seed=5)
        sampler = TrainSampler(range(50), order=order, batch_size=8, rank=rank, world_size=size)
        sampler.set_epoch(3)
        return list(sampler), len(sampler)

    whole, _ = keys(0, 1)
    shares = [keys(rank, world_size) for rank in range(world_size)]
    share = 8 // world_size
    for step in range(6):
        together = [k for s, _ in shares for k in s[step * share : (step + 1) * share]]
        assert together == whole[step * 8 : step * 8 + 8]
    assert all(len(s) == length for s, length in shares)
    assert len({key.number for key in whole}) == 48


@pytest.mark.parametrize(("length", "world_size"), [(10, 1), (10, 3), (2, 4)])
def test_evaluation_deals_every_row_and_keeps_ranks_in_step(length, world_size):
    shares = [
        list(EvaluationSampler(range(length), length=length, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert {key.number for share in shares for key in share} == set(range(length))


# --- Captions and duplicates ---------------------------------------------------------------------


@pytest.fixture
def many_captions(tmp_path):
    for index in range(6):
        drawing = sample(0, "test", index)
        Image.fromarray(draw(drawing, 20)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("\n".join(captions_of(drawing)))
    return tmp_path


def texts(batches, tokenizer):
    return [tokenizer.decode(row) for batch in batches for row in batch["tokens"]]


@pytest.mark.parametrize("policy", ["first", "longest", "random", "all"])
def test_caption_policies(many_captions, tokenizer, policy):
    data = data_module(many_captions, tokenizer, captions=policy, batch_size=1)
    found = [texts(epoch(data, number), tokenizer) for number in (0, 1)]
    of_row = {i: captions_of(sample(0, "test", i)) for i in range(6)}
    if policy == "all":
        assert len(found[0]) == 5 * 7  # one picture is held out
        assert sorted(found[0]) == sorted(found[1])
    elif policy == "random":
        assert sorted(found[0]) != sorted(found[1])
        assert set(found[0]) <= {text for all_texts in of_row.values() for text in all_texts}
    else:
        choose = (lambda c: c[0]) if policy == "first" else (lambda c: max(c, key=len))
        assert set(found[0]) <= {choose(c) for c in of_row.values()}
        assert sorted(found[0]) == sorted(found[1])


def test_equal_captions_and_pictures_have_equal_ids(tmp_path, tokenizer):
    drawing = Image.fromarray(draw(sample(0, "test", 0), 20))
    other = Image.fromarray(draw(sample(0, "test", 1), 20))
    for name, image, caption in [
        ("a", drawing, "A red Circle"), ("b", other, "a red circle "), ("c", drawing, "another"),
        ("d", other, "a much longer caption, so that all of them are padded differently"),
    ]:  # fmt: skip
        image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    (tmp_path / "validation").mkdir()
    from clipkit.data.caption_choice import CaptionChoice
    from clipkit.data.layouts import open_layout
    from clipkit.data.samples import PairCollate, PairDataset, Pixels
    from clipkit.data.sampling import SampleKey

    shutil.rmtree(tmp_path / "validation")
    rows = open_layout(str(tmp_path)).split("train")
    data = PairDataset(
        rows,
        pixels=Pixels(SIZE, "shortest", "bicubic"),
        augment=None,
        captions=CaptionChoice("first"),
        seed=0,
    )
    batch = PairCollate(tokenizer)([data[SampleKey(0, i)] for i in range(4)])
    a, b, c, d = batch["caption_ids"].tolist()
    assert a == b
    assert len({a, c, d}) == 3
    a, b, c, d = batch["image_ids"].tolist()
    assert (a, b) == (c, d)
    assert a != b
    # The id is the caption's own, whatever it is padded with.
    alone = PairCollate(tokenizer)([data[SampleKey(0, 0)]])
    assert alone["caption_ids"][0] == batch["caption_ids"][0]


def test_cut_captions_are_marked(tmp_path):
    short = Tokenizer("english", context_length=6)
    for index in range(4):
        Image.fromarray(draw(sample(0, "test", index), 20)).save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a red circle " * (1 + 3 * (index % 2)))
    data = data_module(tmp_path, short, batch_size=1)
    batches = epoch(data)
    assert {batch["truncated"].item() for batch in batches} == {True, False}
    for batch in batches:
        (caption,) = data.load("train").captions(batch["rows"].item())
        assert batch["truncated"].item() == (len(caption) > 12)
        assert batch["tokens"][0, -1] == short.contract.end_id


# --- Sizes ---------------------------------------------------------------------------------------


def test_a_typed_batch_that_cannot_be_filled_is_an_error(pictures, tokenizer):
    data = data_module(pictures, tokenizer, batch_size=64)
    with pytest.raises(UserError, match=r"data\.batch_size: 64 is more than the 23 pairs"):
        data.setup("fit")


def test_a_recipes_batch_shrinks_to_half_the_data(pictures, tokenizer, caplog):
    data = data_module(pictures, tokenizer, batch_size=64, shrink_batch=True)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert data.batch_size == 11
    assert "data.batch_size is 11" in caplog.text


def test_a_batch_must_divide_over_the_ranks(pictures, tokenizer, monkeypatch):
    data = data_module(pictures, tokenizer, batch_size=9)
    monkeypatch.setattr(type(data), "_world_size", 2)
    with pytest.raises(UserError, match="shared by 2 ranks"):
        data.setup("fit")


def test_one_line_says_what_was_recognised(pictures, tokenizer, caplog):
    with caplog.at_level("INFO"):
        data_module(pictures, tokenizer).setup("fit")
    (line,) = [r.getMessage() for r in caplog.records if r.name.startswith("clipkit")]
    for part in ("metadata", "24 pairs", "caption", "held out"):
        assert part in line


def test_an_image_size_must_be_known(pictures, tokenizer):
    data = HuggingFacePairs(str(pictures), tokenizer=tokenizer, batch_size=2)
    with pytest.raises(UserError, match=r"data\.image_size"):
        data.setup("fit")


# --- Drawn pictures ------------------------------------------------------------------------------


def test_drawn_pictures_need_no_files(tokenizer):
    data = ShapesPairs(length=32, batch_size=8, image_size=SIZE, tokenizer=tokenizer, seed=0)
    batches = epoch(data)
    assert len(batches) == 4
    assert batches[0]["images"].shape == (8, 3, SIZE, SIZE)
    assert len(np.unique(torch.cat([b["rows"] for b in batches]))) == 32
    unseen = data.load("unseen")
    labels = unseen.labels("label")
    assert len(labels.names) >= 64
    trained = set(data.load("train").labels("label").ids.tolist())
    assert not trained & set(labels.ids.tolist())


def test_a_split_that_is_not_drawn(tokenizer):
    data = ShapesPairs(image_size=SIZE, tokenizer=tokenizer)
    with pytest.raises(UserError, match="no 'tset'"):
        data.load("tset")


def test_real_emoji(shared_data: Path, tokenizer):
    data = data_module(shared_data / "emoji_vendors", tokenizer, caption_column="captions")
    data.setup("fit")
    assert (len(data.load("train")), len(data.load("validation"))) == (3161, 78)
    rows = data.evaluation_rows("test", caption_column="caption")
    assert all(len(texts) == 1 for texts in rows.all_captions())
