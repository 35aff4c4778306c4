"""A suite: a YAML file that names tasks, their data, class names and templates.

    tasks:
      - task: zeroshot
        set: pets
        data: {path: pets/, split: test, templates: "a photo of a {}, a type of pet."}
      - {task: knn, set: pets, data: {path: pets/, split: test}, train: {split: train}, k: 20}

Files are relative to the suite's own. Names may stand in the file itself, in `FILE.txt` (one a
line) or `FILE.json#KEY`. What is wrong is said with the file, the line and the key.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from clipkit import safe_yaml
from clipkit.errors import UserError, did_you_mean
from clipkit.evaluation.prompts import TEMPLATES, resolve_templates
from clipkit.suite.builtin import BUILTIN
from clipkit.suite.clip_benchmark import OWN, is_folder, is_reference, read_reference
from clipkit.suite.eval_data import EvalData, prompts_for, refuse_set_name
from clipkit.suite.tasks import TASKS

COLLECTIONS = Path(__file__).parent / "collections"
"""The folder of the suites that clipkit ships."""

METRICS: dict[str, tuple[str, ...]] = {kind: task.measures for kind, task in TASKS.items()}
"""What can be a task's main metric; the first one is, where the suite names none."""

ARGUMENTS: dict[str, dict[str, type]] = {
    "retrieval": {"merge_captions": bool},
    "fewshot": {"shots": int, "seeds": int},
    "knn": {"k": int},
}
"""What a task takes besides: whole numbers, at least 1, or true and false."""

