"""CLIP_benchmark's folders, names and results: small local copies, read through the same code."""

from __future__ import annotations

import csv
import gc
import importlib.util
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.data.images import decode_image
from clipkit.data.layouts import open_layout
from clipkit.errors import UserError
from clipkit.suite.builtin import BUILTIN, IMAGE_SIZE, open_builtin
from clipkit.suite.clip_benchmark import (
    OWN,
    is_folder,
    open_folder,
    open_sugar_crepe,
    read_reference,
    save_clip_benchmark,
    targets_of,
    to_clip_benchmark,
)
from clipkit.suite.eval_data import EvalData, open_classes, prompts_for
from clipkit.suite.suite_file import read_suite

COUNT = 25  # more than ten shards of two: their order is that of numbers, not of names
NAMES = ["red fox", "", "tree_frog"]
TEMPLATES = ["a photo of a {c}.", "a bad photo of the {c}."]


def encoded(number: int, kind: str = "png") -> bytes:
    pixels = np.full((6, 8, 3), (number * 10, 255 - number * 10, 40), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, lossless=True)
    return stream.getvalue()


def array(values: object, **kwargs: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(values, **kwargs))
    return stream.getvalue()


def write_folder(
    root: Path, labels: list[bytes], field: str, *, kind: str = "", split: str = "test"
) -> Path:
    """CLIP_benchmark's converter writes the same: keys, names, shards of a fixed number."""
    (root / split).mkdir(parents=True)
    shards = [labels[start : start + 2] for start in range(0, len(labels), 2)]
    for shard, content in enumerate(shards):
        with tarfile.open(root / split / f"{shard}.tar", "w") as archive:
            for place, label in enumerate(content):
                number = 2 * shard + place
                kinds = {"webp": "webp", "png": "png", "jpg": "jpeg"}
                ending = list(kinds)[number % 3] if shard else "webp"
                picture = encoded(number, kinds[ending])
                for name, data in ((ending, picture), (field, label)):
                    member = tarfile.TarInfo(f"s{number:07d}.{name}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    (root / split / "nshards.txt").write_text(f"{len(shards)}\n")
    if kind:
        (root / "dataset_type.txt").write_text(f"{kind}\n")
    return root


def write_names(root: Path) -> Path:
    (root / "classnames.txt").write_text("".join(f"{name}\n" for name in NAMES))
    templates = "".join(f"{template}\n" for template in TEMPLATES)
    (root / "zeroshot_classification_templates.txt").write_text(templates)
    return root


@pytest.fixture
def labelled(tmp_path):
    labels = [str(number % 3).encode() for number in range(COUNT)]
    return write_names(write_folder(tmp_path / "wds", labels, "cls"))


def test_classification(labelled):
    assert is_folder(str(labelled))
    folder = open_folder(str(labelled), "test")
    assert folder.kind == "classification"
    assert folder.class_names == NAMES  # an empty name keeps its place
    assert folder.templates == TEMPLATES
    assert folder.revision is None
    found = folder.rows.labels("label")
    assert found.ids.tolist() == [number % 3 for number in range(COUNT)]
    assert found.names == NAMES
    assert folder.rows.keys() == [f"s{number:07d}" for number in range(COUNT)]
    for number in (0, 9, 21, 24):
        pixel = np.asarray(decode_image(folder.rows.image(number)))[0, 0]
        expected = (number * 10, 255 - number * 10, 40)
        assert np.abs(pixel.astype(int) - expected).max() <= 4  # a third of them are JPEG


def test_a_folder_serves_wherever_rows_do(labelled):
    data = EvalData(path=str(labelled), split="test", templates=OWN)
    folder = open_folder(str(labelled), "test")
    rows = pickle.loads(pickle.dumps(folder.rows))[3:]
    complete = folder.complete(data)
    assert complete.class_names == NAMES
    assert complete.templates == TEMPLATES
    classes = open_classes(complete, rows)
    assert classes.labels.tolist() == [number % 3 for number in range(3, COUNT)]
    assert classes.names == NAMES
    assert rows.captions(0) == []
    prompts = prompts_for(complete, classes.names)
    assert prompts.unique[:2] == ["a photo of a red fox.", "a bad photo of the red fox."]
    chosen = EvalData(path=data.path, templates=["my {}"], class_names=["a", "b", "c"])
    assert folder.complete(chosen) == chosen


def test_multilabel(tmp_path):
    shown = [[number % 2, 1, 0] for number in range(5)]
    labels = [array(row, dtype=np.float32) for row in shown]
    root = write_names(write_folder(tmp_path / "wds", labels, "npy", kind="multilabel"))
    folder = open_folder(str(root), "test")
    assert folder.kind == "multilabel"
    assert np.array_equal(targets_of(folder.rows), np.array(shown, bool))
    assert np.array_equal(targets_of(folder.rows[2:4]), np.array(shown[2:4], bool))
    assert folder.complete(EvalData(path=str(root), templates=OWN)).class_names == NAMES


def test_retrieval(tmp_path):
    captions = [[f"one {n}", f"an other of {n}", "la même é"][: 1 + n % 3] for n in range(7)]
    labels = ["\n".join(texts).encode() for texts in captions]
    root = write_folder(tmp_path / "wds", labels, "txt", kind="retrieval")
    folder = open_folder(str(root), "test")
    assert folder.kind == "retrieval"
    assert list(folder.rows.all_captions()) == captions
    assert folder.class_names is None
    data = EvalData(path=str(root), templates=OWN)
    assert folder.complete(data) == data


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_nothing_is_unpickled(tmp_path):
    trap = tmp_path / "trap"
    labels = [array([Trap(trap)], dtype=object)]
    root = write_folder(tmp_path / "wds", labels, "npy", kind="multilabel")
    with pytest.raises(UserError, match=r"s0000000\.npy in 0\.tar is no array of numbers"):
        open_folder(str(root), "test")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"classnames.txt": "one\ntwo\n"}, r"s0000002.cls in 1.tar holds class 2, but there are 2"),
        ({"dataset_type.txt": "captioning"}, "says 'captioning'; known are classification, multi"),
        ({"dataset_type.txt": "multilabel"}, "a multilabel set has .npy beside its pictures, not"),
        ({"test/nshards.txt": "15"}, r"2 of 15 shards are missing \(test/13.tar, test/14.tar\)"),
        ({"test/nshards.txt": "many"}, "nshards.txt says 'many'"),
        ({"test/0.tar": "no tar at all"}, "cannot be read as tar"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(labelled, change, sentence):
    for name, content in change.items():
        (labelled / name).write_text(content)
    with pytest.raises(UserError, match=f"^data.path .*{sentence}"):
        open_folder(str(labelled), "test")


def test_a_split_or_templates_that_are_not_there(labelled):
    with pytest.raises(UserError, match="has no split 'validation'; it has: test"):
        open_folder(str(labelled), "validation")
    (labelled / "zeroshot_classification_templates.txt").unlink()
    folder = open_folder(str(labelled), "test")
    with pytest.raises(UserError, match="has no zeroshot_classification_templates"):
        folder.complete(EvalData(path=str(labelled), templates=OWN))


def test_a_sample_without_its_label(tmp_path):
    root = write_folder(tmp_path / "wds", [b"0", b"1"], "cls")
    with tarfile.open(root / "test" / "0.tar", "a") as archive:
        picture = encoded(3)
        member = tarfile.TarInfo("s0000002.png")
        member.size = len(picture)
        archive.addfile(member, io.BytesIO(picture))
    with pytest.raises(UserError, match=r"1 of 3 samples have no \.cls \(s0000002\)"):
        open_folder(str(root), "test")


def test_class_names_of_the_caller_come_first(labelled):
    (labelled / "classnames.txt").write_text("one\ntwo\n")  # a line short, as one on the hub is
    folder = open_folder(str(labelled), "test", class_names=["a", "b", "c"])
    assert folder.rows.labels("label").names == ["a", "b", "c"]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def place_in_hub(cache: Path, name: str) -> Path:
    """The folder of a data set's files, as the hub's own library keeps what it downloaded."""
    repository = cache / f"datasets--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_read_from_the_cache(hub, labelled):
    folder = place_in_hub(hub, "clip-benchmark/wds_foxes")
    folder.parent.mkdir()
    labelled.rename(folder)
    assert is_folder("clip-benchmark/wds_foxes")
    found = open_folder("clip-benchmark/wds_foxes", "test")
    assert found.revision == COMMIT
    assert len(found.rows) == COUNT
    with pytest.raises(UserError, match="the hub cannot be reached, and the cache does not hold"):
        open_folder("clip-benchmark/wds_wolves", "test")


@pytest.mark.parametrize("name", ["vtab", "vtab+", "imagenet_robustness", "retrieval"])
def test_every_set_of_a_collection_is_read(hub, name):
    for task in read_suite(name).tasks:
        path = task.data.path
        assert path is not None
        folder = place_in_hub(hub, path)
        if task.task == "retrieval":
            write_folder(folder, [b"one\ntwo"] * 2, "txt", kind="retrieval")
        elif task.task == "multilabel":
            shown = [array([1.0, 0.0, 1.0])] * 2
            write_names(write_folder(folder, shown, "npy", kind="multilabel"))
        else:
            write_names(write_folder(folder, [b"0", b"2"], "cls"))
        opened = open_folder(path, task.data.split, class_names=task.data.class_names)
        data = opened.complete(task.data)
        if task.task == "retrieval":
            assert opened.rows.captions(1) == ["one", "two"]
            continue
        assert data.class_names == (task.data.class_names or NAMES)
        prompts = prompts_for(data, data.class_names)
        assert len(prompts.class_of_prompt) == len(TEMPLATES) * len(data.class_names)
        if task.task == "multilabel":
            assert targets_of(opened.rows).shape == (2, 3)
        else:
            assert open_classes(data, opened.rows).labels.tolist() == [0, 2]


def test_sugar_crepe_as_the_hub_has_it(tmp_path):
    right, wrong = ["a man on a dog", "a red bus"], ["a dog on a man", "a blue bus"]
    for task in read_suite("sugar_crepe").tasks:
        table = pa.table(
            {
                "image": [{"bytes": encoded(n), "path": f"{n}.png"} for n in (0, 1)],
                "tested_labels": [list(pair) for pair in zip(right, wrong, strict=True)],
                "true_label": [3, 0],
            }
        )
        folder = tmp_path / task.set / "data"
        folder.mkdir(parents=True)
        pq.write_table(table, folder / "test-00000-of-00001-0123456789abcdef.parquet")
        layout = open_layout(str(folder.parent), caption_column=task.data.caption_column)
        rows = layout.split(task.data.split)
        assert [rows.captions(row) for row in (0, 1)] == [
            list(pair) for pair in zip(right, wrong, strict=True)
        ]


def test_sugar_crepe(tmp_path):
    (tmp_path / "val2017").mkdir()
    entries = {}
    for number in (3, 11):  # the numbers have gaps
        (tmp_path / "val2017" / f"{number:012d}.jpg").write_bytes(encoded(number, "jpeg"))
        entries[str(number)] = {
            "filename": f"{number:012d}.jpg",
            "caption": f"right {number}",
            "negative_caption": f"wrong {number}",
        }
    path = tmp_path / "swap_obj.json"
    path.write_text(json.dumps(entries))
    rows = open_sugar_crepe(str(path))
    assert list(rows.all_captions()) == [["right 3", "wrong 3"], ["right 11", "wrong 11"]]
    assert decode_image(rows.image(1)).size == (8, 6)
    entries["12"] = entries["11"] | {"filename": "none.jpg"}
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"1 pictures are not in .*val2017 \(none.jpg\)"):
        open_sugar_crepe(str(path))
    path.write_text("[1, 2]")
    with pytest.raises(UserError, match="is no list of filename, caption, negative_caption"):
        open_sugar_crepe(str(path))


