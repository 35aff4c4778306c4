"""A model on a suite: every task once, what is done is kept, what fails is said."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.evaluation.statistics import SEED
from clipkit.interop.base import probe
from clipkit.suite import results
from clipkit.suite.digests import digest_of_texts, digest_of_values
from clipkit.suite.embedder import ModelEmbedder
from clipkit.suite.eval_data import EvalData
from clipkit.suite.examples import write_examples
from clipkit.suite.opening import Opened, Splits, open_data
from clipkit.suite.outcomes import Measured, write_outcomes
from clipkit.suite.suite_file import Suite, TaskSpec
from clipkit.suite.tasks import TASKS, Task
from clipkit.tracking.result_runs import read_result

if TYPE_CHECKING:
    from clipkit.interop import OpenedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Planned:
    """A task of the suite whose data sets are open."""

    spec: TaskSpec
    task: Task
    splits: Splits

    @property
    def name(self) -> str:
        return f"{self.spec.task}/{self.spec.set}"

    @property
    def num_rows(self) -> int:
        return sum(len(one.rows) for one in self.splits if one is not None)

    def about(self) -> dict[str, Any]:
        """Return what tells this task on this data from all others: what a resumed run compares."""
        test = self.splits.test
        names = self.task.class_names(test)
        return {
            "task": self.spec.task,
            "set": self.spec.set,
            "data": {
                "id": test.data.path,
                "revision": test.revision,
                "split": test.data.split,
                "n": len(test.rows),
                "digest": test.digest,
                "classes": None if names is None else len(names),
                "templates": digest_of_texts(_templates(test.data)),
            },
            **self.task.settings(self.splits),
            "main_metric": self.spec.metric,
            "verified": self.spec.verified,
        }


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
        resume: take over what the file holds for the same model, data and settings, other suites'
            tasks too.
        limit: evaluate the first so many rows of each test set only.
        batch_size: pictures at a time.
        watch: called with a task's name, how many pictures of it are embedded, and of how many.
    """
    settings = {"batch_size": batch_size, "limit": limit, "seed": SEED}
    result = results.new(opened, suite=suite.name, settings=settings)
    result["model"]["behaviour"] = _behaviour(opened)
    earlier = _earlier(output, result) if resume and output is not None else []
    wanted = {(spec.task, spec.set) for spec in suite.tasks}
    others = [entry for entry in earlier if (entry["task"], entry["set"]) not in wanted]
    entries, todo = _take_over(_plan(suite, limit, result), earlier)
    if entries or others:
        log.info("%d tasks are kept from %s, measured before", len(entries) + len(others), output)
    embedder = ModelEmbedder(opened.model, scale=opened.scale, batch_size=batch_size)
    _embed_texts_together(embedder, todo)
    for planned, about in todo:
        try:
            entry = about | _measure(planned, embedder, output, watch)
        except Exception as error:  # whatever a data set or a stranger's model raises
            _note_failure(result, planned.spec, error)
            continue
        entries[planned.spec.task, planned.spec.set] = entry
        _write(output, result, suite, entries, others)
    _write(output, result, suite, entries, others)
    return result


# --- Before ------------------------------------------------------------------------------------


def _plan(suite: Suite, limit: int | None, result: dict[str, Any]) -> list[_Planned]:
    """Open the data of all tasks; what cannot be opened is noted as failed."""
    planned = []
    for spec in suite.tasks:
        try:
            planned.append(_open(spec, limit))
        except Exception as error:  # whatever a reader of files meets
            _note_failure(result, spec, error, where=spec.where)
    return planned


def _open(spec: TaskSpec, limit: int | None) -> _Planned:
    task = TASKS[spec.task](**spec.arguments)

    def opened(data: EvalData) -> Opened:
        one = task.arrange(open_data(data))
        task.check(one)
        return one

    return _Planned(
        spec,
        task,
        Splits(
            opened(spec.data if limit is None else replace(spec.data, limit=limit)),
            None if spec.train is None else opened(spec.train),
            None if spec.validation is None else opened(spec.validation),
        ),
    )


_Entries = dict[tuple[str, str], dict[str, Any]]
_Todo = list[tuple[_Planned, dict[str, Any]]]