_PROMPTED = ("zeroshot", "multilabel")
_TRAINED = ("probe", "fewshot", "knn")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DATA = tuple(entry.name for entry in fields(EvalData) if entry.name != "when")


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One row of a suite.

    Attributes:
        task: what is asked, a key of `METRICS`.
        set: what the data is called in metric names and files.
        data: what is evaluated on.
        train: what probes and kNN learn from.
        validation: what probes choose by; None where nothing was named.
        arguments: of this task, such as `shots`; see `ARGUMENTS`. What is left out is as the
            task itself has it.
        metric: the main metric.
        verified: whether a run has opened this data as it is described here.
        where: file and line, for messages.
    """

    task: str
    set: str
    data: EvalData
    train: EvalData | None = None
    validation: EvalData | None = None
    arguments: dict[str, int] = field(default_factory=dict)
    metric: str
    verified: bool = False
    where: str = ""


@dataclass(frozen=True)
class Suite:
    """Tasks under a name."""

    name: str
    tasks: list[TaskSpec]


def suite_names() -> list[str]:
    """Return the names of the suites that clipkit ships."""
    return sorted(path.stem for path in COLLECTIONS.glob("*.yaml"))


def read_suite(name_or_path: str | Path) -> Suite:
    """Read a suite that clipkit ships, by its name, or a file; an existing file wins.

    Raises:
        UserError: no such suite, or a mistake in it.
    """
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        path = _shipped(str(name_or_path))
    root = _Value(str(path), "", _parse(path))
    entries = root.mapping(("name", "tasks"), required=("tasks",))
    name = entries["name"].text() if "name" in entries else path.stem
    listed = entries["tasks"].items()
    if not listed:
        raise entries["tasks"].error("at least one task is needed")
    tasks: list[TaskSpec] = []
    lines: dict[tuple[str, str], int] = {}
    for entry in listed:
        task = _read_task(entry)
        key = (task.task, task.set)
        if key in lines:
            raise entry.error(f"{task.task} on {task.set!r} stands in line {lines[key]} already")
        lines[key] = entry.line
        tasks.append(task)
    return Suite(name, tasks)


# --- Tasks -------------------------------------------------------------------------------------


def _read_task(entry: _Value) -> TaskSpec:
    known = ("task", "set", "data", "train", "validation", "metric", "verified")
    every = (*known, *(name for names in ARGUMENTS.values() for name in names))
    written = entry.mapping(every, required=("task", "set", "data"))
    task = written["task"].choice(METRICS)
    taken = [*known, *ARGUMENTS.get(task, ())]
    if task not in _TRAINED:
        taken = [name for name in taken if name not in ("train", "validation")]
    for name in written:
        if name not in taken:
            raise written[name].error(f"{task} takes no {name}; it takes: {', '.join(taken)}")
    if task in _TRAINED and "train" not in written:
        raise entry.error(f"train is missing: {task} learns from data, as {{split: train}}")
    name = written["set"].text()
    if wrong := refuse_set_name(name):
        raise written["set"].error(wrong)
    data = _read_data(written["data"], task, name)
    parts = {
        part: _read_data(written[part], task, name, like=data)
        for part in ("train", "validation")
        if part in written
    }
    for part, other in parts.items():
        if (other.path, other.split) == (data.path, data.split):
            raise written[part].error(f"is split {data.split!r}, which is scored; name another")
    return TaskSpec(
        task=task,
        set=name,
        data=data,
        arguments={
            name: written[name].flag() if kind is bool else written[name].number()
            for name, kind in ARGUMENTS.get(task, {}).items()
            if name in written
        },
        metric=written["metric"].choice(METRICS[task]) if "metric" in written else METRICS[task][0],
        verified="verified" in written and written["verified"].flag(),
        where=f"{entry.file}, line {entry.line}",
        **parts,
    )


def _read_data(entry: _Value, task: str, name: str, *, like: EvalData | None = None) -> EvalData:
    """Read a set; what `train` and `validation` leave out is as in `data`, but for the limit."""
    required = ("path", "split") if like is None else ("split",)
    written = entry.mapping(_DATA, required=required)
    found: dict[str, Any] = {}
    for key, value in written.items():
        found |= _READERS.get(key, _read_text)(value, key, name)
    data = EvalData(**found) if like is None else replace(like, **{"limit": None, **found})
    own = is_folder(data.path or "")
    if own and task in _PROMPTED and not {"templates", "prompts"} & found.keys():
        data = replace(data, templates=OWN)
    if found.get("templates") == OWN and not own:
        raise written["templates"].error(
            f"{OWN!r} are templates beside tar shards, as CLIP_benchmark keeps them; {data.path!r} "
            "is no such folder"
        )
    if data.prompts is not None and data.class_names is not None:
        try:
            prompts_for(data, data.class_names)
        except UserError as error:
            raise entry.error(str(error).removeprefix("EvalData.")) from error
    return data


def _read_text(value: _Value, key: str, name: str) -> dict[str, Any]:
    return {key: value.text()}


def _read_limit(value: _Value, key: str, name: str) -> dict[str, Any]:
    return {key: value.number()}


def _read_path(value: _Value, key: str, name: str) -> dict[str, Any]:
    written = os.path.expanduser(value.text())
    beside = os.path.join(value.folder, written)
    if written in BUILTIN and not os.path.exists(beside):
        return {key: written}
    if os.path.exists(beside) or re.search(r"[*?\[{]", written):
        return {key: beside}
    if _HUB_ID.fullmatch(written):
        return {key: written}
    raise value.error(
        f"there is no {beside!r}; name a folder, a file, a data set of the hub (ORG/NAME) or "
        f"built-in data ({', '.join(BUILTIN)})"
    )


def _read_class_names(value: _Value, key: str, name: str) -> dict[str, Any]:
    names = value.texts_or_file(name)
    if isinstance(names, str):
        raise value.error(f"{names!r} is neither a list of names nor FILE.txt or FILE.json#KEY")
    if isinstance(names, dict):
        raise value.error("holds prompts for each class; name them under prompts")
    return {key: names}


def _read_templates(value: _Value, key: str, name: str) -> dict[str, Any]:
    templates = value.texts_or_file(name)
    if isinstance(templates, dict):
        return {"prompts": _checked_prompts(value, templates)}
    if templates == OWN:
        return {key: templates}
    templates = [line for line in templates if line] if isinstance(templates, list) else templates
    try:
        resolve_templates(templates)
    except UserError as error:
        names = f"FILE.txt, FILE.json#KEY, {', '.join(TEMPLATES)}"
        sentence = str(error).removeprefix("templates: ")
        raise value.error(f"{sentence} (accepted besides: {names})") from error
    return {key: templates}


def _read_prompts(value: _Value, key: str, name: str) -> dict[str, Any]:
    prompts = value.texts_or_file(name, by_name=True)
    if not isinstance(prompts, dict):
        raise value.error("holds no prompts for each class, as {tench: [a tench is a fish.]}")
    return {key: _checked_prompts(value, prompts)}


def _checked_prompts(value: _Value, prompts: dict[str, list[str]]) -> dict[str, list[str]]:
    empty = [name for name, texts in prompts.items() if not texts]
    if empty or not prompts:
        raise value.error(f"class {empty[0]!r} has no prompts" if empty else "is empty")
    return prompts


_READERS: dict[str, Callable[[_Value, str, str], dict[str, Any]]] = {
    "path": _read_path,
    "limit": _read_limit,
    "class_names": _read_class_names,
    "templates": _read_templates,
    "prompts": _read_prompts,
}


# --- YAML with lines ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """A value of the file, which knows where it stands."""

    file: str
    key: str
    node: yaml.Node

    @property
    def line(self) -> int:
        return int(self.node.start_mark.line) + 1

    @property
    def folder(self) -> str:
        return os.path.dirname(os.path.abspath(self.file))

    def error(self, sentence: str) -> UserError:
        where = f", {self.key}" if self.key else ""
        return UserError(f"{self.file}, line {self.line}{where}: {sentence}")

    def mapping(self, known: Iterable[str], *, required: Iterable[str] = ()) -> dict[str, _Value]:
        """Return the entries, of which no key is unknown, missing or written twice."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self._expected(f"keys ({', '.join(known)})")
        found: dict[str, _Value] = {}
        for key, node in self.node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else "a list or keys"
            here = _Value(self.file, f"{self.key}.{name}".lstrip("."), key)
            if name not in known:
                hint = did_you_mean(name, known)
                raise here.error(f"unknown key; {hint}known are: {', '.join(known)}")
            if name in found:
                raise here.error("is written twice")
            found[name] = _Value(self.file, here.key, node)
        for name in required:
            if name not in found:
                raise self.error(f"{name} is missing")
        return found

    def items(self) -> list[_Value]:
        if not isinstance(self.node, yaml.SequenceNode):
            raise self._expected("a list")
        return [
            _Value(self.file, f"{self.key}[{place}]", node)
            for place, node in enumerate(self.node.value)
        ]

    def text(self) -> str:
        value = self.plain()
        if not isinstance(value, str) or not value:
            raise self._expected("text")
        return value

    def choice(self, known: Iterable[str]) -> str:
        value = self.text()
        if value not in known:
            hint = did_you_mean(value, known)
            raise self.error(f"unknown {value!r}; {hint}known are: {', '.join(known)}")
        return value

    def number(self) -> int:
        value = self.plain()
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._expected("a positive whole number")
        return value

    def flag(self) -> bool:
        value = self.plain()
        if not isinstance(value, bool):
            raise self._expected("true or false")
        return value

    def texts_or_file(
        self, name: str, *, by_name: bool = False
    ) -> str | list[str] | dict[str, list[str]]:
        """Return a text, a list, or lists by name: written here or in the file that is named."""
        if isinstance(self.node, yaml.SequenceNode):
            texts = [item.plain() for item in self.items()]
            for item, text in zip(self.items(), texts, strict=True):
                if not isinstance(text, str):
                    raise item.error(f"is {reprlib.repr(text)}, not text; put it in quotes")
            return texts
        if by_name and isinstance(self.node, yaml.MappingNode):
            written = self.mapping([str(key.value) for key, _ in self.node.value])
            lists = {key: value.texts_or_file(name) for key, value in written.items()}
            return {key: [v] if isinstance(v, str) else list(v) for key, v in lists.items()}
        text = self.text()
        if not is_reference(text):
            return text
        try:
            read: list[str] | dict[str, list[str]] = read_reference(
                text, folder=self.folder, key=name
            )
        except UserError as error:
            raise self.error(str(error)) from error
        return read

    def plain(self) -> Any:
        """Return the value as YAML means it; nothing but its plain types is made."""
        try:
            return safe_yaml.construct(self.node)
        except yaml.YAMLError as error:
            raise self.error(_complaint(error)) from error

    def _expected(self, what: str) -> UserError:
        if isinstance(self.node, yaml.ScalarNode):
            written = repr(self.node.value) if self.node.value else "nothing"
        else:
            written = "a list" if isinstance(self.node, yaml.SequenceNode) else "keys"
        return self.error(f"{what} is needed, not {written}")


def _shipped(name: str) -> Path:
    if name in suite_names():
        return COLLECTIONS / f"{name}.yaml"
    beside = [path.name for path in Path(name).parent.glob("*.yaml")]
    hint = did_you_mean(name, [*suite_names(), *beside])
    raise UserError(
        f"suite {name!r}: neither a file nor a suite of clipkit; {hint}clipkit's are: "
        f"{', '.join(suite_names())}"
    )


def _parse(path: Path) -> yaml.Node:
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        node = safe_yaml.compose(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        # YAML's own braces, within brackets.
        bare = mark is not None and re.search(r"\{c?\}", text.split("\n")[mark.line])
        hint = "; put a template with {} in quotes" if bare else ""
        raise UserError(f"{path}{line}: is no YAML ({_complaint(error)}){hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    if node is None:
        raise UserError(f"{path}: is empty; a suite has a list of tasks")
    return node


def _complaint(error: Exception) -> str:
    return str(getattr(error, "problem", None) or next(iter(str(error).splitlines()), "unreadable"))
