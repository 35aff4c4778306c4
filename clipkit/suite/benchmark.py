"""A model on a suite: every task once, what is done is kept, what fails is said."""

from __future__ import annotations

import logging
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.evaluation.statistics import SEED
from clipkit.interop.base import probe
from clipkit.suite import results
from clipkit.suite.embedder import ModelEmbedder
from clipkit.suite.eval_data import EvalData
from clipkit.suite.examples import write_examples
from clipkit.suite.opening import Opened, Splits, open_data
from clipkit.suite.outcomes import Measured, write_outcomes
from clipkit.suite.suite_file import Suite, TaskSpec
from clipkit.suite.tasks import TASKS, Task
from clipkit.tracking.digests import digest_of_texts, digest_of_values
from clipkit.tracking.result_runs import read_result

if TYPE_CHECKING:
    from clipkit.interop import OpenedModel

log = logging.getLogger(__name__)

_BEHAVIOUR_DIMS = 16
_BEHAVIOUR_TOLERANCE = 1e-3


@dataclass(frozen=True)
class _Planned:
    """A task of the suite whose data sets are open."""

    spec: TaskSpec
    task: Task
    splits: Splits

    @property
    def key(self) -> tuple[str, str]:
        return self.spec.task, self.spec.set

    @property
    def name(self) -> str:
        return f"{self.spec.task}/{self.spec.set}"

    @property
    def num_rows(self) -> int:
        return sum(len(one.rows) for one in self.splits if one is not None)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the score besides the model and the rows."""
        return self.task.settings(self.splits)

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
            "settings": self.settings,
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
    entries, todo = _take_over(_plan(suite, limit, result), earlier)
    again = {planned.key for planned, _ in todo}
    # Also what other suites asked for, and what cannot be opened today.
    others = {
        key: entry
        for entry in earlier
        if (key := (entry["task"], entry["set"])) not in entries and key not in again
    }
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
        entries[planned.key] = entry
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
            opened(_limited(spec.data, limit)),
            None if spec.train is None else opened(spec.train),
            None if spec.validation is None else opened(spec.validation),
        ),
    )


def _limited(data: EvalData, limit: int | None) -> EvalData:
    if limit is None or (data.limit is not None and data.limit <= limit):
        return data
    return replace(data, limit=limit)


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
        about = one.about()
        done = before.get(one.key)
        if done is not None and all(done.get(name) == value for name, value in about.items()):
            entries[one.key] = done
        else:
            todo.append((one, about))
    return entries, todo


def _earlier(output: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the tasks of an earlier file that the same model was measured on."""
    if not output.is_file():
        return []
    earlier = read_result(output)
    before, now = earlier["model"], result["model"]
    named = ("spec", "name", "configuration", "behaviour")
    same = all(before.get(key) == value for key, value in now.items() if key not in named)
    if not same or not _alike(before.get("behaviour"), now["behaviour"]):
        raise UserError(
            f"--resume: {output} holds {before.get('name')}, which is another model than "
            f"{now['name']}; name another --output, or leave --resume out to write it anew"
        )
    if earlier.get("settings") != result["settings"]:
        differing = [k for k, v in result["settings"].items() if earlier["settings"].get(k) != v]
        raise UserError(
            f"--resume: {output} was measured with another {', '.join(differing)}; name another "
            "--output, or leave --resume out to write it anew"
        )
    return list(earlier["tasks"])


def _behaviour(opened: OpenedModel) -> list[float] | None:
    """Return some of what the model makes of two pictures and two texts.

    The same weights in another architecture have the same digest and are another model.
    """
    try:
        sides = [ties.normalise(side)[:, :_BEHAVIOUR_DIMS] for side in probe(opened.model)]
    except Exception:  # the tasks say what is wrong with it
        return None
    return [round(value, 5) for value in torch.cat(sides).flatten().tolist()]


def _alike(before: list[float] | None, now: list[float] | None) -> bool:
    """Whether two models behave alike, rounding on other hardware aside."""
    if before is None or now is None or len(before) != len(now):
        return before == now
    return all(abs(a - b) < _BEHAVIOUR_TOLERANCE for a, b in zip(before, now, strict=True))


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
    if planned.spec.metric not in measured.metrics:
        there = ", ".join(name for name in planned.task.measures if name in measured.metrics)
        raise UserError(f"metric: {planned.spec.metric} is not defined here; there are {there}")
    seconds, pictures = time.monotonic() - began, embedder.num_embedded - before
    return {
        "metrics": results.as_json(measured.metrics),
        "warnings": [str(warning.message) for warning in caught],
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
        settings=digest_of_values(planned.settings),
    )
    write_examples(path, measured.examples, test.rows)
    return path.relative_to(output.parent).as_posix()


def _write(
    output: Path | None,
    result: dict[str, Any],
    suite: Suite,
    entries: _Entries,
    others: _Entries,
) -> None:
    """Bring the tasks into the suite's order, those of other suites last, and write the file."""
    keys = [(spec.task, spec.set) for spec in suite.tasks]
    known = {**others, **entries}
    result["tasks"] = [known.pop(key) for key in keys if key in known] + list(known.values())
    if output is not None:
        results.write(output, result)


def _note_failure(
    result: dict[str, Any], spec: TaskSpec, error: Exception, *, where: str = ""
) -> None:
    sentence = (
        error.sentence if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    )
    # As the suite's file calls it.
    sentence = re.sub(r"^EvalData\.", "data.", sentence)
    sentence = f"{where}: {sentence}" if where else sentence
    log.warning("%s/%s failed: %s", spec.task, spec.set, sentence)
    log.debug("the traceback", exc_info=error)
    result["failed"].append({"task": spec.task, "set": spec.set, "error": sentence})
