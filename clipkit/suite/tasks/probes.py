"""What the image side alone has learned: linear and few-shot probes, nearest neighbours."""

from __future__ import annotations

import numpy as np
import torch

from clipkit.errors import UserError, named
from clipkit.evaluation.classification import ClassificationOutcomes
from clipkit.evaluation.knn import classify_by_neighbours, knn_metrics
from clipkit.evaluation.metric import Metric
from clipkit.evaluation.probes import (
    Labelled,
    few_shot_metrics,
    few_shot_probe,
    linear_probe,
    probe_metrics,
)
from clipkit.suite.embedder import Embedder
from clipkit.suite.opening import Opened, Splits
from clipkit.suite.outcomes import Measured, Outcome
from clipkit.suite.tasks.base import Task


class _Labelled(Task):
    """A task whose rows have a class each."""

    def class_names(self, opened: Opened) -> list[str]:
        return opened.classes.names

    def check(self, opened: Opened) -> None:
        self.class_names(opened)


class LinearProbe(_Labelled):
    """Logistic regression on the image embeddings, its penalty chosen on validation pictures."""

    kind = "probe"
    measures = ("top1", "mean_class_top1")

    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        sides, names = _labelled(embedder, splits)
        found = linear_probe(
            sides["train"], sides.get("validation"), sides["test"], num_classes=len(names)
        )
        return _classified(probe_metrics(found), found.test, names)


class FewShotProbe(_Labelled):
    """The probe on a few pictures a class, drawn anew by every seed.

    Args:
        shots: pictures a class.
        seeds: how many draws.
    """

    kind = "fewshot"
    measures = ("top1", "mean_class_top1")

    def __init__(self, *, shots: int = 4, seeds: int = 5) -> None:
        self.shots = shots
        self.seeds = seeds

    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        sides, names = _labelled(embedder, splits)
        found = few_shot_probe(
            sides["train"],
            sides["test"],
            num_classes=len(names),
            shots=self.shots,
            seeds=range(self.seeds),
        )
        numbers = torch.arange(len(splits.test.rows))
        outcomes = [Outcome("top1", numbers, numbers, found.top1)]
        return Measured(few_shot_metrics(found), outcomes, names)


class NearestNeighbours(_Labelled):
    """The vote of the nearest training pictures.

    Args:
        k: how many vote.
    """

    kind = "knn"
    measures = ("top1", "mean_class_top1")

    def __init__(self, *, k: int = 20) -> None:
        self.k = k

    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        sides, names = _labelled(embedder, splits)
        found = classify_by_neighbours(
            *sides["train"], *sides["test"], num_classes=len(names), k=self.k
        )
        return _classified(knn_metrics(found), found, names)


def _labelled(embedder: Embedder, splits: Splits) -> tuple[dict[str, Labelled], list[str]]:
    """Return embeddings and classes of the splits that there are, and the names of the classes."""
    if splits.train is None:
        raise UserError("a probe needs training pictures; name them under train")
    opened = {name: one for name, one in splits._asdict().items() if one is not None}
    classes = {name: one.classes for name, one in opened.items()}
    names = max((one.names for one in classes.values()), key=len)
    if any(one.names != names[: len(one.names)] for one in classes.values()):
        # Words that were numbered in each split by itself.
        names = sorted({name for one in classes.values() for name in one.names})
    shown = {name: {one.names[at] for at in set(one.labels)} for name, one in classes.items()}
    if not shown["train"] & shown["test"]:
        raise UserError(
            f"train and test share no class (there are {named(sorted(shown['train']))} and "
            f"{named(sorted(shown['test']))})"
        )
    sides = {}
    for name, one in classes.items():
        labels = one.labels
        if one.names != names[: len(one.names)]:
            labels = np.array([names.index(word) for word in one.names], np.int64)[labels]
        images = embedder.images(opened[name].data, opened[name].rows)
        sides[name] = Labelled(images, torch.from_numpy(labels))
    return sides, names


def _classified(
    metrics: dict[str, Metric], found: ClassificationOutcomes, names: list[str]
) -> Measured:
    numbers = torch.arange(len(found.labels))
    outcome = Outcome("top1", numbers, numbers, found.top1, found.labels, found.predicted)
    return Measured(metrics, [outcome], names)
