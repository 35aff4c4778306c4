"""Several sources in one batch: how many of each, in which order, and whole runs of them."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clipkit
from clipkit.data import Filters, MixedPairs, PairSource
from clipkit.data.sampling import MixtureOrder, TrainSampler, shares_of
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer

MIXTURE = """\
data:
  class_path: MixedPairs
  init_args:
    batch_size: 8
    sources:
      one: {dataset: ONE, caption_column: {caption: 0.6, label: 0.4}, weight: 3}
      two: {dataset: TWO, captions: first, weight: 1, filters: {min_words: 1}}
"""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("english", context_length=24)


@pytest.fixture(scope="module")
def two(pictures, tmp_path_factory):
    """The drawn pictures, and the first sixteen of them once more."""
    other = tmp_path_factory.mktemp("other") / "pictures"
    shutil.copytree(pictures, other)
    lines = (other / "metadata.csv").read_text().splitlines()
    (other / "metadata.csv").write_text("\n".join(lines[:17]))
    for path in sorted(other.glob("*.png"))[16:]:
        path.unlink()
    return str(pictures), str(other)


def mixture(two, tokenizer, weights=(None, None), **arguments):
    sources = {
        name: PairSource(dataset=path, weight=weight)
        for name, path, weight in zip(("one", "two"), two, weights, strict=True)
    }
    arguments = {"batch_size": 4, "seed": 3, "image_size": 16, **arguments}
    return MixedPairs(sources, tokenizer=tokenizer, **arguments)


# --- The order -----------------------------------------------------------------------------------

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(lengths, st.integers(1, 150), st.integers(0, 5), st.data())
def test_every_pair_of_a_source_before_any_again(lengths, total, seed, data):
    weights = {
        f"s{n}": data.draw(st.floats(0.1, 10.0), label=f"weight {n}") for n in range(len(lengths))
    }
    sources = dict(zip(weights, lengths, strict=True))
    shares = shares_of(weights, total)
    order = MixtureOrder(sources, shares, seed=seed)
    again = MixtureOrder(sources, shares, seed=seed)
    seen = {name: [] for name in sources}
    bounds = np.cumsum([0, *lengths])
    for epoch in range(4):
        numbers = order.numbers(epoch)
        assert len(numbers) == len(order) == total
        source = np.searchsorted(bounds, numbers, side="right") - 1
        for place, name in enumerate(sources):
            own = numbers[source == place] - bounds[place]
            assert len(own) == shares[name]
            seen[name] += own.tolist()
    assert (again.numbers(3) == numbers).all()  # whatever was asked before
    for name, numbers in seen.items():
        for start in range(0, len(numbers), sources[name]):
            whole = numbers[start : start + sources[name]]
            assert len(set(whole)) == len(whole)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=6), st.integers(0, 10_000))
def test_shares_are_as_near_as_whole_numbers_allow(weights, total):
    named = {str(n): weight for n, weight in enumerate(weights)}
    shares = shares_of(named, total)
    assert sum(shares.values()) == total
    for name, weight in named.items():
        assert abs(shares[name] - weight / sum(weights) * total) < 1 + 1e-6


def test_ranks_share_the_batches_of_one():
    order = MixtureOrder({"a": 13, "b": 40}, {"a": 12, "b": 12}, seed=1)

    def keys(rank, ranks):
        sampler = TrainSampler([0] * 53, order=order, batch_size=8, rank=rank, world_size=ranks)
        sampler.set_epoch(2)
        return list(sampler)

    alone, halves = keys(0, 1), [keys(rank, 2) for rank in range(2)]
    for step in range(3):
        together = [key for half in halves for key in half[4 * step : 4 * step + 4]]
        assert together == alone[8 * step : 8 * step + 8]


# --- Batches -------------------------------------------------------------------------------------


def epoch_of(data, number=0):
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def counted(batches):
    return sum((Counter(batch["sources"]) for batch in batches), Counter())


def test_without_weights_every_pair_once(two, tokenizer):
    data = mixture(two, tokenizer, batch_size=1)
    batches = epoch_of(data)
    assert sorted(int(batch["rows"]) for batch in batches) == list(range(23 + 15))
    assert counted(batches) == {"one": 23, "two": 15}


def test_with_weights_exact_counts(two, tokenizer):
    data = mixture(two, tokenizer, (1.0, 2.0), epoch_pairs=31)
    for epoch in range(3):
        assert counted(epoch_of(data, epoch)) == {"one": 9, "two": 19}  # of 28, in sevens of four
    ours, theirs = epoch_of(data, 2), epoch_of(mixture(two, tokenizer, (1, 2), epoch_pairs=31), 2)
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(ours, theirs, strict=True))


def test_workers_change_nothing(two, tokenizer):
    alone = epoch_of(mixture(two, tokenizer, (1.0, 1.0)), 1)
    shared = epoch_of(mixture(two, tokenizer, (1.0, 1.0), num_workers=2), 1)
    for ours, theirs in zip(alone, shared, strict=True):
        assert ours["sources"] == theirs["sources"]
        assert torch.equal(ours["images"], theirs["images"])
        assert torch.equal(ours["tokens"], theirs["tokens"])


def test_a_source_is_drawn_alike_whatever_is_beside_it(two, tokenizer):
    """Crops and captions of a pair are the same, alone and mixed."""
    sources = {"one": PairSource(dataset=two[0]), "two": PairSource(dataset=two[1])}
    arguments = {"batch_size": 1, "seed": 3, "image_size": 16, "tokenizer": tokenizer}
    mixed = epoch_of(MixedPairs(sources, **arguments), 1)
    alone = epoch_of(MixedPairs({"two": sources["two"]}, **arguments), 1)
    of_two = {int(b["rows"]) - 23: b for b in mixed if b["sources"] == {"two": 1}}
    for batch in alone:
        assert torch.equal(batch["images"], of_two[int(batch["rows"])]["images"])


def test_each_source_in_its_own_way(two, tokenizer):
    data = MixedPairs(
        {
            "one": PairSource(dataset=two[0], augment=False, caption_column="label"),
            "two": PairSource(
                dataset=two[1], filters=Filters(min_words=4), negative_column="label"
            ),
        },
        batch_size=1, seed=0, image_size=16, tokenizer=tokenizer,
    )  # fmt: skip
    batches = epoch_of(data)
    assert all(len(b["negatives"]) == b["sources"].get("two", 0) for b in batches)
    from clipkit.data.images import resize_for_eval, to_uint8

    rows = data.stored["one"].rows("train")
    of_one = next(b for b in batches if "one" in b["sources"])
    from clipkit.data.images import decode_image

    picture = decode_image(rows.image(int(of_one["rows"])))
    expected = to_uint8(resize_for_eval(picture, 16, "shortest", "bicubic"))
    assert torch.equal(of_one["images"][0], expected)


def test_validation_of_all_or_of_those_named(two, tokenizer):
    def validated(**arguments):
        data = mixture(two, tokenizer, **arguments)
        data.setup("validate")
        return counted(data.val_dataloader())

    assert validated() == {"one": 1, "two": 1}
    assert validated(validation_sources=["two"]) == {"two": 1}


def test_held_out_pictures_are_not_trained_on_within_a_source(two, tokenizer):
    data = mixture(two, tokenizer)
    for stored in data.stored.values():
        assert not {*stored.rows("train").keys()} & {*stored.rows("validation").keys()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": (1.0, None)}, ["data.sources", "one has a weight", "two has none"]),
        ({"weights": (1.0, 0.0)}, ["data.sources", "'two', 0"]),
        ({"weights": (1.0, -1.0)}, ["data.sources", "'two', -1"]),
        ({"epoch_pairs": 10}, ["data.epoch_pairs", "weight"]),
        ({"weights": (1.0, 1.0), "epoch_pairs": 0}, ["data.epoch_pairs"]),
        ({"weights": (1.0, 1e-9)}, ["data.sources.two.weight", "no pair"]),
        ({"validation_sources": ["tow"]}, ["data.validation_sources", "'tow'", "two"]),
        ({"validation_sources": []}, ["data.validation_sources"]),
    ],
)
def test_mistakes_are_one_sentence(two, tokenizer, arguments, words):
    def built():
        mixture(two, tokenizer, **arguments).setup("fit")

    with pytest.raises(UserError) as caught:
        built()
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_column_missing_in_one_source(two, tokenizer):
    sources = {
        "one": PairSource(dataset=two[0]),
        "two": PairSource(dataset=two[1], caption_column="captoin"),
    }
    data = MixedPairs(sources, image_size=16, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"data\.sources\.two\.caption_column 'captoin'"):
        data.setup("fit")
    with pytest.raises(UserError, match=r"data\.sources: 'a/b'"):
        MixedPairs({"a/b": sources["one"]})


# --- Whole runs ----------------------------------------------------------------------------------


@pytest.fixture
def mixed(workdir, two):
    (workdir / "mix.yaml").write_text(MIXTURE.replace("ONE", two[0]).replace("TWO", two[1]))
    return ["-c", "base", "-c", "tiny.yaml", "-c", "mix.yaml"]


def journal(run):
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    return {json.loads(line)["step"]: json.loads(line) for line in lines if "_pairs" in line}


def test_fit_and_validate_from_the_checkpoint_alone(workdir, command, mixed, capsys):
    assert command("fit", *mixed, "--run_name=run", "--trainer.max_epochs=2") == 0
    run = workdir / "runs" / "tiny" / "run"
    counts = journal(run)
    last = counts[max(counts)]
    assert (last["data/one_pairs"], last["data/two_pairs"]) == (48, 16)  # of 32 an epoch
    assert "one 75.0%, two 25.0%" in capsys.readouterr().out
    checkpoint = run / "checkpoints" / "last.ckpt"
    kept = torch.load(checkpoint, weights_only=True)
    assert kept["source_counts"] == {"one": 48, "two": 16}
    (workdir / "mix.yaml").unlink()
    assert command("validate", "--ckpt_path", checkpoint) == 0
    assert clipkit.load(str(checkpoint)).embed_texts(["a"]).shape == (1, 16)


def test_build(two, mixed):
    _, data, _ = clipkit.build(*mixed[1::2], overrides=["data.sources.two.weight=2"])
    assert data.weights == {"one": 3, "two": 2}
    assert data.stored["one"].source.caption_column == {"caption": 0.6, "label": 0.4}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--data.sources.two.wieght=2", "wieght"),
        ("--data.sources.tow.weight=2", "data.sources.tow.dataset: needed"),
        ("--data.validation_sources=[tow]", "data.validation_sources"),
        ("--data.sources.two.filters.min_wrods=2", "min_wrods"),
        ("--data.sources.two.weight=0", "data.sources"),
    ],
)
def test_mistakes_on_the_command_line(command, mixed, word, said, capsys):
    assert command("fit", *mixed, word) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_broken_rows_are_replaced_within_their_source(workdir, command, mixed, two):
    broken = workdir / "broken"
    shutil.copytree(two[1], broken)
    mixed = [*mixed, f"--data.sources.two.dataset={broken}", "--data.max_broken_ratio=0.5"]
    sources = {"two": PairSource(dataset=str(broken))}
    data = MixedPairs(sources, image_size=16, tokenizer=Tokenizer("english"))
    key = data.stored["two"].rows("train").key(3)
    (broken / f"{key}.png").write_bytes(b"nothing")
    assert command("fit", *mixed, "--run_name=run", "--trainer.max_epochs=4") == 0
    run = workdir / "runs" / "tiny" / "run"
    lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [(x["source"], x["split"], x["key"]) for x in lines] == [("two", "train", key)]
    counts = journal(run)
    assert counts[max(counts)]["data/two_pairs"] == 32


def test_columns_with_weights_from_the_command_line(workdir, command, pictures):
    words = ["--data.dataset", pictures, "--data.caption_column", "{caption: 0.3, label: 0.7}"]
    words += ["--data.filters.min_words=1", "--data.filters.columns={label: [null, null]}"]
    assert command("fit", "-c", "base", "-c", "tiny.yaml", *words, "--run_name=run") == 2
    assert command("fit", "-c", "base", "-c", "tiny.yaml", *words[:-1], "--run_name=run") == 0
    checkpoint = workdir / "runs" / "tiny" / "run" / "checkpoints" / "last.ckpt"
    assert command("validate", "--ckpt_path", checkpoint) == 0


def test_two_real_data_sets(workdir, command, shared_data, mixed):
    words = [
        "--data.sources.one", f"{{dataset: {shared_data / 'emoji_vendors'}, weight: 2,"
        " caption_column: {caption: 0.5, captions: 0.5}, filters: {max_words: 3}}",
        "--data.sources.two", f"{{dataset: {shared_data / 'sign_digits'}, weight: 1}}",
        "--data.epoch_pairs=64", "--data.validation_sources=[two]", "--run_name=run",
    ]  # fmt: skip
    assert command("fit", *mixed, *words) == 0
    counts = journal(workdir / "runs" / "tiny" / "run")
    assert counts[max(counts)]["data/one_pairs"] == 43
    assert counts[max(counts)]["data/two_pairs"] == 21
