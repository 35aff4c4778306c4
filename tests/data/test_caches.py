"""Caches change how long a batch takes, never what is in it; what is damaged is built again."""

import json
import multiprocessing
import os
import pickle
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from clipkit.data import Augmentation, HuggingFacePairs, ShapesPairs
from clipkit.data.array_file import ArrayFile, open_or_build
from clipkit.data.cached_tokens import CachedCaption, CachedTokens, cached_tokens, read_cached
from clipkit.data.captions import encode_captions
from clipkit.data.layouts import open_layout
from clipkit.data.prepared_pictures import Shrunk
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer

SIZE = 16
CAPTIONS = [
    "a red circle", "", "Ein Übermaß an Möglichkeiten", "naïve café &amp; co", "🙂 " * 30,
    "A RED circle ", "a red circle", "one two three four five six seven eight nine ten eleven",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer("english", context_length=12)


@pytest.fixture
def photos(tmp_path):
    """12 JPEGs of 90 x 60 pixels, one to three captions each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((90, 60), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:02d}.jpg", quality=90)
        lines = [text for text in CAPTIONS[number % 4 : number % 4 + 3] if text]
        (folder / f"{number:02d}.txt").write_text(f"picture {number % 5}\n" + "\n".join(lines))
    return folder


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def module_of(folder, tokenizer, **arguments):
    arguments = {"batch_size": 4, "seed": 3, "num_workers": 0, **arguments}
    return HuggingFacePairs(str(folder), image_size=SIZE, tokenizer=tokenizer, **arguments)


def batches(data, number=1):
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return [*loader, *data.val_dataloader()]


def same(left, right):
    def equal(one, other):
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other

    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert [name for name in one if not equal(one[name], other[name])] == []
    return True


def files(cache, kind):
    return sorted(cache.glob(f"{kind}-*.clipkit"))


# --- The same batches ----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["first", "longest", "random", "all"])
@pytest.mark.parametrize("workers", [0, 2])
def test_tokens_from_the_cache_are_the_tokens(photos, cache, tokenizer, policy, workers):
    plain = batches(module_of(photos, tokenizer, captions=policy))
    kept = {"cache_tokens": True, "cache_folder": str(cache), "num_workers": workers}
    for _ in range(2):  # built, then found
        assert same(plain, batches(module_of(photos, tokenizer, captions=policy, **kept)))
    assert len(files(cache, "tokens")) == 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmented", [False, {"shrink_pictures": True}, {"shrink_pictures": 40}])
def test_pictures_from_the_cache_are_the_pictures(photos, cache, tokenizer, augmented, workers):
    how = augmented or {"augment": False}
    plain = batches(module_of(photos, tokenizer, **how))
    kept = {"cache_pictures_gb": 1, "cache_folder": str(cache), "num_workers": workers}
    for _ in range(2):
        assert same(plain, batches(module_of(photos, tokenizer, **how, **kept)))
    assert len(files(cache, "pictures")) == 2


def test_evaluation_is_cached_where_training_is_cropped_from_the_full_size(
    photos, cache, tokenizer, caplog
):
    plain = batches(module_of(photos, tokenizer))
    data = module_of(photos, tokenizer, cache_pictures_gb=1, cache_folder=str(cache))
    with caplog.at_level("INFO"):
        assert same(plain, batches(data))
    assert "data.shrink_pictures=true" in caplog.text
    assert len(files(cache, "pictures")) == 1


@pytest.mark.parametrize("padded", [False, True])
def test_any_selection_of_captions(photos, cache, padded):
    tokenizer = Tokenizer("english", context_length=12, pad_to_context=padded)
    rows = open_layout(str(photos)).split("train")
    cached = pickle.loads(pickle.dumps(cached_tokens(rows, tokenizer, cache, split="train")))
    texts = [text for captions in rows.all_captions() for text in captions]
    for chosen in ([0], [3, 3, 1], list(range(len(texts))), [len(texts) - 1]):
        expected = encode_captions(tokenizer, [texts[number] for number in chosen])
        found = read_cached([CachedCaption(cached, n) for n in chosen], tokenizer.contract)
        for name, value in expected._asdict().items():
            assert torch.equal(getattr(found, name), value), name
            assert getattr(found, name).dtype == value.dtype
    assert [list(cached.captions(row)) for row in range(2)] == [
        list(range(len(rows.captions(0)))),
        list(range(len(rows.captions(0)), len(rows.captions(0)) + len(rows.captions(1)))),
    ]


@pytest.mark.parametrize("padded", [False, True])
def test_captions_of_several_files(photos, cache, padded):
    tokenizer = Tokenizer("english", context_length=12, pad_to_context=padded)
    rows = open_layout(str(photos)).split("train")
    parts = [rows.select(np.arange(3)), rows.select(np.arange(3, len(rows)))]
    files = [cached_tokens(part, tokenizer, cache, split="train") for part in parts]
    texts = [[text for captions in part.all_captions() for text in captions] for part in parts]
    chosen = [(1, 4), (0, 1), (1, 0), (0, 0), (0, 2), (1, 2)]
    expected = encode_captions(tokenizer, [texts[part][number] for part, number in chosen])
    found = read_cached(
        [CachedCaption(files[part], number) for part, number in chosen], tokenizer.contract
    )
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(found, name), value), name
        assert getattr(found, name).dtype == value.dtype


def test_a_vocabulary_beyond_16_bits(photos, cache, tokenizer, monkeypatch):
    monkeypatch.setattr(Tokenizer, "vocab_size", 2**16 + 1)
    rows = open_layout(str(photos)).split("train")
    cached = cached_tokens(rows, tokenizer, cache, split="train")
    assert cached._file["ids"].dtype == np.uint32
    expected = encode_captions(tokenizer, rows.captions(0))
    found = cached.encode(cached.captions(0), tokenizer.contract)
    assert torch.equal(found.tokens, expected.tokens)


def test_a_picture_of_several_rows_is_kept_once(photos, cache, tokenizer):
    for number in range(1, 12):
        shutil.copy(photos / "00.jpg", photos / f"{number:02d}.jpg")
    arguments = {"augment": False, "cache_pictures_gb": 1, "cache_folder": str(cache)}
    found = batches(module_of(photos, tokenizer, **arguments))
    assert same(batches(module_of(photos, tokenizer, augment=False)), found)
    for file in files(cache, "pictures"):
        assert len(ArrayFile(file)["pixels"]) == SIZE * SIZE * 3


# --- Shrinking -----------------------------------------------------------------------------------


def test_what_the_smallest_crop_needs():
    side = Augmentation(scale=(0.25, 1.0), ratio=(0.5, 2.0), zoom=(0.5, 2.0)).side_needed(100)
    assert side == int(np.ceil(100 * 2 / np.sqrt(0.25 * 0.5)))
    assert Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0)).side_needed(100) == 100
    rng = np.random.default_rng(0)
    augment = Augmentation(scale=(0.3, 1.0))
    for shape in ((300, 200), (200, 300), (200, 200)):
        factor = augment.side_needed(64) / min(shape)
        for _ in range(200):
            left, top, right, bottom = augment._crop_box(shape, rng.random(40).tolist())
            assert min(right - left, bottom - top) * factor >= 63.5


def test_shrunk_views_stay_close_to_those_of_the_full_size(photos, tokenizer):
    full, shrunk = (
        torch.cat([b["images"].float() for b in batches(module_of(photos, tokenizer, **how))])
        for how in ({}, {"shrink_pictures": True})
    )
    assert 0 < float((full - shrunk).abs().mean()) < 3


def test_a_shrunk_picture_is_cropped_where_the_full_one_is():
    # A ramp from left to right: the mean of a view says where its crop is.
    ramp = np.tile(np.linspace(0, 255, 400), (300, 1))
    image = Image.fromarray(np.dstack([ramp] * 3).astype(np.uint8))
    augment = Augmentation(scale=(0.2, 0.3))
    smaller = Shrunk(augment.side_needed(20), "bicubic")(image)
    assert smaller.full_size == (400, 300)
    assert min(smaller.image.size) < 150
    for seed in range(20):
        full, shrunk = (
            augment(source, 20, "bicubic", np.random.default_rng(seed)).float()
            for source in (image, smaller)
        )
        assert (full - shrunk).abs().max() <= 2  # a pixel of the smaller one is 2.9 levels wide


@pytest.mark.parametrize("size", [(60, 60), (90, 60), (60, 61), (3, 200)])
def test_smaller_pictures_are_not_touched(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image, full_size = Shrunk(60, "bicubic")(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(image), pixels)
    assert full_size == size


def test_a_side_below_the_models(photos, tokenizer):
    with pytest.raises(UserError, match=r"data\.shrink_pictures: 15 is less than the 16 pixels"):
        batches(module_of(photos, tokenizer, shrink_pictures=15))


# --- Keys ----------------------------------------------------------------------------------------


def test_what_gives_other_tokens_is_another_file(photos, cache):
    def count(tokenizer, **arguments):
        kept = {"cache_tokens": True, "cache_folder": str(cache)}
        module_of(photos, tokenizer, **kept, **arguments).setup("fit")
        return len(files(cache, "tokens"))

    assert count(Tokenizer("english")) == 2
    assert count(Tokenizer("english")) == 2
    assert count(Tokenizer("english"), captions="all") == 2  # policies share it
    assert count(Tokenizer("english", context_length=9)) == 4
    assert count(Tokenizer("english", clean="whitespace")) == 6
    assert count(_cut_vocabulary()) == 8
    (photos / "00.txt").write_text("another caption")
    assert count(Tokenizer("english")) in (9, 10)  # of the split that it belongs to
    before = len(files(cache, "tokens"))
    (photos / "03.txt").unlink()
    (photos / "03.jpg").unlink()
    assert count(Tokenizer("english")) > before


def _cut_vocabulary():
    definition = json.loads(Tokenizer("english").definition)
    definition["model"]["merges"].pop()
    return Tokenizer(definition=json.dumps(definition))


def test_another_column_is_another_file(pictures, cache, tokenizer):
    for number, column in enumerate(("caption", "label"), 1):
        data = module_of(
            pictures, tokenizer, cache_tokens=True, cache_folder=str(cache), caption_column=column
        )
        found = batches(data)
        assert same(batches(module_of(pictures, tokenizer, caption_column=column)), found)
        assert len(files(cache, "tokens")) == 2 * number


def test_what_gives_other_pictures_is_another_file(photos, cache, tokenizer):
    def count(**arguments):
        arguments = {"cache_pictures_gb": 1, "cache_folder": str(cache), **arguments}
        data = module_of(photos, tokenizer, **arguments)
        plain = {k: v for k, v in arguments.items() if not k.startswith("cache")}
        assert same(batches(data), batches(module_of(photos, tokenizer, **plain)))
        return len(files(cache, "pictures"))

    assert count(shrink_pictures=20) == 2
    assert count(shrink_pictures=20, seed=9) == 2
    assert count(shrink_pictures=30) == 3
    assert count(augment=False) == 4
    # As many bytes as before, and other pixels.
    for first, second in zip(range(0, 12, 2), range(1, 12, 2), strict=True):
        one, other = photos / f"{first:02d}.jpg", photos / f"{second:02d}.jpg"
        content, size = other.read_bytes(), max(one.stat().st_size, other.stat().st_size)
        other.write_bytes(one.read_bytes().ljust(size, b"\0"))
        one.write_bytes(content.ljust(size, b"\0"))
    assert count(augment=False) == 6


def test_other_pictures_of_the_same_names_lengths_and_times(tmp_path, cache, tokenizer):
    """As from an archive that writes no times: nothing but what is in them tells them apart."""
    data = []
    for name, shade in (("one", 0), ("other", 200)):
        folder = tmp_path / name / "photos"
        folder.mkdir(parents=True)
        for number in range(4):
            path = folder / f"{number}.bmp"
            Image.new("RGB", (20, 20), (shade + number,) * 3).save(path)
            path.with_suffix(".txt").write_text(f"picture {number}")
            for file in (path, path.with_suffix(".txt")):
                os.utime(file, (0, 0))
        settings = {"batch_size": 2, "augment": False, "cache_pictures_gb": 1}
        plain = module_of(folder, tokenizer, batch_size=2, augment=False)
        kept = module_of(folder, tokenizer, cache_folder=str(cache), **settings)
        assert same(batches(plain), batches(kept))
        data.append(files(cache, "pictures"))
    assert data[0] == data[1]


def test_a_parquet_file_written_again_is_another_file(tmp_path, cache, tokenizer, photos):
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(order):
        encoded = [(photos / f"{number:02d}.jpg").read_bytes() for number in order]
        rows = {
            "image": [{"bytes": content, "path": f"{n}.jpg"} for n, content in enumerate(encoded)],
            "caption": [f"picture {number}" for number in range(12)],
        }
        pq.write_table(pa.table(rows), tmp_path / "train.parquet")

    for number, order in enumerate((range(12), reversed(range(12))), 1):
        write(order)
        arguments = {"cache_pictures_gb": 1, "cache_folder": str(cache), "augment": False}
        found = batches(module_of(tmp_path / "train.parquet", tokenizer, **arguments))
        plain = module_of(tmp_path / "train.parquet", tokenizer, augment=False)
        assert same(found, batches(plain))
        assert len(files(cache, "pictures")) == 2 * number


# --- Damage --------------------------------------------------------------------------------------


def cut_off(file):
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 3)


def cut_to_nothing(file):
    file.write_bytes(b"")


def altered_at_the_end(file):
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)


def altered_at_the_start(file):
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [cut_off, cut_to_nothing, altered_at_the_end, altered_at_the_start]
)
def test_damaged_files_are_built_again(photos, cache, tokenizer, damage, caplog):
    arguments = {
        "augment": False, "cache_tokens": True, "cache_pictures_gb": 1, "cache_folder": str(cache),
    }  # fmt: skip
    plain = batches(module_of(photos, tokenizer, augment=False))
    batches(module_of(photos, tokenizer, **arguments))
    whole = {file: file.read_bytes() for file in files(cache, "*")}
    for file in whole:
        damage(file)
    with caplog.at_level("INFO"):
        assert same(plain, batches(module_of(photos, tokenizer, **arguments)))
    # Pixels are checked when they are read; the run after that builds them again.
    batches(module_of(photos, tokenizer, **arguments))
    assert {file: file.read_bytes() for file in files(cache, "*")} == whole
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert all(any(str(file) in line and "damaged" in line for line in warned) for file in whole)


def test_a_broken_picture_is_named_as_without_a_cache(photos, cache, tokenizer, caplog):
    (photos / "05.jpg").write_bytes((photos / "05.jpg").read_bytes()[:200])

    with caplog.at_level("INFO"):
        kept = batches(module_of(photos, tokenizer, augment=False, cache_pictures_gb=1,
                                 cache_folder=str(cache)))  # fmt: skip
    plain = batches(module_of(photos, tokenizer, augment=False))
    assert same(kept, plain)
    found = [broken.key for batch in kept for broken in batch["broken"]]
    assert set(found) == {"05"}
    assert "the others cannot be decoded" in caplog.text


# --- Bounds and folders --------------------------------------------------------------------------


def test_the_bound_is_kept_to(photos, cache, tokenizer, caplog):
    plain = batches(module_of(photos, tokenizer, augment=False))
    sizes = []
    for bound in (1e-9, 6.5e-6, 8e-6, 1, 7e-6):
        arguments = {"cache_pictures_gb": bound, "cache_folder": str(cache), "augment": False}
        with caplog.at_level("INFO"):
            assert same(plain, batches(module_of(photos, tokenizer, **arguments)))
        each = [file.stat().st_size for file in files(cache, "pictures")]
        assert all(size <= bound * 1e9 for size in each)
        sizes.append(sum(each))
    assert sizes[0] == 0 < sizes[1] < sizes[2] < sizes[3] > sizes[4]
    assert "data.cache_pictures_gb has no room for the others" in caplog.text


def test_the_users_cache_folder_is_the_default(photos, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(photos)
    before = sorted(photos.iterdir())
    batches(module_of(photos, tokenizer, cache_tokens=True))
    assert len(files(tmp_path / "xdg" / "clipkit", "tokens")) == 2
    assert sorted(photos.iterdir()) == before
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    batches(module_of(photos, tokenizer, cache_tokens=True))
    assert len(files(tmp_path / "home" / ".cache" / "clipkit", "tokens")) == 2


def test_a_folder_that_is_none(photos, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_folder: .*file.* cannot be used"):
        batches(
            module_of(photos, tokenizer, cache_tokens=True, cache_folder=str(tmp_path / "file"))
        )


@pytest.mark.parametrize("bound", [-1, float("nan"), float("inf")])
def test_a_bound_that_is_none(photos, tokenizer, bound):
    with pytest.raises(UserError, match=r"data\.cache_pictures_gb"):
        module_of(photos, tokenizer, cache_pictures_gb=bound)


def test_drawn_pictures_have_tokens_to_keep(tokenizer, cache):
    arguments = {
        "length": 16,
        "batch_size": 8,
        "image_size": SIZE,
        "tokenizer": tokenizer,
        "seed": 0,
    }
    kept = ShapesPairs(**arguments, cache_tokens=True, cache_folder=str(cache))
    assert same(batches(ShapesPairs(**arguments)), batches(kept))


# --- Several processes ---------------------------------------------------------------------------


def build(photos, cache, tokenizer, seconds, marks):
    """Build the caches, taking so long over each picture."""
    original = Shrunk.__call__

    def slow(self, source):
        time.sleep(seconds)
        with marks.open("a") as stream:
            stream.write("x")
        return original(self, source)

    Shrunk.__call__ = slow
    kept = {"cache_tokens": True, "cache_pictures_gb": 1, "cache_folder": str(cache)}
    module_of(photos, tokenizer, shrink_pictures=True, **kept).setup("fit")


@pytest.fixture
def start(photos, cache, tokenizer, tmp_path):
    def started(seconds):
        # Forked, so that nothing is imported again.
        arguments = (photos, cache, tokenizer, seconds, tmp_path / "marks")
        process = multiprocessing.get_context("fork").Process(target=build, args=arguments)
        process.start()
        return process

    return started


def test_two_processes_at_once(start, photos, cache, tokenizer, tmp_path):
    both = [start(0.02), start(0.02)]
    for one in both:
        one.join()
    assert [one.exitcode for one in both] == [0, 0]
    # One of them shrank the training pictures, once each.
    assert (tmp_path / "marks").stat().st_size == 11
    plain = batches(module_of(photos, tokenizer, shrink_pictures=True))
    arguments = {"cache_tokens": True, "cache_pictures_gb": 1, "cache_folder": str(cache)}
    assert same(plain, batches(module_of(photos, tokenizer, shrink_pictures=True, **arguments)))
    assert not list(cache.glob("*unfinished*"))


def test_killed_while_it_builds(start, photos, cache, tokenizer, tmp_path):
    one = start(0.1)
    while not (tmp_path / "marks").exists():
        time.sleep(0.01)
    one.kill()
    one.join()
    assert list(cache.glob(".pictures-*.unfinished"))
    plain = batches(module_of(photos, tokenizer, shrink_pictures=True))
    arguments = {"cache_tokens": True, "cache_pictures_gb": 1, "cache_folder": str(cache)}
    assert same(plain, batches(module_of(photos, tokenizer, shrink_pictures=True, **arguments)))
    assert not list(cache.glob(".*.unfinished"))
    assert len(files(cache, "pictures")) == 2


def test_memory_is_shared_by_processes(photos, cache, tokenizer):
    rows = open_layout(str(photos)).split("train")
    cached = cached_tokens(rows, tokenizer, cache, split="train")
    assert isinstance(cached, CachedTokens)
    assert len(cached.encode([0], tokenizer.contract).tokens)
    assert len(pickle.dumps(cached)) < 2000  # the path, not the arrays
    assert not cached._file["ids"].flags.writeable


def test_files_not_used_for_longest_make_room(tmp_path, monkeypatch, caplog):
    def kept():
        return sorted(path.name for path in tmp_path.glob("*.clipkit"))

    def build(name):
        path = tmp_path / f"{name}.clipkit"
        open_or_build(path, lambda writer: writer.append("x", np.zeros(1500, np.uint8)))
        return path

    now = time.time()
    for days, name in ((9, "older"), (5, "used again"), (3, "old"), (0.5, "of today")):
        os.utime(build(name), (now - days * 86_400,) * 2)
    build("used again")
    monkeypatch.setenv("CLIPKIT_CACHE_GB", "0.000005")  # three of them
    caplog.set_level("INFO")
    build("new")
    assert kept() == ["new.clipkit", "of today.clipkit", "used again.clipkit"]
    assert "CLIPKIT_CACHE_GB" in caplog.text
    monkeypatch.setenv("CLIPKIT_CACHE_GB", "many")
    with pytest.raises(UserError, match="CLIPKIT_CACHE_GB: 'many' is no number"):
        build("another")