def _take_over(
    planned: Sequence[_Planned], earlier: Sequence[dict[str, Any]]
) -> tuple[_Entries, _Todo]:
    """Return what was measured before just as it is wanted now, and what is left to do."""
    before = {(entry["task"], entry["set"]): entry for entry in earlier}
    entries: _Entries = {}
    todo: _Todo = []
    for one in planned:
        about, key = one.about(), (one.spec.task, one.spec.set)
        done = before.get(key)
        if done is not None and all(done.get(name) == value for name, value in about.items()):
            entries[key] = done
        else:
            todo.append((one, about))
    return entries, todo


def _earlier(output: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tasks of an earlier file that the same model was measured on."""
    if not output.is_file():
        return []
    earlier = read_result(output)
    same = earlier.get("settings") == result["settings"] and all(
        earlier["model"].get(key) == value
        for key, value in result["model"].items()
        if key not in ("spec", "name", "configuration")
    )
    return list(earlier["tasks"]) if same else []


def _behaviour(opened: OpenedModel) -> str | None:
    """Return a digest of what the model makes of two pictures and two texts, to three digits.

    The same weights in another architecture have the same digest and are another model.
    """
    try:
        embeddings = torch.cat([ties.normalise(side) for side in probe(opened.model)])
    except Exception:  # the tasks say what is wrong with it
        return None
    return digest_of_texts(map(str, (1000 * embeddings).round().long().flatten().tolist()))


def _templates(data: EvalData) -> list[str]:
    return [data.templates] if isinstance(data.templates, str) else list(data.templates)


# --- Measuring ---------------------------------------------------------------------------------


def _embed_texts_together(embedder: ModelEmbedder, todo: _Todo) -> None:
    """Embed the texts of all tasks at once: each different one once, in batches of like length."""
    texts = [text for planned, _ in todo for text in planned.task.texts(planned.splits.test)]
    try:
        if texts:
            embedder.texts(texts)
    except Exception:  # each task asks again for its own, and says what is wrong
        log.debug("the texts of all tasks together were refused", exc_info=True)


def _measure(
    planned: _Planned,
    embedder: ModelEmbedder,
    output: Path | None,
    watch: Callable[[str, int, int], object],
) -> dict[str, Any]:
    """Measure one task and return what a result file says of it."""
    began, before = time.monotonic(), embedder.num_embedded
    embedder.watch = lambda _: watch(planned.name, embedder.num_embedded - before, planned.num_rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        measured = planned.task.measure(embedder, planned.splits)
    for warning in caught:
        log.warning("%s: %s", planned.name, warning.message)
    seconds, pictures = time.monotonic() - began, embedder.num_embedded - before
    return {
        "metrics": results.as_json(measured.metrics),
        "seconds": round(seconds, 3),
        # None where another task had embedded the same pictures before.
        "images_per_second": round(pictures / seconds, 2) if pictures else None,
        "outcomes": None if output is None else _keep_outcomes(planned, measured, output),
    }


def _keep_outcomes(planned: _Planned, measured: Measured, output: Path) -> str | None:
    """Write what was measured sample by sample; returns the file, relative to the result's."""
    if not measured.outcomes:
        return None
    spec, test = planned.spec, planned.splits.test
    path = results.outcomes_file(output, spec.task, spec.set)
    write_outcomes(
        path,
        measured,
        task=spec.task,
        set_name=spec.set,
        data=test.digest,
        settings=digest_of_values(planned.task.settings(planned.splits)),
    )
    write_examples(path, measured.examples, test.rows)
    return path.relative_to(output.parent).as_posix()


def _write(
    output: Path | None,
    result: dict[str, Any],
    suite: Suite,
    entries: _Entries,
    others: Sequence[dict[str, Any]],
) -> None:
    """Bring the tasks into the suite's order, those of other suites last, and write the file."""
    keys = [(spec.task, spec.set) for spec in suite.tasks]
    result["tasks"] = [entries[key] for key in keys if key in entries] + list(others)
    if output is not None:
        results.write(output, result)


def _note_failure(
    result: dict[str, Any], spec: TaskSpec, error: Exception, *, where: str = ""
) -> None:
    sentence = (
        error.sentence if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    )
    sentence = f"{where}: {sentence}" if where else sentence
    log.warning("%s/%s failed: %s", spec.task, spec.set, sentence)
    log.debug("the traceback", exc_info=error)
    result["failed"].append({"task": spec.task, "set": spec.set, "error": sentence})
