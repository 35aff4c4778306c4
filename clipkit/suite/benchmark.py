"""A model on a suite: every task once, what is done is kept, what fails is said."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from clipkit.data.drawing import draw, sample
from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.suite import results
from clipkit.suite.clip_benchmark import prompts_for
from clipkit.suite.embedder import ModelEmbedder
from clipkit.suite.eval_data import EvalData, open_classes
from clipkit.suite.examples import write_examples
from clipkit.suite.opening import Opened, open_data
from clipkit.suite.outcomes import data_digest, write_outcomes
from clipkit.suite.suite_file import Suite, TaskSpec
from clipkit.suite.tasks import TASKS, Task

if TYPE_CHECKING:
    from clipkit.interop import OpenedModel

log = logging.getLogger(__name__)


def benchmark(
    opened: OpenedModel,
    suite: Suite,
    *,
    output: Path | None = None,
    resume: bool = False,
    limit: int | None = None,
    batch_size: int = 64,
    watch: Callable[[str, int, int], object] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Return the result file of a model on a suite, written after every task.

    Args:
        opened: the model.
        suite: what to measure.
        output: the result file; its outcomes lie beside it.
        resume: take over what the file holds for the same model, data and settings.
        limit: evaluate the first so many rows of each test set only.
        batch_size: pictures at a time.
        watch: called with a task's name, how many pictures of it are embedded, and of how many.
    """
    settings = {"batch_size": batch_size, "limit": limit}
    result = results.new(opened, suite=suite.name, settings=settings)
    result["model"]["behaviour"] = _behaviour(opened)
    before = _before(output, result) if resume and output is not None else {}
    embedder = ModelEmbedder(opened.model, scale=opened.scale, batch_size=batch_size)
    ready = []
    for spec in suite.tasks:
        try:
            ready.append((spec, _prepare(spec, limit)))
        except (UserError, OSError) as error:
            _note_failure(result, spec, error)
    todo = []
    for spec, sets in ready:
        entry = _described(spec, sets)
        done = before.get((spec.task, spec.set))
        if done is not None and all(done.get(key) == value for key, value in entry.items()):
            result["tasks"].append(done)
        else:
            todo.append((spec, sets, entry))
    if result["tasks"]:
        log.info("%d tasks are kept from %s, measured before", len(result["tasks"]), output)
    _embed_texts_together(embedder, todo)
    for spec, sets, entry in todo:
        name = f"{spec.task}/{spec.set}"
        began, embedded = time.monotonic(), embedder.num_embedded
        total = sum(len(part.rows) for part in sets.values())

        def say(_: int, name: str = name, embedded: int = embedded, total: int = total) -> None:
            watch(name, embedder.num_embedded - embedded, total)

        embedder.watch = say
        try:
            measured = _measure(spec, sets, embedder, name)
        except Exception as error:  # whatever a data set or a stranger's model raises
            _note_failure(result, spec, error)
            continue
        seconds = time.monotonic() - began
        pictures = embedder.num_embedded - embedded
        entry |= {
            "metrics": results.as_json(measured.metrics),
            "seconds": round(seconds, 3),
            # None where another task had embedded the same pictures before.
            "images_per_second": round(pictures / seconds, 2) if pictures else None,
            "outcomes": None,
        }
        if output is not None and measured.outcomes:
            path = results.outcomes_file(output, spec.task, spec.set)
            digest = entry["data"]["digest"]
            write_outcomes(path, measured, task=spec.task, set_name=spec.set, data=digest)
            if measured.examples:
                file = path.with_name(f"{path.stem}-examples.json")
                write_examples(file, measured.examples, sets["test"].rows)
            entry["outcomes"] = path.relative_to(output.parent).as_posix()
        result["tasks"].append(entry)
        if output is not None:
            results.write(output, result)
    order = {(spec.task, spec.set): place for place, spec in enumerate(suite.tasks)}
    result["tasks"].sort(key=lambda entry: order[entry["task"], entry["set"]])
    if output is not None:
        results.write(output, result)
    return result


