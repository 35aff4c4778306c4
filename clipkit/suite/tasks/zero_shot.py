"""Classification by the names of the classes alone: one class a picture, or several."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation.calibration import calibrate, calibration_metrics
from clipkit.evaluation.classification import build_classifier, classification_metrics, classify
from clipkit.evaluation.multilabel import classify_multilabel, multilabel_metrics
from clipkit.evaluation.prompts import Prompts, class_name_warnings, readable
from clipkit.suite.embedder import Embedder
from clipkit.suite.eval_data import Classes, EvalData, open_classes
from clipkit.suite.examples import choose
from clipkit.suite.opening import Opened
from clipkit.suite.outcomes import Measured, Outcome
from clipkit.suite.tasks.base import Task


class ZeroShot(Task):
    """Classification by the names of the classes alone."""

    kind = "zeroshot"
    measures = ("top1", "top5", "mean_class_top1")

    def texts(self, opened: Opened) -> list[str]:
        return _prompts(opened.data, open_classes(opened.data, opened.rows)).unique

    def measure(
        self,
        embedder: Embedder,
        test: Opened,
        *,
        train: Opened | None = None,
        validation: Opened | None = None,
    ) -> Measured:
        classes = open_classes(test.data, test.rows)
        for sentence in class_name_warnings(classes.names):
            warnings.warn(sentence, stacklevel=2)
        classifier = classifier_of(embedder, test.data, classes)
        images = embedder.images(test.data, test.rows)
        labels = torch.from_numpy(classes.labels)
        found = classify(images, classifier, labels)
        metrics = classification_metrics(found)
        if embedder.scale is not None:
            metrics |= calibration_metrics(
                calibrate(images, classifier, labels, scale=embedder.scale)
            )
        numbers = torch.arange(len(test.rows))
        outcomes = [Outcome("top1", numbers, numbers, found.top1, found.labels, found.predicted)]
        if found.top5 is not None:
            outcomes.append(Outcome("top5", numbers, numbers, found.top5))
        names, truth, predicted = classes.names, found.labels.tolist(), found.predicted.tolist()
        examples = choose(
            found.strict_top1, lambda row: names[truth[row]], lambda row: names[predicted[row]]
        )
        return Measured(metrics, outcomes, names, examples)


class Multilabel(Task):
    """Average precision of every class, where a picture may show several."""

    kind = "multilabel"
    measures = ("map", "map_11point")

    def texts(self, opened: Opened) -> list[str]:
        return _prompts(opened.data, _names(opened)).unique

    def measure(
        self,
        embedder: Embedder,
        test: Opened,
        *,
        train: Opened | None = None,
        validation: Opened | None = None,
    ) -> Measured:
        from clipkit.suite.clip_benchmark import targets_of

        classes = _names(test)
        found = classify_multilabel(
            embedder.images(test.data, test.rows),
            classifier_of(embedder, test.data, classes),
            torch.from_numpy(targets_of(test.rows)),
        )
        numbers = torch.arange(len(test.rows))
        outcome = Outcome("map", numbers, numbers, found.rows)
        return Measured(multilabel_metrics(found), [outcome], classes.names)


def classifier_of(embedder: Embedder, data: EvalData, classes: Classes) -> Tensor:
    """Return one unit vector a class (C, D), from its prompts."""
    prompts = _prompts(data, classes)
    texts = embedder.texts(prompts.unique)[prompts.prompt_index]
    return build_classifier(texts, prompts.class_of_prompt, len(classes.names))


def _prompts(data: EvalData, classes: Classes) -> Prompts:
    # pyarrow is needed from here on, and not to train.
    from clipkit.suite.clip_benchmark import prompts_for

    return prompts_for(data, classes.names)


def _names(opened: Opened) -> Classes:
    """Return the classes of a multi-label set, whose rows have targets instead of a label."""
    if not opened.data.class_names:
        raise UserError("class_names: needed where a picture may show several classes")
    return Classes(np.zeros(0, np.int64), [readable(name) for name in opened.data.class_names])
