"""A suite file becomes records; what is wrong is said with its line and key."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from clipkit.errors import UserError
from clipkit.evaluation.prompts import resolve_templates
from clipkit.suite.builtin import BUILTIN, open_builtin
from clipkit.suite.clip_benchmark import OWN
from clipkit.suite.eval_data import EvalData
from clipkit.suite.suite_file import COLLECTIONS, METRICS, read_suite, suite_names

PETS = "data: {path: pets, split: test}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pets").mkdir()
    (tmp_path / "names.txt").write_text("cat\n\nred fox\n")
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n\na {c}\n")
    (tmp_path / "names.json").write_text(json.dumps({"pets": ["cat", "dog"], "fish": ["eel"]}))
    cupl = {"pets": {"cat": ["a cat purrs"], "dog": ["a dog barks", "it fetches"]}}
    (tmp_path / "cupl.json").write_text(json.dumps(cupl))
    return tmp_path


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def one(folder: Path, task: str):
    return read_suite(written(folder, f"tasks:\n  - {task}\n")).tasks[0]


def test_every_field(folder):
    suite = read_suite(
        written(
            folder,
            """\
name: my pets
tasks:
  - task: fewshot
    set: pets 5
    data:
      path: pets
      split: test
      image_column: picture
      label_column: breed
      class_names: [cat, "", fox]
      templates: a {}
      limit: 100
    train: {split: train}
    validation: {path: shapes, split: validation, limit: 50}
    shots: 5
    seeds: 3
    metric: top1
    verified: true
  - {task: retrieval, set: pets, data: {path: ORG/NAME, split: test, caption_column: "caption_*"}}
