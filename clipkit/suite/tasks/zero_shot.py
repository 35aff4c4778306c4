"""Classification by the names of the classes alone: one class a picture, or several."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation.calibration import calibrate, calibration_metrics
from clipkit.evaluation.classification import build_classifier, classification_metrics, classify
from clipkit.evaluation.multilabel import classify_multilabel, multilabel_metrics
from clipkit.evaluation.prompts import Prompts, class_name_warnings
from clipkit.suite.embedder import Embedder
from clipkit.suite.eval_data import prompts_for
from clipkit.suite.examples import choose
from clipkit.suite.opening import Opened, Splits
from clipkit.suite.outcomes import Measured, Outcome
from clipkit.suite.tasks.base import Task


class ZeroShot(Task):
    """Classification by the names of the classes alone."""

    kind = "zeroshot"
    measures = ("top1", "top5", "mean_class_top1")

    def class_names(self, opened: Opened) -> list[str]:
        return opened.classes.names

    def prompts(self, opened: Opened) -> Prompts:
        return prompts_for(opened.data, self.class_names(opened))

    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        test = splits.test
        names = self.class_names(test)
        for sentence in class_name_warnings(names):
            warnings.warn(sentence, stacklevel=2)
        classifier = classifier_of(embedder, self.prompts(test), len(names))
        images = embedder.images(test.data, test.rows)
        labels = torch.from_numpy(test.classes.labels)
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
        truth, predicted = found.labels.tolist(), found.predicted.tolist()
        examples = choose(
            found.strict_top1, lambda row: names[truth[row]], lambda row: names[predicted[row]]
        )
        return Measured(metrics, outcomes, names, examples)


class Multilabel(Task):
    """Average precision of every class, where a picture may show several."""

    kind = "multilabel"
    measures = ("map", "map_11point")

    def class_names(self, opened: Opened) -> list[str]:
        if not opened.data.class_names:
            raise UserError("class_names: needed where a picture may show several classes")
        return list(opened.data.class_names)

    def prompts(self, opened: Opened) -> Prompts:
        return prompts_for(opened.data, self.class_names(opened))

    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        from clipkit.suite.clip_benchmark import targets_of

        test = splits.test
        names = self.class_names(test)
        found = classify_multilabel(
            embedder.images(test.data, test.rows),
            classifier_of(embedder, self.prompts(test), len(names)),
            torch.from_numpy(targets_of(test.rows)),
        )
        numbers = torch.arange(len(test.rows))
        outcome = Outcome("map", numbers, numbers, found.rows)
        return Measured(multilabel_metrics(found), [outcome], names)


def classifier_of(embedder: Embedder, prompts: Prompts, num_classes: int) -> Tensor:
    """Return one unit vector a class (C, D), from its prompts."""
    texts = embedder.texts(prompts.unique)[prompts.prompt_index]
    return build_classifier(texts, prompts.class_of_prompt, num_classes)