def _behaviour(opened: OpenedModel) -> str | None:
    """Return a digest of what the model makes of two pictures and two texts, to three digits.

    The same weights in another architecture have the same digest and are another model.
    """
    pictures = [Image.fromarray(draw(sample(0, "test", index), 64)) for index in range(2)]
    try:
        with torch.no_grad():
            images = opened.model.embed_images(pictures)
            texts = opened.model.embed_texts(["a photo of a dog", "two red circles on white"])
        embeddings = torch.cat([ties.normalise(images.cpu()), ties.normalise(texts.cpu())])
        rounded = (1000 * embeddings).round().long().flatten().tolist()
    except Exception:  # the tasks say what is wrong with it
        return None
    return results.digest(map(str, rounded))


def _task(spec: TaskSpec) -> Task:
    return TASKS[spec.task](**spec.arguments)


def _prepare(spec: TaskSpec, limit: int | None) -> dict[str, Opened]:
    """Open the sets of a task, the test set first."""
    task = _task(spec)
    wanted: dict[str, EvalData | None] = {
        "test": spec.data if limit is None else replace(spec.data, limit=limit),
        "train": spec.train,
        "validation": spec.validation,
    }
    opened = {}
    for name, data in wanted.items():
        if data is not None:
            opened[name] = task.arrange(open_data(data))
            task.check(opened[name])
    return opened


def _described(spec: TaskSpec, sets: dict[str, Opened]) -> dict[str, Any]:
    """Return what tells this task on this data from all others: what a resumed run compares."""
    test = sets["test"]
    names = _class_names(spec, test)
    prompts = None
    if spec.task in ("zeroshot", "multilabel"):
        written = prompts_for(test.data, names or [])
        owners, index = written.class_of_prompt.tolist(), written.prompt_index.tolist()
        prompts = results.digest(
            f"{owner} {written.unique[which]}" for owner, which in zip(owners, index, strict=True)
        )
    return {
        "task": spec.task,
        "set": spec.set,
        "data": {
            "id": test.data.path,
            "revision": test.revision,
            "split": test.data.split,
            "n": len(test.rows),
            "digest": data_digest(test.data, test.rows),
            "training": {n: data_digest(s.data, s.rows) for n, s in sets.items() if n != "test"}
            or None,
            "classes": None if names is None else len(names),
            "class_names": results.digest(names),
            "templates": results.digest(_templates(test.data)),
            "prompts": prompts,
        },
        "arguments": spec.arguments,
        "main_metric": spec.metric,
        "verified": spec.verified,
    }


def _templates(data: EvalData) -> list[str]:
    return [data.templates] if isinstance(data.templates, str) else list(data.templates)


def _class_names(spec: TaskSpec, test: Opened) -> list[str] | None:
    if spec.task in ("retrieval", "sugarcrepe", "winoground"):
        return None
    if spec.task == "multilabel":
        return test.data.class_names
    return open_classes(test.data, test.rows).names


def _embed_texts_together(
    embedder: ModelEmbedder, todo: list[tuple[TaskSpec, dict[str, Opened], dict[str, Any]]]
) -> None:
    """Embed the texts of all tasks at once: each different one once, in batches of like length."""
    texts = [text for spec, sets, _ in todo for text in _task(spec).texts(sets["test"])]
    try:
        if texts:
            embedder.texts(texts)
    except Exception:  # each task asks again for its own, and says what is wrong
        log.debug("the texts of all tasks together were refused", exc_info=True)


def _measure(spec: TaskSpec, sets: dict[str, Opened], embedder: ModelEmbedder, name: str) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        measured = _task(spec).measure(
            embedder, sets["test"], train=sets.get("train"), validation=sets.get("validation")
        )
    for warning in caught:
        log.warning("%s: %s", name, warning.message)
    return measured


def _before(output: Path, result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the tasks of an earlier file that the same model was measured on, by task and set."""
    if not output.is_file():
        return {}
    earlier = results.read(output)
    same = all(earlier.get(key) == result[key] for key in ("settings",)) and all(
        earlier["model"].get(key) == value
        for key, value in result["model"].items()
        if key not in ("spec", "name")
    )
    return {(entry["task"], entry["set"]): entry for entry in earlier["tasks"]} if same else {}


def _note_failure(result: dict[str, Any], spec: TaskSpec, error: Exception) -> None:
    sentence = (
        error.sentence if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    )
    log.warning("%s/%s failed: %s", spec.task, spec.set, sentence)
    log.debug("the traceback", exc_info=error)
    result["failed"].append({"task": spec.task, "set": spec.set, "error": sentence})