# --- Names, templates, prompts -----------------------------------------------------------------


def test_names_and_templates_of_clip_benchmark(shared_data):
    folder = str(shared_data / "prompts")
    names = read_reference("en_classnames.json#imagenet1k", folder=folder)
    assert len(names) == 1000
    assert names[0] == "tench"
    templates = read_reference("en_zeroshot_classification_templates.json#cifar10", folder=folder)
    assert len(templates) == 18
    assert read_reference("en_classnames.json", folder=folder, key="pets")[0] == "Abyssinian"
    empty = read_reference("en_classnames.json#clevr_closest_object_distance", folder=folder)
    assert empty[3] == ""
    with pytest.raises(UserError, match=r"has no key 'imagnet'; did you mean .*#imagenet1k\?"):
        read_reference("en_classnames.json#imagnet", folder=folder)


def test_prompts_of_each_class(tmp_path):
    cupl = {"animals": {"red fox": ["A fox is red."], "tree frog": ["It climbs.", "Green {}."]}}
    (tmp_path / "cupl.json").write_text(json.dumps(cupl))
    for reference, key in (("cupl.json#animals", ""), ("cupl.json", "animals")):
        assert read_reference(reference, folder=str(tmp_path), key=key) == cupl["animals"]
    (tmp_path / "flat.json").write_text(json.dumps(cupl["animals"]))
    assert read_reference("flat.json", folder=str(tmp_path)) == cupl["animals"]
    data = EvalData(prompts=cupl["animals"])
    prompts = prompts_for(data, ["tree_frog", "red fox", "tree frog"])
    assert prompts.unique == ["It climbs.", "Green {}.", "A fox is red."]
    assert prompts.class_of_prompt.tolist() == [0, 0, 1, 2, 2]
    assert prompts.prompt_index.tolist() == [0, 1, 2, 0, 1]
    with pytest.raises(UserError, match=r"1 of 2 classes have no prompts \('wolf'\)"):
        prompts_for(data, ["red fox", "wolf"])


