"""A model on a suite: every task, chance for a constant model, resuming, and what fails."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clipkit.errors import UserError
from clipkit.evaluation.metric import Metric
from clipkit.interop import OpenedModel
from clipkit.suite import EvalData, results
from clipkit.suite.benchmark import benchmark
from clipkit.suite.command import table
from clipkit.suite.opening import open_data
from clipkit.suite.suite_file import read_suite
from clipkit.suite.tasks import TASKS
from clipkit.tracking.metric_names import MAIN

SUITE = """\
tasks:
  - {task: zeroshot, set: shapes, data: &shapes {path: shapes, split: test, limit: 60}}
  - {task: retrieval, set: shapes, data: *shapes}
  - {task: sugarcrepe, set: shapes, data: {path: shapes, split: test, caption_column: "*caption", limit: 60}}
  - {task: zeroshot, set: digits, data: &digits {path: digits, split: test, limit: 80}}
  - {task: probe, set: digits, data: *digits, train: {split: train, limit: 150}, validation: {split: validation, limit: 80}}
  - {task: fewshot, set: digits, data: *digits, train: {split: train}, shots: 2, seeds: 3}
  - {task: knn, set: digits, data: *digits, train: {split: train, limit: 150}, k: 5}
"""  # noqa: E501


class Constant:
    """Everything is alike to it."""

    def __init__(self):
        self.pictures = 0
        self.texts = []

    def embed_images(self, images):
        self.pictures += len(images)
        return torch.ones(len(images), 8)

    def embed_texts(self, texts):
        self.texts += texts
        return torch.ones(len(texts), 8)


class Pixels(Constant):
    """Sees a picture as sixteen pixels of each colour; a text as the lengths of its words."""

    def embed_images(self, images):
        self.pictures += len(images)
        small = [np.array(image.resize((4, 4)), np.float32).ravel() for image in images]
        return torch.from_numpy(np.stack(small)) - 128

    def embed_texts(self, texts):
        self.texts += texts
        seeds = (len(text) * 7 + ord(text[-2]) for text in texts)
        made = [torch.randn(48, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(made)


def opened(model, *, scale=None, weights="w"):
    return OpenedModel(
        model=model, spec="my_code:build", name="own", scale=scale, weights=weights,
        tokenizer=None, preprocess=None, dtype="float32", embed_dim=8,
    )  # fmt: skip


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "suite.yaml").write_text(SUITE)
    return read_suite(tmp_path / "suite.yaml")


def test_a_constant_model_scores_chance_in_every_task(suite):
    result = benchmark(opened(Constant(), scale=10.0), suite)
    assert not result["failed"]
    assert len(result["tasks"]) == 7
    for entry in result["tasks"]:
        for name, metric in entry["metrics"].items():
            if metric["chance"] is not None:
                assert metric["value"] == pytest.approx(metric["chance"], abs=1e-9), (entry, name)
                assert metric["normalised"] in (None, pytest.approx(0.0, abs=1e-9))


def test_pictures_and_texts_are_embedded_once(suite):
    model = Pixels()
    benchmark(opened(model), suite)
    texts = model.texts[2:]  # after the two that the model's digest is made of
    assert len(texts) == len(set(texts))
    # shapes 60, digits test 80, train 150 and 600, validation 80: each once for all tasks.
    assert model.pictures == 2 + 60 + 80 + 150 + 600 + 80


def test_the_file_says_what_was_measured(suite, tmp_path):
    path = tmp_path / "own.json"
    result = benchmark(opened(Pixels(), scale=20.0), suite, output=path)
    kept = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert kept == result
    assert kept["schema"] == 1
    assert (kept["model"]["weights"], kept["model"]["dtype"]) == ("w", "float32")
    assert kept["settings"] == {"batch_size": 64, "limit": None, "seed": 0}
    shapes = kept["tasks"][0]
    assert (shapes["data"]["id"], shapes["data"]["split"], shapes["data"]["n"]) == (
        "shapes", "test", 60,
    )  # fmt: skip
    assert shapes["data"]["classes"] == 80
    assert "ece" in shapes["metrics"]
    for entry in kept["tasks"]:
        outcomes = pq.read_table(tmp_path / entry["outcomes"]).to_pandas()
        about = json.loads(pq.read_schema(tmp_path / entry["outcomes"]).metadata[b"clipkit"])
        assert about["data"] == entry["data"]["digest"]
        assert re.fullmatch("[0-9a-f]{32}", about["settings"])
        main = outcomes[outcomes.metric == entry["main_metric"]]
        assert main.outcome.mean() == pytest.approx(
            entry["metrics"][entry["main_metric"]]["value"], abs=1e-9
        )
    assert "zeroshot" in table(result)


def test_resume_skips_what_is_done_for_the_same_model_and_settings_only(tmp_path):
    # Without the linear probe, which takes the time and is like the others here.
    lines = [line for line in SUITE.splitlines() if "task: probe" not in line]
    (tmp_path / "suite.yaml").write_text("\n".join(lines))
    suite = read_suite(tmp_path / "suite.yaml")
    path = tmp_path / "own.json"
    first = benchmark(opened(Pixels()), suite, output=path)
    again = Pixels()
    second = benchmark(opened(again), suite, output=path, resume=True)
    assert again.pictures == 2  # what its digest is made of
    assert second["tasks"] == first["tasks"]
    with pytest.raises(UserError, match="holds own, which is another model"):
        benchmark(opened(Pixels(), weights="others"), suite, output=path, resume=True)
    with pytest.raises(UserError, match="measured with another limit"):
        benchmark(opened(Pixels()), suite, output=path, resume=True, limit=30)
    assert json.loads(path.read_text())["tasks"] == first["tasks"]
    fewer = (tmp_path / "suite.yaml").read_text().replace("k: 5", "k: 7")
    (tmp_path / "suite.yaml").write_text(fewer)
    partly = Pixels()
    changed = read_suite(tmp_path / "suite.yaml")
    benchmark(opened(partly), changed, output=path, resume=True)
    assert partly.pictures == 2 + 80 + 150  # what kNN needs


def test_resume_keeps_what_another_suite_has_measured(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "tasks: [{task: zeroshot, set: digits, data: {path: digits, split: test, limit: 20}}]"
    )
    (tmp_path / "two.yaml").write_text(
        "tasks: [{task: zeroshot, set: shapes, data: {path: shapes, split: test, limit: 20}}]"
    )
    path = tmp_path / "own.json"
    first = benchmark(opened(Pixels()), read_suite(tmp_path / "one.yaml"), output=path)
    both = benchmark(opened(Pixels()), read_suite(tmp_path / "two.yaml"), output=path, resume=True)
    assert [entry["set"] for entry in both["tasks"]] == ["shapes", "digits"]
    assert both["tasks"][1] == first["tasks"][0]
    assert json.loads(path.read_text()) == both


class Tilted(Pixels):
    """The same weights, as another architecture uses them."""

    def embed_texts(self, texts):
        return super().embed_texts(texts) + 0.2


def png(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def own(tmp_path):
    """Three classes in rows that differ in colour, and pairs of pictures and captions."""
    rows = [(number * 20, 0, 60) for number in range(12)]
    table = {
        "image": [png(colour) for colour in rows],
        "label": [number % 3 for number in range(12)],
    }
    pairs = {
        "image_0": table["image"][:6], "image_1": table["image"][6:],
        "caption_0": [f"a {n}" for n in range(6)], "caption_1": [f"b {n}" for n in range(6)],
    }  # fmt: skip
    for name in ("rows", "pairs"):
        (tmp_path / name).mkdir()
    for split in ("train", "test"):
        pq.write_table(pa.table(table), tmp_path / "rows" / f"{split}-00000-of-00001.parquet")
    pq.write_table(pa.table(pairs), tmp_path / "pairs" / "test-00000-of-00001.parquet")
    return tmp_path, pairs


def test_resume_measures_again_what_has_changed_in_any_way(own):
    folder, pairs = own
    zeroshot = {"class_names": ["cat", "dog", "bee"]}

    def tasks(train="train", **settings):
        data = {"path": "rows", "split": "test", "image_column": "image", **settings}
        return [
            {"task": "zeroshot", "set": "own", "data": data},
            {"task": "knn", "set": "own", "k": 3, "train": {"split": train},
             "data": {"path": "rows", "split": "test", "image_column": "image"}},
            {"task": "winoground", "set": "pairs",
             "data": {"path": "pairs", "split": "test", "image_column": "image_0"}},
        ]  # fmt: skip

    output = folder / "own.json"

    def run(listed):
        (folder / "suite.yaml").write_text(json.dumps({"tasks": listed}))
        model = Pixels()
        result = benchmark(opened(model), read_suite(folder / "suite.yaml"), output=output,
                           resume=True)  # fmt: skip
        assert not result["failed"]
        return model.pictures - 2  # what its behaviour is seen by

    assert run(tasks(**zeroshot)) == 12 + 12 + 6 + 6
    assert run(tasks(**zeroshot)) == 0
    assert run(tasks(class_names=["cat", "dog", "ant"])) == 12
    prompts = {name: [f"a {name}"] for name in ("cat", "dog", "ant")}
    assert run(tasks(class_names=["cat", "dog", "ant"], prompts=prompts)) == 12
    prompts["dog"] = ["the dog"]
    unchanged = tasks(class_names=["cat", "dog", "ant"], prompts=prompts)
    assert run(unchanged) == 12
    # Other rows to learn from.
    table = pq.read_table(folder / "rows" / "train-00000-of-00001.parquet")
    pq.write_table(table.slice(0, 9), folder / "rows" / "train-00000-of-00001.parquet")
    assert run(unchanged) == 12 + 9
    # Another second picture, as large as before.
    pairs["image_1"] = pairs["image_1"][::-1]
    pairs["image_1"][0] = png((1, 2, 3))
    pq.write_table(pa.table(pairs), folder / "pairs" / "test-00000-of-00001.parquet")
    assert run(unchanged) == 6 + 6
    assert run(unchanged) == 0
    (folder / "suite.yaml").write_text(json.dumps({"tasks": unchanged}))
    suite = read_suite(folder / "suite.yaml")
    with pytest.raises(UserError, match="another model"):
        benchmark(opened(Tilted()), suite, output=output, resume=True)


def test_what_cannot_be_opened_today_keeps_what_was_measured(own):
    folder, _ = own
    (folder / "suite.yaml").write_text(
        "tasks: [{task: knn, set: own, train: {split: train},"
        " data: {path: rows, split: test, image_column: image}}]"
    )
    output = folder / "own.json"
    first = benchmark(opened(Pixels()), read_suite(folder / "suite.yaml"), output=output)
    (folder / "rows" / "train-00000-of-00001.parquet").write_bytes(b"broken")
    again = benchmark(opened(Pixels()), read_suite(folder / "suite.yaml"), output=output,
                      resume=True)  # fmt: skip
    assert again["tasks"] == first["tasks"]
    assert [failed["set"] for failed in again["failed"]] == ["own"]


def test_a_suites_own_limit_is_not_raised(own):
    folder, _ = own
    (folder / "suite.yaml").write_text(
        "tasks: [{task: zeroshot, set: own, metric: top5,"
        " data: {path: rows, split: test, image_column: image, limit: 5}}]"
    )
    result = benchmark(opened(Pixels()), read_suite(folder / "suite.yaml"), limit=8)
    # Of three classes there is no top-5.
    (failed,) = result["failed"]
    assert "top5 is not defined here; there are top1, mean_class_top1" in failed["error"]
    (folder / "suite.yaml").write_text((folder / "suite.yaml").read_text().replace("top5", "top1"))
    for limit, n in ((8, 5), (4, 4)):
        result = benchmark(opened(Pixels()), read_suite(folder / "suite.yaml"), limit=limit)
        assert result["tasks"][0]["data"]["n"] == n


def test_what_is_scored_is_not_learned_from(own):
    folder, _ = own
    (folder / "suite.yaml").write_text(
        "tasks:\n  - task: knn\n    set: own\n    data: {path: rows, split: train}\n"
        "    train: {split: train}\n"
    )
    with pytest.raises(UserError, match=r"line 5, .*train: is split 'train', which is scored"):
        read_suite(folder / "suite.yaml")


def test_labels_of_a_selection_are_read_as_those_of_all_rows(tmp_path):
    (tmp_path / "l.csv").write_text("image,label,name\n" + "".join(
        f"{number}.png,{label},{name}\n"
        for number, (label, name) in enumerate([("0", "zebra"), ("1", "cat"), ("cat", "dog")])
    ))  # fmt: skip
    for number in range(3):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    data = {"path": str(tmp_path / "l.csv"), "split": "train", "class_names": ["cat", "0", "1"]}
    for limit in (None, 2):
        classes = open_data(EvalData(**data, limit=limit)).classes
        assert [classes.names[label] for label in classes.labels] == ["0", "1", "cat"][:limit]
    data = {"path": str(tmp_path / "l.csv"), "split": "train", "class_name_column": "name"}
    for limit in (None, 2):
        classes = open_data(EvalData(**data, limit=limit)).classes
        assert classes.names == ["zebra", "cat", "dog"]


def test_data_that_cannot_be_opened_is_said_with_its_line(tmp_path):
    (tmp_path / "suite.yaml").write_text(
        "tasks:\n"
        "  - {task: zeroshot, set: a, data: {path: digits, split: tset}}\n"
        "  - {task: knn, set: b, data: {path: digits, split: test, label_column: lable},\n"
        "     train: {split: train}}\n"
    )
    model = Constant()
    result = benchmark(opened(model), read_suite(tmp_path / "suite.yaml"))
    first, second = (failed["error"] for failed in result["failed"])
    assert first.startswith(f"{tmp_path}/suite.yaml, line 2: ")
    assert "'tset'" in first
    assert second.startswith(f"{tmp_path}/suite.yaml, line 3: ")
    assert "no column 'lable'" in second


def test_what_a_table_shows_first_is_what_the_task_measures():
    assert MAIN.keys() == TASKS.keys()
    for kind, task in TASKS.items():
        assert set(MAIN[kind]) <= set(task.measures)


def test_what_fails_is_said_and_does_not_end_the_rest(tmp_path, caplog):
    class Fails(Constant):
        def embed_texts(self, texts):
            raise RuntimeError("no words today")

    (tmp_path / "suite.yaml").write_text(SUITE)
    result = benchmark(opened(Fails()), read_suite(tmp_path / "suite.yaml"))
    assert {entry["task"] for entry in result["tasks"]} == {"probe", "fewshot", "knn"}
    assert {(f["task"], f["set"]) for f in result["failed"]} >= {("zeroshot", "shapes")}
    assert "no words today" in caplog.text
    assert "failed" in table(result)


def test_a_model_that_gives_the_wrong_shape_is_named(suite):
    class Short(Constant):
        def embed_images(self, images):
            return torch.ones(1, 8)

    result = benchmark(opened(Short()), suite)
    assert "embed_images gave (1, 8) for 60 inputs" in result["failed"][0]["error"]


def test_not_a_number_is_refused(suite):
    class Nan(Constant):
        def embed_images(self, images):
            return torch.full((len(images), 8), torch.nan)

    result = benchmark(opened(Nan()), suite)
    assert len(result["failed"]) == 7
    assert "not finite" in result["failed"][0]["error"]


def test_strict_json_has_no_infinity():
    as_json = results.as_json({"rank": Metric(float("inf"), None, 1, None)})
    assert as_json["rank"]["value"] is None


def test_the_command(workdir, command, capsys):
    (workdir / "suite_code.py").write_text(
        "import torch\n\n\nclass Model:\n"
        "    def embed_images(self, images): return torch.randn(len(images), 8)\n"
        "    def embed_texts(self, texts): return torch.randn(len(texts), 8)\n\n\n"
        "def build(): return Model()\n"
    )
    (workdir / "suite.yaml").write_text("tasks:\n" + SUITE.splitlines()[1] + "\n")
    words = ["benchmark", "suite_code:build", "--suite", "suite.yaml", "--output", "own.json"]
    assert command(*words) == 0
    out = capsys.readouterr().out
    assert "zeroshot" in out
    assert "own.json" in out
    assert command("compare", "own.json", "own.json") in (0, 2)
    capsys.readouterr()
    for wrong, part in (
        (["benchmark"], "X is missing"),
        (["benchmark", "suite_code:build", "--suite", "offlin"], "did you mean offline"),
        (["benchmark", "suite_code:bild"], "build"),
        ([*words, "--limit", "0"], "--limit: 0"),
        ([*words, "--limt", "5"], "--limt: no such option; did you mean --limit?"),
        ([*words, "--limit", "few"], "--limit: invalid int value: 'few'"),
    ):
        assert command(*wrong) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert part in error
    assert command("benchmark", "--list") == 0
    assert "vtab+" in capsys.readouterr().out
    assert Path("own.outcomes/zeroshot-shapes.parquet").is_file()


def test_labels_that_are_words_are_the_same_class_in_every_split(tmp_path):
    """Train has a class that test lacks; a limit and a list in another order change nothing."""
    for split, words in (("train", ["ant", "bee", "cat"] * 4), ("test", ["bee", "cat"] * 6)):
        (tmp_path / split).mkdir()
        lines = ["file_name,label"]
        for index, word in enumerate(words):
            colour = {"ant": (250, 0, 0), "bee": (0, 250, 0), "cat": (0, 0, 250)}[word]
            Image.new("RGB", (8, 8), colour).save(tmp_path / split / f"{index}.png")
            lines.append(f"{index}.png,{word}")
        (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
    (tmp_path / "suite.yaml").write_text(
        f"""\
