"""Caption columns with weights, captions within JSON, negatives and filters of one source."""

import io
import json
import math
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clipkit.data import Filters, HuggingFacePairs
from clipkit.data.caption_choice import CaptionChoice
from clipkit.data.captions import encode_captions
from clipkit.data.drawing import draw, sample
from clipkit.data.layouts import open_layout
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("english", context_length=24)


def png(index):
    buffer = io.BytesIO()
    Image.fromarray(draw(sample(0, "test", index), 20)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def table(tmp_path):
    """Writes a parquet file of pictures with the columns it is given, and returns its path."""

    def written(name="data.parquet", **columns):
        number = len(next(iter(columns.values())))
        images = pa.array([png(index) for index in range(number)], pa.binary())
        pq.write_table(pa.table({"image": images, **columns}), tmp_path / name)
        return str(tmp_path / name)

    return written


def module_of(path, tokenizer, **arguments):
    arguments = {"batch_size": 10, "seed": 3, "image_size": 16, **arguments}
    return HuggingFacePairs(path, tokenizer=tokenizer, **arguments)


def epoch_of(data, number=0):
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            other = theirs[name]
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, name


# --- Columns with weights ------------------------------------------------------------------------

WEIGHTS = {"alt": 0.3, "syn": 0.7}


def weighed(table, rows=400):
    """Rows with both columns, and a tenth with only the first."""
    syn = [None if n % 10 == 0 else [f"syn one {n}", f"syn two {n}"] for n in range(rows)]
    return table(alt=[f"alt {n}" for n in range(rows)], syn=pa.array(syn, pa.list_(pa.string())))


def share_of_alt(data, tokenizer, epochs=range(3)):
    drawn = Counter()
    ids = {text: text.split()[0] for texts in data.load("train").all_captions() for text in texts}
    number = {
        int(encode_captions(tokenizer, [text]).ids[0]): column for text, column in ids.items()
    }
    for epoch in epochs:
        for batch in epoch_of(data, epoch):
            drawn.update(number[int(i)] for i in batch["caption_ids"])
    return drawn["alt"] / drawn.total(), drawn.total()


def test_columns_are_drawn_by_their_weights(table, tokenizer):
    data = module_of(weighed(table), tokenizer, caption_column=WEIGHTS)
    share, number = share_of_alt(data, tokenizer)
    expected = 0.1 + 0.9 * 0.3  # rows that have the one alone take that
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / number)


def test_drawing_follows_the_weights_of_those_that_have_captions():
    choice = CaptionChoice("first", (1.0, 2.0, 5.0))
    rng = np.random.default_rng(0)
    counts = np.array([1, 2, 0])
    found = Counter(choice.of("abc", counts, length=len, rng=rng) for _ in range(6000))
    assert set(found) == {"a", "b"}
    assert abs(found["b"] / 6000 - 2 / 3) < 0.03
    assert choice.of_evaluation().of("abc", counts, length=len, rng=rng) == "b"
    longest = CaptionChoice("longest", (1.0, 0.5))
    only = np.array([0, 3])
    assert longest.of(["a", "bbb", "cc"], only, length=len, rng=rng) == "bbb"


@pytest.mark.parametrize("policy", ["random", "first", "longest"])
def test_caches_and_workers_change_nothing(table, tokenizer, tmp_path, policy):
    path = weighed(table, 60)
    arguments = {"caption_column": WEIGHTS, "captions": policy, "negative_column": "syn"}
    plain = epoch_of(module_of(path, tokenizer, **arguments), 2)
    kept = {"cache_tokens": True, "cache_folder": str(tmp_path / "cache")}
    for more in (kept, {"num_workers": 2}):
        assert_same_batches(plain, epoch_of(module_of(path, tokenizer, **arguments, **more), 2))