@pytest.mark.parametrize(
    ("content", "reference", "sentence"),
    [
        ("{", "names.json#a", "is not JSON"),
        ('{"a": [1]}', "names.json#a", "neither a list of texts nor prompts"),
        ('{"a": ["x"]}', "names.json#b", "has no key 'b'; it has: a"),
        ('["x"]', "names.json#b", "has no keys, so no 'b'"),
        ("[]", "other.json", "there is no file .*other.json"),
    ],
)
def test_what_is_wrong_with_a_file_of_names_is_said(tmp_path, content, reference, sentence):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_reference(reference, folder=str(tmp_path))


def test_lines_keep_their_places(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffone\r\n\r\n three \r\n".encode())
    assert read_reference("names.txt", folder=str(tmp_path)) == ["one", "", "three"]


# --- Built-in data -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_data(name):
    rows = {split: open_builtin(name, split) for split in BUILTIN[name]}
    keys = [key for part in rows.values() for key in part.keys()]  # noqa: SIM118
    assert len(set(keys)) == len(keys)
    for part in rows.values():
        labels = part.labels("label")
        assert len(labels.names) == {"digits": 10, "shapes": 80}[name]
        assert part.image(0).size == (IMAGE_SIZE, IMAGE_SIZE)
    test = rows["test"]
    assert len(np.unique(test.labels("label").ids)) == len(test.labels("label").names)
    again = open_builtin(name, "test")
    assert np.array_equal(np.asarray(again.image(7)), np.asarray(test.image(7)))
    assert pickle.loads(pickle.dumps(test))[5:].key(0) == f"{name}-test-5"
    pictures = {
        np.asarray(part.image(row)).tobytes() for part in rows.values() for row in range(99)
    }
    assert len(pictures) == 99 * len(rows)


def test_digits_are_what_scikit_learn_says():
    from sklearn.datasets import load_digits

    rows = open_builtin("digits", "test")
    found = rows.labels("label")
    assert found.names[0] == "zero"
    assert np.array_equal(found.ids, load_digits().target[997:])
    ink = [np.asarray(rows.image(row)).mean() for row in range(50)]
    assert np.corrcoef(ink, load_digits().data[997:1047].mean(1))[0, 1] > 0.99


def test_captions_of_shapes_are_told_apart():
    rows = open_builtin("shapes", "test", caption_column="*caption")
    pairs = list(rows.all_captions())
    right = [pair[0] for pair in pairs]
    assert len(set(right)) == len(right) == 1000
    for first, second in pairs:
        assert first != second
    names = rows.labels("label").names
    assert all(
        names[label] in text for label, text in zip(rows.column("label"), right, strict=True)
    )
    unseen = open_builtin("shapes", "unseen").labels("label").ids
    assert len(np.unique(unseen)) == 16


def test_built_in_data_that_is_not_there():
    with pytest.raises(UserError, match="no built-in data 'mnist'; there are: digits, shapes"):
        open_builtin("mnist", "test")
    with pytest.raises(UserError, match="has no split 'unseen'; it has: train, validation, test"):
        open_builtin("digits", "unseen")
    with pytest.raises(UserError, match="no column of captions 'caption'; it has: none"):
        open_builtin("digits", "test", caption_column="caption")


# --- Results -----------------------------------------------------------------------------------


def result() -> dict:
    def values(**metrics: float | None) -> dict:
        return {
            name: {"value": value, "low": None, "high": None} for name, value in metrics.items()
        }

    def task(task: str, name: str, metrics: dict, data: str = "folder", **more: object) -> dict:
        settings = {"arguments": more}
        return {
            "task": task, "set": name, "data": {"id": data}, "metrics": metrics,
            "settings": settings,
        }  # fmt: skip

    directions = {"image_to_text_r1": 0.5, "image_to_text_r5": 0.7, "text_to_image_r1": 0.3}
    zeroshot = values(top1=0.25, top5=None, mean_class_top1=0.2, tie_rate=0.0)
    return {
        "schema": 1,
        "model": {
            # Typed as OpenAI writes it, and named as open_clip does.
            "spec": "open_clip:ViT-B/32/openai",
            "name": "ViT-B-32/openai",
            "weights": "ab" * 32,
        },
        "tasks": [
            task("zeroshot", "vtab-pets", zeroshot, "clip-benchmark/wds_vtab-pets"),
            task("multilabel", "voc", values(map=0.6, map_11point=0.5)),
            task("retrieval", "flickr8k", values(**directions, text_to_image_mean_rank=9.0)),
            task("probe", "digits", values(top1=0.9, mean_class_top1=0.8)),
            task("fewshot", "digits", values(top1=0.7), shots=5, seeds=3),
            task("knn", "digits", values(top1=0.9)),
            task("winoground", "winoground", values(text=0.3, image=0.1, group=0.05)),
            task("sugarcrepe", "swap_obj", values(accuracy=0.6)),
        ],
    }


def test_results_in_their_words():
    entries = to_clip_benchmark(result())
    assert {tuple(entry) for entry in entries} == {
        ("dataset", "model", "pretrained", "task", "metrics", "language")
    }
    assert {(e["model"], e["pretrained"], e["language"]) for e in entries} == {
        ("ViT-B-32", "openai", "en")
    }
    assert [(e["dataset"], e["task"], e["metrics"]) for e in entries] == [
        (
            "wds/vtab/pets",
            "zeroshot_classification",
            {"acc1": 0.25, "mean_per_class_recall": 0.2},
        ),
        ("voc", "zeroshot_classification", {"mean_average_precision": 0.6}),
        (
            "flickr8k",
            "zeroshot_retrieval",
            {
                "image_retrieval_recall@1": 0.3,
                "text_retrieval_recall@1": 0.5,
                "text_retrieval_recall@5": 0.7,
            },
        ),
        ("digits", "linear_probe", {"lp_acc1": 0.9, "lp_mean_per_class_recall": 0.8}),
        ("digits", "linear_probe", {"lp_acc1": 0.7, "fewshot_k": 5}),
        ("winoground", "image_caption_selection", {"image_acc": 0.1, "text_acc": 0.3, "acc": 0.05}),
        ("sugar_crepe/swap_obj", "image_caption_selection", {"text_acc": 0.6, "acc": 0.6}),
    ]
    own = result()
    own["model"] = {"spec": "runs/emoji/last.ckpt", "name": "emoji", "weights": "ab" * 32}
    assert {(e["model"], e["pretrained"]) for e in to_clip_benchmark(own)} == {("emoji", "ab" * 6)}


def test_their_build_reads_our_results(tmp_path):
    package = importlib.util.find_spec("clip_benchmark")
    if package is None or package.origin is None:
        pytest.skip("clip-benchmark is not installed")
    files = save_clip_benchmark(result(), tmp_path / "out")
    assert len(set(files)) == 7
    # The function alone: importing the module imports every model library there is.
    code = (Path(package.origin).parent / "cli.py").read_text()
    code = code[code.index("def main_build(") : code.index("def main_eval(")]
    theirs: dict = {"csv": csv, "json": json, "os": os}
    exec(code, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # they leave files open
        theirs["main_build"](
            SimpleNamespace(files=[str(tmp_path / "out")], output=str(tmp_path / "all.csv"))
        )
        gc.collect()
    with (tmp_path / "all.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 7
    assert {row["model_fullname"] for row in rows} == {"ViT-B-32 openai"}
    assert {float(row["acc1"]) for row in rows if row["acc1"]} == {0.25}
    assert {float(row["lp_acc1"]) for row in rows if row["lp_acc1"]} == {0.7, 0.9}
