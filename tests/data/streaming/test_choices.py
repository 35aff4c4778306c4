"""Filters, weighed captions and negatives of a stream: as of a data set opened as a whole."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipkit.data import Filters, HuggingFacePairs
from clipkit.data.streaming import Streaming
from clipkit.data.streaming.reading import Cursor
from clipkit.data.streaming.state import Pass
from clipkit.errors import UserError

from .conftest import captions_of, encoded, windows

LAYOUTS = ["parquet", "arrow", "tar", "list"]
SIZES = [90, 7, 130]


def record_of(shard, row):
    """The fields of a row; some lack one, and the first of 64 rows lacks more."""
    fields = {
        "alt": f"alt {row} of {shard}" + " more" * (row % 4), "made": f"made {row} of {shard}",
        "wrong": [f"wrong {row} of {shard}", f"worse {row} of {shard}"],
        "width": 100 + row, "height": 60 + 2 * row, "score": row / 100, "lang": "en",
    }  # fmt: skip
    if row % 3 == 0:
        del fields["made"]
    if row % 5 == 0:
        del fields["wrong"]
    if row % 64 == 1 and row > 1:
        del fields["score"], fields["lang"]
    if row % 7 == 0:
        fields["lang"] = "de"
    return fields


@pytest.fixture
def choosing(tmp_path):
    """Writes a data set of so many rows a shard, and some of validation; gives its path."""

    def written(layout):
        folder = tmp_path / layout
        folder.mkdir()
        names = [f"train-{shard}" for shard in range(len(SIZES))] + ["validation-0"]
        listed = []
        for shard, (name, size) in enumerate(zip(names, [*SIZES, 20], strict=True)):
            records = [record_of(shard, row + 1) for row in range(size)]
            pictures = [encoded(shard, row) for row in range(size)]
            write_shard(folder, layout, name, pictures, records)
            split = name.partition("-")[0]
            listed += [
                {"file_name": f"{name}-{row}.png", "split": split, **record}
                for row, record in enumerate(records)
            ]
        if layout == "list":
            (folder / "list.jsonl").write_text("\n".join(map(json.dumps, listed)))
            return str(folder / "list.jsonl")
        return str(folder)

    return written


def write_shard(folder, layout, name, pictures, records):
    if layout in ("parquet", "arrow"):
        names = dict.fromkeys(field for record in records for field in record)
        columns = {field: [record.get(field) for record in records] for field in names}
        table = pa.table({"image": pictures, **columns})
        if layout == "parquet":
            pq.write_table(table, folder / f"{name}.parquet", row_group_size=50)
            return
        with pa.ipc.new_stream(str(folder / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
        return
    for row, picture in enumerate(pictures) if layout == "list" else ():
        (folder / f"{name}-{row}.png").write_bytes(picture)
    if layout == "tar":
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for row, (picture, record) in enumerate(zip(pictures, records, strict=True)):
                for field, content in (("png", picture), ("json", json.dumps(record).encode())):
                    member = tarfile.TarInfo(f"{name}-{row}.{field}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def opened(tokenizer):
    def made(path, *, streaming=True, batch_size=10, **options):
        streamed = Streaming(shuffle_window=32, open_shards=2) if streaming else False
        data = HuggingFacePairs(
            path, streaming=streamed, batch_size=batch_size, num_workers=0, image_size=8,
            tokenizer=tokenizer, seed=3, augment=False, **options,
        )  # fmt: skip
        data.setup("fit")
        return data

    return made


FILTERS = {
    "sides": Filters(min_side=120, max_aspect_ratio=1.2),
    "words": Filters(max_words=6, min_characters=14),
    "columns": Filters(languages=["en"], columns={"score": (0.1, 0.8)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FILTERS)
def test_filters_leave_what_they_leave_of_the_whole(choosing, opened, layout, name):
    path, options = choosing(layout), {"filters": FILTERS[name], "caption_column": "alt"}
    whole = opened(path, streaming=False, **options).load("train")
    assert 20 < len(whole) < sum(SIZES) - 20
    data = opened(path, **options)
    stream = data.stream()
    for world_size in (1, 2, 3):
        read = [
            row
            for rank in range(world_size)
            for window in windows(stream, rank, world_size)
            for row in window.rows
        ]
        assert not any(row.fault for row in read)
        assert Counter(captions_of(read)) == Counter(t for row in whole for t in row.captions)
    reader = stream.of_rank(0, 1, Pass(0, stream.nothing))
    all_windows = list(reader.windows(Cursor()))
    assert _told(reader.windows(all_windows[1].start)) == _told(all_windows[1:])
    # What is left out is no broken row, and validation is not filtered.
    assert not [broken for batch in data.train_dataloader() for broken in batch["broken"]]
    assert len(data.load("validation")) == 20
    data.teardown("fit")


def _told(found):
    return [[(row.number, row.captions) for row in window.rows] for window in found]


def test_filters_leave_out_broken_rows_too(choosing, opened):
    path = Path(choosing("list"))
    for row in range(19, 90):
        (path.parent / f"train-0-{row}.png").write_bytes(b"<html>")
    data = opened(str(path), filters=Filters(columns={"score": (0, 0.19)}), caption_column="alt")
    assert not [broken for batch in data.train_dataloader() for broken in batch["broken"]]
    data.teardown("fit")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_captions_are_drawn_as_they_are_weighed(choosing, opened, layout, tokenizer):
    data = opened(choosing(layout), caption_column={"alt": 0.3, "made": 0.7})
    first = {tokenizer([f"{word} x"])[0, 1].item(): word for word in ("alt", "made")}
    drawn = Counter()
    for _ in range(8):
        for batch in data.train_dataloader():
            drawn.update(first[token] for token in batch["tokens"][:, 1].tolist())
    data.teardown("fit")
    # Of three rows one has no second caption.
    assert drawn["made"] / drawn.total() == pytest.approx(0.7 * 2 / 3, abs=0.04)
    of_validation = {
        first[token] for batch in data.val_dataloader() for token in batch["tokens"][:, 1].tolist()
    }
    assert of_validation == {"alt", "made"}
    assert data.load("validation").captions(0) == ["alt 1 of 3 more", "made 1 of 3"]


def test_filters_and_weights_together(choosing, opened, tokenizer):
    """Whose counts are those of what is left."""
    options = {"caption_column": {"alt": 1, "made": 1}, "filters": Filters(max_words=4)}
    data = opened(choosing("parquet"), **options)
    alt = tokenizer(["alt x"])[0, 1].item()
    made = {
        row.captions[0].split()[0]
        for window in windows(data.stream())
        for row in window.rows
        if row.counts.tolist() == [0, 1]
    }
    assert made == {"made"}
    counted = [row for window in windows(data.stream()) for row in window.rows]
    assert all(row.counts.sum() == len(row.captions) for row in counted)
    tokens = [token for batch in data.train_dataloader() for token in batch["tokens"][:, 1]]
    assert any(token == alt for token in tokens)
    data.teardown("fit")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("captions", ["random", "all"])
def test_negatives_come_with_their_rows(choosing, opened, layout, captions, tokenizer):
    data = opened(
        choosing(layout), caption_column="alt", negative_column="wrong", captions=captions
    )
    own = {}
    for shard, size in enumerate(SIZES):
        for row in range(1, size + 1):
            record = record_of(shard, row)
            (caption,) = _cut(tokenizer([record["alt"]]))
            wrong = record.get("wrong")
            own[caption] = _cut(tokenizer(wrong)) if wrong else []
    seen = 0
    for batch in data.train_dataloader():
        expected = [own[caption] for caption in _cut(batch["tokens"]) if own[caption]]
        found = _cut(batch["negatives"])
        assert len(found) == len(expected)
        assert all(one in texts for one, texts in zip(found, expected, strict=True))
        seen += len(found)
    data.teardown("fit")
    assert seen > 100


def _cut(tokens):
    """Tokens without what fills them up, which batches have as many of as they need."""
    return ["/".join(map(str, row)).rstrip("/0") for row in tokens.tolist()]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_have_the_negatives_of_their_rows(choosing, opened, workers):
    options = {"caption_column": {"alt": 1, "made": 2}, "negative_column": "wrong"}
    found = []
    for number in (0, workers):
        data = opened(choosing("parquet") if not found else found[0][0], **options)
        data.num_workers = number
        path = data.stored.source.dataset
        found.append((path, [(b["tokens"], b["negatives"]) for b in data.train_dataloader()]))
        data.teardown("fit")
    for (tokens, negatives), (others, other_negatives) in zip(
        found[0][1], found[1][1], strict=True
    ):
        assert tokens.equal(others)
        assert negatives.equal(other_negatives)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": Filters(columns={"nothing": (0, 1)})}, r"data\.filters\.columns\.nothing"),
        ({"filters": Filters(min_words=5, max_words=4)}, r"data\.filters\.min_words: nothing lies"),
        ({"negative_column": "nothing"}, r"data\.negative_column 'nothing' is no column"),
        ({"caption_column": {"nothing": 1}}, r"data\.caption_column 'nothing' is no column"),
        ({"filters": Filters(min_words=50)}, r"data\.batch_size: .* filters that leave out less"),
    ],
)
def test_what_cannot_be_is_told_at_once(choosing, opened, options, message):
    with pytest.raises(UserError, match=message):
        list(opened(choosing("parquet"), **{"caption_column": "alt", **options}).train_dataloader())


def test_the_fingerprint_changes_with_what_is_chosen(choosing, opened):
    path = choosing("parquet")
    chosen = [
        {"caption_column": "alt"}, {"caption_column": {"alt": 1, "made": 2}},
        {"caption_column": "alt", "filters": Filters(min_words=2)},
    ]  # fmt: skip
    assert len({opened(path, **options).fingerprint() for options in chosen}) == 3