def test_evaluation_takes_the_likeliest_column(table, tokenizer):
    path = weighed(table, 40)
    data = module_of(path, tokenizer, caption_column=WEIGHTS)
    data.setup("validate")
    rows = data.load("validation")
    (batch,) = data.val_dataloader()
    expected = [
        ([t for t in row.captions if t.startswith("syn")] or row.captions)[0] for row in rows
    ]
    assert torch.equal(batch["caption_ids"], encode_captions(tokenizer, expected).ids)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"caption_column": WEIGHTS, "captions": "all"}, ["data.caption_column", "data.captions"]),
        ({"caption_column": {"alt": 0.0, "syn": 1}}, ["data.caption_column", "'alt', 0"]),
        ({"caption_column": {"alt": -1.0}}, ["data.caption_column", "not above 0"]),
        ({"caption_column": {}}, ["data.caption_column", "nothing"]),
        ({"caption_column": {"atl": 1.0}}, ["data.caption_column 'atl'", "alt, syn"]),
        ({"negative_column": "hard"}, ["data.negative_column 'hard'", "alt, syn"]),
    ],
)
def test_mistakes_are_one_sentence(table, tokenizer, arguments, words):
    path, arguments = weighed(table, 20), {"caption_column": "alt"} | arguments
    with pytest.raises(UserError) as caught:
        module_of(path, tokenizer, **arguments).setup("fit")
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


# --- Captions within JSON ------------------------------------------------------------------------


def captions_in(path, column):
    return list(open_layout(path, caption_column=column).split("train").all_captions())


def test_json_text_of_strings_and_lists(table):
    # A hundredth may lack one.
    good = ['["a", " b "]', '"c"'] * 100
    path = table(caption=[*good, "[1, 2]"], plain=['"quoted" word', "[deleted]", "x"] * 67)
    assert captions_in(path, "caption")[:2] == [["a", "b"], ["c"]]
    rows = open_layout(path)
    assert len(rows.split("train")) == 200
    assert "1 of 201 pairs without a caption" in rows.describe()
    assert captions_in(path, "plain")[:2] == [['"quoted" word'], ["[deleted]"]]


def test_a_field_of_json_objects(table):
    meta = [json.dumps({"caption": f"c{n}", "deep": {"er": [f"d{n}", "e"]}}) for n in range(150)]
    meta[7] = json.dumps({"caption": 5})
    path = table(meta=meta)
    found = captions_in(path, "meta.caption")
    assert len(found) == 149
    assert found[0] == ["c0"]
    assert captions_in(table("b.parquet", meta=meta[:5]), "meta.deep.er")[2] == ["d2", "e"]
    structs = [{"raw": [{"text": f"t{n}"}, {"text": "u"}], "n": n} for n in range(3)]
    assert captions_in(table("c.parquet", meta=structs), "meta.raw.text")[1] == ["t1", "u"]
    with pytest.raises(UserError, match="150 of 150 pairs without a caption"):
        captions_in(path, "meta.captoin")
    with pytest.raises(UserError, match=r"data.caption_column 'mta.caption' is no column"):
        captions_in(path, "mta.caption")


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"caption": ' * 5000, '{"caption": "\\ud800"}', "null", "{", "1e999", ""],
)
def test_no_cell_ends_the_run(table, text):
    meta = [json.dumps({"caption": "fine"})] * 100 + [text]
    found = captions_in(table(meta=meta), "meta.caption")
    assert found[:100] == [["fine"]] * 100