tasks:
  - {{task: knn, set: own, data: {{path: {tmp_path}, split: test}}, train: {{split: train}}, k: 3}}
  - {{task: zeroshot, set: own, data: {{path: {tmp_path}, split: test, class_names: [cat, ant, bee]}}}}
  - {{task: zeroshot, set: one, data: {{path: {tmp_path}, split: test, limit: 1}}}}
"""  # noqa: E501
    )

    class Colours(Constant):
        def embed_images(self, images):
            return torch.tensor([image.getpixel((0, 0)) for image in images]).float()

        def embed_texts(self, texts):
            words = ("ant", "bee", "cat")
            return torch.tensor([[float(word in text) for word in words] for text in texts])

    result = benchmark(opened(Colours()), read_suite(tmp_path / "suite.yaml"))
    assert not result["failed"]
    assert [entry["metrics"]["top1"]["value"] for entry in result["tasks"]] == [1.0, 1.0, 1.0]
    assert [entry["data"]["classes"] for entry in result["tasks"]] == [2, 3, 2]


def test_other_answers_are_other_data(tmp_path):
    rows = "file_name,label\na.png,{}\nb.png,{}\n"
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    data = EvalData(path=str(tmp_path), split="train")
    digests = set()
    for answers in (("x", "y"), ("y", "x")):
        (tmp_path / "metadata.csv").write_text(rows.format(*answers))
        digests.add(open_data(data).digest)
    assert len(digests) == 2