""",
        )
    )
    assert suite.name == "my pets"
    first, second = suite.tasks
    assert first.task == "fewshot"
    assert first.set == "pets 5"
    assert first.data == EvalData(
        path=str(folder / "pets"),
        split="test",
        image_column="picture",
        label_column="breed",
        class_names=["cat", "", "fox"],
        templates="a {}",
        limit=100,
    )
    assert first.train is not None
    assert first.validation is not None
    assert (first.train.path, first.train.split, first.train.label_column, first.train.limit) == (
        *(str(folder / "pets"), "train", "breed"),
        None,
    )
    assert (first.validation.path, first.validation.limit) == ("shapes", 50)
    assert first.arguments == {"shots": 5, "seeds": 3}
    assert (first.metric, first.verified) == ("top1", True)
    assert second.data.path == "ORG/NAME"
    assert (second.metric, second.verified, second.arguments) == ("text_to_image_r1", False, {})
    assert read_suite(
        written(folder, f"tasks: [{{task: knn, set: a, {PETS}, train: {{split: a}}}}]")
    )


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("class_names: names.txt", {"class_names": ["cat", "", "red fox"]}),
        ("class_names: names.json#fish", {"class_names": ["eel"]}),
        ("class_names: names.json", {"class_names": ["cat", "dog"]}),  # the name of the set
        ("templates: templates.txt", {"templates": ["a photo of a {}.", "a {c}"]}),
        ("templates: ['one {}', 'two {c}']", {"templates": ["one {}", "two {c}"]}),
        ("templates: imagenet_7", {"templates": "imagenet_7"}),
        (
            "templates: cupl.json#pets",
            {"prompts": {"cat": ["a cat purrs"], "dog": ["a dog barks", "it fetches"]}},
        ),
        (
            "prompts: cupl.json, class_names: [dog, cat]",
            {
                "class_names": ["dog", "cat"],
                "prompts": {"cat": ["a cat purrs"], "dog": ["a dog barks", "it fetches"]},
            },
        ),
        ("prompts: {cat: [x, y], dog: z}", {"prompts": {"cat": ["x", "y"], "dog": ["z"]}}),
    ],
)
def test_names_templates_and_prompts(folder, keys, expected):
    found = one(folder, f"{{task: zeroshot, set: pets, data: {{path: pets, split: test, {keys}}}}}")
    wanted = {"path": str(folder / "pets"), "split": "test", **expected}
    assert found.data == EvalData(**wanted)


def test_paths_are_relative_to_the_suite(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for path, found in {
        "pets": str(folder / "pets"),
        "pets/*.parquet": str(folder / "pets/*.parquet"),
        "digits": "digits",
        "ORG/NAME": "ORG/NAME",
        str(folder): str(folder),
    }.items():
        task = one(folder, f"{{task: retrieval, set: x, data: {{path: '{path}', split: test}}}}")
        assert task.data.path == found
    (folder / "digits").mkdir()  # what exists wins over what is built in
    task = one(folder, "{task: retrieval, set: x, data: {path: digits, split: test}}")
    assert task.data.path == str(folder / "digits")


def test_a_webdataset_folder_brings_its_own_templates(folder):
    (folder / "wds" / "test").mkdir(parents=True)
    (folder / "wds" / "test" / "nshards.txt").write_text("1")
    data = "path: wds, split: test"
    assert one(folder, f"{{task: zeroshot, set: x, data: {{{data}}}}}").data.templates == OWN
    mine = f"{{task: zeroshot, set: x, data: {{{data}, templates: my {{}}}}}}"
    assert one(folder, mine.replace("my {}", "'my {}'")).data.templates == "my {}"
    hub = "{task: zeroshot, set: x, data: {path: clip-benchmark/wds_cars, split: test}}"
    assert one(folder, hub).data.templates == OWN
    with pytest.raises(UserError, match=r"tasks\[0\]\.data\.templates: 'own' are templates beside"):
        one(folder, "{task: zeroshot, set: x, data: {path: pets, split: test, templates: own}}")


@pytest.mark.parametrize(
    ("text", "line", "key", "sentence"),
    [
        ("tasks:\n  - {task: zeroshot\n  set: [", 3, "", "is no YAML"),
        ("tasks:\n\t- a", 2, "", "is no YAML"),
        (
            "tasks:\n- {templates: [a {}, b {}]}",
            2,
            "",
            "is no YAML .* put a template with {} in quo",
        ),
        ("name: x", 1, "", "tasks is missing"),
        ("task: []", 1, "task", r"unknown key; did you mean tasks\?"),
        ("tasks: []", 1, "tasks", "at least one task is needed"),
        ("tasks: zeroshot", 1, "tasks", "a list is needed, not 'zeroshot'"),
        ("tasks:\n  - zeroshot", 2, r"tasks\[0\]", r"keys \(task, set, .*\) .* not 'zeroshot'"),
        (
            f"tasks:\n- task: zero_shot\n  set: x\n  {PETS}",
            *(2, r"tasks\[0\]\.task", r"unknown 'zero_shot'; did you mean zeroshot\?"),
        ),
        (f"tasks:\n- set: x\n  {PETS}", 2, r"tasks\[0\]", "task is missing"),
        (
            f"tasks:\n- task: zeroshot\n  set: x\n  metirc: top1\n  {PETS}",
            *(4, r"tasks\[0\]\.metirc", r"unknown key; did you mean metric\?"),
        ),
        (
            f"tasks:\n- task: zeroshot\n  set: x\n  metric: map\n  {PETS}",
            *(4, r"tasks\[0\]\.metric", "unknown 'map'; .*known are: top1, top5, mean_class_top1"),
        ),
        (
            f"tasks:\n- task: zeroshot\n  set: a/b\n  {PETS}",
            *(3, r"tasks\[0\]\.set", "use letters, digits, _, - and blanks"),
        ),
        (
            f"tasks:\n- task: zeroshot\n  set: x\n  k: 5\n  {PETS}",
            *(4, r"tasks\[0\]\.k", "zeroshot takes no k; it takes: task, set"),
        ),
        (f"tasks:\n- task: knn\n  set: x\n  {PETS}", 2, r"tasks\[0\]", "train is missing: knn"),
        (
            f"tasks:\n- task: knn\n  set: x\n  {PETS}\n  train: {{split: train}}\n  k: 0",
            *(6, r"tasks\[0\]\.k", "a positive whole number is needed, not '0'"),
        ),
        (
            f"tasks:\n- task: zeroshot\n  set: x\n  {PETS}\n  verified: perhaps",
            *(5, r"tasks\[0\]\.verified", "true or false is needed, not 'perhaps'"),
        ),
        (
            f"tasks:\n- task: zeroshot\n  set: x\n  {PETS}\n  set: y",
            *(5, r"tasks\[0\]\.set", "is written twice"),
        ),
        (
            f"tasks:\n- task: zeroshot\n  set: x\n  {PETS}\n- task: zeroshot\n  set: x\n  {PETS}",
            *(5, r"tasks\[1\]", "zeroshot on 'x' stands in line 2 already"),
        ),
        (
            "tasks:\n- task: zeroshot\n  set: x\n  data:\n    path: pets\n",
            *(5, r"tasks\[0\]\.data", "split is missing"),
        ),
        (
            "tasks:\n- task: zeroshot\n  set: x\n  data:\n    path: dogs\n    split: test",
            *(5, r"tasks\[0\]\.data\.path", "there is no '.*dogs'; name a folder, a file"),
        ),
        (
            "tasks:\n- task: zeroshot\n  set: x\n  data: {path: pets, split: test,\n    when: end}",
            *(5, r"tasks\[0\]\.data\.when", "unknown key"),
        ),
        (
            "tasks:\n- task: zeroshot\n  set: x\n  data: {path: pets, split: test,\n"
            "    templates: a}",
            *(5, r"tasks\[0\]\.data\.templates", "'a' has no place for the class name"),
        ),
        (
            "tasks:\n- task: zeroshot\n  set: x\n  data: {path: pets, split: test,\n"
            "    class_names: [no, yes]}",
            *(5, r"tasks\[0\]\.data\.class_names\[0\]", "is False, not text; put it in quotes"),
        ),
        (
            "tasks:\n- task: zeroshot\n  set: x\n  data: {path: pets, split: test,\n"
            "    class_names: none.txt}",
            *(5, r"tasks\[0\]\.data\.class_names", "there is no file '.*none.txt'"),
        ),
        (
            "tasks:\n- task: zeroshot\n  set: x\n  data: {path: pets, split: test,\n"
            "    class_names: names.json#pet}",
            *(5, r"tasks\[0\]\.data\.class_names", r"did you mean names.json#pets\?"),
        ),
        (
            "tasks:\n- task: zeroshot\n  set: x\n  data: {path: pets, split: test,\n"
            "    class_names: cupl.json#pets}",
            *(5, r"tasks\[0\]\.data\.class_names", "name them under prompts"),
        ),
        (
            "tasks:\n- task: zeroshot\n  set: x\n  data: {path: pets, split: test,\n"
            "    prompts: cupl.json#pets, class_names: [cat, eel]}",
            *(4, r"tasks\[0\]\.data", r"1 of 2 classes have no prompts \('eel'\)"),
        ),
        (
            "tasks:\n- task: !!python/object/apply:os.system [touch trap]\n  set: x\n",
            *(2, r"tasks\[0\]", "data is missing"),
        ),
        (
            f"tasks:\n- task: !!python/object/apply:os.system [touch trap]\n  set: x\n  {PETS}",
            *(2, r"tasks\[0\]\.task", "could not determine a constructor"),
        ),
    ],
)
def test_what_is_wrong_is_said_with_line_and_key(folder, monkeypatch, text, line, key, sentence):
    monkeypatch.chdir(folder)
    path = written(folder, text)
    where = rf"^{path}, line {line}{f', {key}' if key else ''}: .*{sentence}"
    with pytest.raises(UserError, match=where):
        read_suite(path)
    assert not (folder / "trap").exists()


def test_files_that_are_no_suite(folder):
    with pytest.raises(UserError, match=r"suite 'vtab_': neither .*; did you mean vtab\?"):
        read_suite("vtab_")
    with pytest.raises(UserError, match="is empty; a suite has a list of tasks"):
        read_suite(written(folder, "# nothing\n"))
    (folder / "mine.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_suite(folder / "mine.yaml")
    with pytest.raises(UserError, match="is nested too deeply"):
        read_suite(written(folder, "[" * 5000))


# --- The suites that clipkit ships -------------------------------------------------------------

SIZES = {
    "imagenet_robustness": 5,
    "offline": 9,
    "retrieval": 3,
    "sugar_crepe": 7,
    "vtab": 19,
    "vtab+": 36,
}


def test_the_shipped_suites():
    assert {name: len(read_suite(name).tasks) for name in suite_names()} == SIZES
    for name in suite_names():
        suite = read_suite(name)
        assert suite.name == name
        for task in suite.tasks:
            assert task.metric in METRICS[task.task]
            assert task.data.split
            assert task.verified == (name == "offline")
            assert task.data.templates == OWN or resolve_templates(task.data.templates)


def test_every_collection_names_its_command():
    for path in COLLECTIONS.glob("*.yaml"):
        lines = path.read_text().splitlines()
        suite = "" if path.stem == "offline" else f" --suite {path.stem}"
        assert lines[1] == f"# clipkit benchmark X{suite}"


def test_each_entry_has_the_metric_its_paper_reports():
    metrics = {task.set: task.metric for task in read_suite("vtab+").tasks}
    mean_of_classes = {"fgvc_aircraft", "vtab-caltech101", "vtab-flowers", "vtab-pets"}
    assert {name for name, metric in metrics.items() if metric == "mean_class_top1"} == (
        mean_of_classes
    )
    assert metrics["voc2007_multilabel"] == "map_11point"
    assert metrics["imagenet1k"] == "top1"
    names = {task.set: task.data.class_names for task in read_suite("vtab").tasks}
    clevr = names["vtab-clevr_closest_object_distance"]
    assert clevr is not None
    assert len(clevr) == 6
    assert clevr[3] == ""


def test_the_collections_are_those_of_clip_benchmark():
    package = importlib.util.find_spec("clip_benchmark")
    if package is None or package.origin is None:
        pytest.skip("clip-benchmark is not installed")
    text = (Path(package.origin).parent / "datasets" / "builder.py").read_text()
    start = text.index("dataset_collection = {")
    theirs: dict[str, dict[str, list[str]]] = {}
    exec(text[start : text.index("\n}\n", start) + 3], {}, theirs)
    for name, listed in theirs["dataset_collection"].items():
        ours = [task.set for task in read_suite(name).tasks]
        assert ours == [entry.removeprefix("sugar_crepe/").replace("/", "-") for entry in listed]


def test_the_offline_suite_has_its_data():
    for task in read_suite("offline").tasks:
        for data in filter(None, (task.data, task.train, task.validation)):
            assert data.path in BUILTIN
            rows = open_builtin(data.path, data.split, caption_column=data.caption_column)
            assert len(rows) <= 1000
            if task.task == "sugarcrepe":
                assert all(len(captions) == 2 for captions in rows.all_captions())