def test_json_members_of_shards(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for n in range(3):
            for kind, content in (
                ("png", png(n)),
                ("json", json.dumps({"texts": {"long": f"l{n}"}, "caption": "c"}).encode()),
                ("meta.json", json.dumps({"caption": [f"m{n}"]}).encode()),
            ):
                member = tarfile.TarInfo(f"{n}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    path = str(tmp_path / "0.tar")
    assert captions_in(path, "json.texts.long") == [["l0"], ["l1"], ["l2"]]
    assert captions_in(path, "json.caption") == [["c"]] * 3
    assert captions_in(path, "meta.json.caption") == [["m0"], ["m1"], ["m2"]]
    assert captions_in(path, None) == [["c"]] * 3


def test_wrong_types_in_a_list_of_pictures(tmp_path):
    lines = []
    for n, caption in enumerate(["fine"] * 300 + [5, {"a": "b"}, True]):
        Image.fromarray(draw(sample(0, "test", n), 8)).save(tmp_path / f"{n}.png")
        lines.append(json.dumps({"file_name": f"{n}.png", "caption": caption}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    layout = open_layout(str(tmp_path))
    assert list(layout.split("train").all_captions()) == [["fine"]] * 300
    assert "3 of 303 pairs without a caption" in layout.describe()


# --- Negatives -----------------------------------------------------------------------------------


def test_negatives_are_carried_by_the_batch(table, tokenizer):
    hard = [None if n % 2 else [f"wrong {n}", f"false {n}"] for n in range(60)]
    path = table(caption=[f"right {n}" for n in range(60)], hard=pa.array(hard))
    data = module_of(path, tokenizer, negative_column="hard")
    plain = module_of(path, tokenizer)
    rows = data.load("train")
    drawn = set()
    for batch, other in zip(epoch_of(data), epoch_of(plain), strict=True):
        assert "negatives" not in other
        assert torch.equal(batch["images"], other["images"])  # views and pairs are the same
        assert torch.equal(batch["caption_ids"], other["caption_ids"])
        wrong = [rows.negatives().captions(row) for row in batch["rows"].tolist()]
        wrong = [texts for texts in wrong if texts]
        assert len(batch["negatives"]) == len(batch["negative_ids"]) == len(wrong)
        assert len(batch["lengths"]) == len(batch["by_length"]) == 10 + len(wrong)
        for found, texts in zip(batch["negative_ids"].tolist(), wrong, strict=True):
            assert found in encode_captions(tokenizer, texts).ids.tolist()
            drawn.add(encode_captions(tokenizer, texts).ids.tolist().index(found))
    assert drawn == {0, 1}
    assert all("negatives" not in batch for batch in data.val_dataloader())


def test_negatives_change_the_fingerprint(table, tokenizer):
    path = table(caption=["a", "b", "c"], hard=["d", "e", "f"], other=["g", "h", "i"])
    found = {
        module_of(path, tokenizer, **arguments).fingerprint()
        for arguments in (
            {},
            {"negative_column": "hard"},
            {"negative_column": "other"},
            {"caption_column": {"caption": 0.5, "hard": 0.5}},
            {"caption_column": {"caption": 0.4, "hard": 0.6}},
            {"filters": Filters(max_words=1)},
        )
    }
    assert len(found) == 6


# --- Filters -------------------------------------------------------------------------------------


@pytest.fixture
def scored(table):
    """100 rows whose columns are functions of their number."""
    numbers = range(100)
    return table(
        captions=pa.array([["word " * (n % 10 + 1), "x"] for n in numbers]),
        width=[100 + n for n in numbers],
        height=[100] * 100,
        clip_score=[None if n == 50 else n / 100 for n in numbers],
        language=["EN" if n % 4 else "de" for n in numbers],
        text_score=[f"{n}" for n in numbers],
    )


@pytest.mark.parametrize(
    ("filters", "fits"),
    [
        ({"min_words": 3}, lambda n: n % 10 + 1 >= 3),
        ({"min_words": 2, "max_words": 4}, lambda n: 2 <= n % 10 + 1 <= 4),
        ({"min_characters": 14, "max_characters": 24}, lambda n: 14 <= 5 * (n % 10 + 1) - 1 <= 24),
        ({"min_side": 101, "width_column": "width", "height_column": "width"}, lambda n: n >= 1),
        ({"max_aspect_ratio": 1.5}, lambda n: n <= 50),
        ({"languages": ["en"]}, lambda n: n % 4 != 0),
        ({"columns": {"clip_score": (0.28, None)}}, lambda n: n >= 28 and n != 50),
        ({"columns": {"clip_score": (0.28, 0.5), "text_score": (30, 40)}}, lambda n: 30 <= n <= 40),
    ],
)
def test_rows_that_do_not_fit_are_left_out(scored, tokenizer, filters, fits):
    everything = module_of(scored, tokenizer)
    data = module_of(scored, tokenizer, filters=Filters(**filters))
    train = [int(row) for row in everything.load("train").column("text_score")]
    left = [n for n in train if fits(n)]
    assert [int(row) for row in data.load("train").column("text_score")] == left
    assert data.load("validation").keys() == everything.load("validation").keys()
    assert data.evaluation_rows("train").keys() == everything.load("train").keys()
    assert f"{len(train) - len(left)} of {len(train)} training rows" in data.describe()


def test_captions_that_do_not_fit_are_dropped(scored, tokenizer):
    rows = module_of(scored, tokenizer, filters=Filters(min_characters=2)).load("train")
    assert all("x" not in captions and len(captions) == 1 for captions in rows.all_captions())
    weights = {"captions": 1.0, "text_score": 2.0}
    data = module_of(scored, tokenizer, caption_column=weights, filters=Filters(max_characters=1))
    rows = data.load("train")
    for row in range(len(rows)):
        number = rows.column("text_score")[row]
        assert rows.captions(row) == ["x", number][: 1 + (len(number) == 1)]
        assert rows.caption_counts(row).tolist() == [1, int(len(number) == 1)]
    assert len(epoch_of(data)) == 9


@pytest.mark.parametrize(
    ("filters", "words"),
    [
        ({"columns": {"score": (0, 1)}}, ["data.filters.columns.score", "clip_score"]),
        ({"languages": ["fr"]}, ["data.filters", "no training row", "languages removed most"]),
        ({"languages": []}, ["data.filters.languages"]),
        ({"languages": ["en"], "language_column": "tongue"}, ["language_column", "'tongue'"]),
        ({"min_words": 4, "max_words": 3}, ["data.filters.min_words", "4 to 3"]),
        ({"max_aspect_ratio": 0.5}, ["data.filters.max_aspect_ratio", "less than 1"]),
        ({"columns": {"clip_score": (2, None)}, "min_words": 2}, ["clip_score removed most"]),
    ],
)  # fmt: skip
def test_wrong_filters_are_one_sentence(scored, tokenizer, filters, words):
    with pytest.raises(UserError) as caught:
        module_of(scored, tokenizer, filters=Filters(**filters)).setup("fit")
    assert all(word in str(caught.value) for word in words), caught.value


def test_sizes_need_columns(table, tokenizer):
    data = module_of(table(caption=["a", "b", "c"]), tokenizer, filters=Filters(min_side=3))
    with pytest.raises(UserError, match=r"data.filters.min_side: the data has no column 'width'"):
        data.setup("fit")


def test_no_filter_reads_a_picture(scored, tokenizer, monkeypatch):
    from clipkit.data.layouts.tables import TableSource

    layout = open_layout(scored)
    assert len(layout.split("train")) == 100
    monkeypatch.setattr(TableSource, "image", lambda *_: pytest.fail("a picture was read"))
    filters = Filters(min_words=3, min_side=1, languages=["en"], columns={"clip_score": (0, 1)})
    assert len(module_of(scored, tokenizer, filters=filters).load("train")) > 10


def test_a_stream_reads_fields_of_json_objects(table, tokenizer):
    path = table(meta=[json.dumps({"caption": f"caption {n}"}) for n in range(60)])
    data = module_of(path, tokenizer, caption_column="meta.caption", streaming=True)
    assert {len(row.captions) for row in data.load("validation")} == {1}
