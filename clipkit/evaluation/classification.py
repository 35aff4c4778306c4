"""Zero-shot classification: an image belongs to the class whose text embedding is nearest.

Everything is cosine similarity, so embeddings of any norm may be given. Ties are shared fairly (see
`ties`); two classes of one name have one text embedding, hence half the credit each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.evaluation.statistics import Interval, class_mean_interval, interval


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassificationOutcomes:
    """What became of each image; everything is on the CPU, one entry a row of the images."""

    labels: Tensor  # (N,) int64
    predicted: Tensor  # (N,) int64, the lowest class id among those tied for the first place
    top1: Tensor  # (N,) float64, expected under random order of ties
    top5: Tensor | None  # (N,) float64, None with fewer than five classes
    strict_top1: Tensor  # (N,) bool, the right class beats every other
    tied: Tensor  # (N,) bool, the right class shares the first place, so chance decides this row
    num_classes: int


@dataclass(frozen=True, eq=False, kw_only=True)
class MultilabelOutcomes:
    """Expected average precision of each class that has an image, on the CPU."""

    classes: Tensor  # (K,) int64, ids of the classes with at least one image
    average_precision: Tensor  # (K,) float64


@torch.no_grad()
def build_classifier(text_embeddings: Tensor, class_of_prompt: Tensor, num_classes: int) -> Tensor:
    """Averages prompts (P, D) into one unit vector a class (C, D): normalise, mean, renormalise.

    Args:
        text_embeddings: (P, D), one row a prompt
        class_of_prompt: (P,) int64, the class of each row
        num_classes: C; every class needs a prompt.
    """
    prompts = ties.unit(text_embeddings, "text")
    classes = _class_ids(class_of_prompt, len(prompts), num_classes, "class_of_prompt").cpu()
    counts = torch.bincount(classes, minlength=num_classes)
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise UserError(f"classes without a prompt: {_some(empty)} (of {num_classes})")
    # A sum a class, in the order of the rows: index_add_ on a GPU adds in any order, and a
    # checkpoint evaluated again must give the same digits.
    in_order = prompts[classes.argsort(stable=True).to(prompts.device)]
    by_class = torch.split(in_order, counts.tolist())
    return F.normalize(torch.stack([rows.mean(dim=0) for rows in by_class]), dim=1)


@torch.no_grad()
def classify(
    image_embeddings: Tensor, classifier: Tensor, labels: Tensor, *, block_size: int | None = None
) -> ClassificationOutcomes:
    """Ranks C classes for each of N images and says how the right one fares.

    Args:
        image_embeddings: (N, D)
        classifier: (C, D), from `build_classifier`
        labels: (N,) int64, in [0, C)
        block_size: images at a time; the result does not depend on it.

    Raises:
        UserError: labels outside the classes, or embeddings that are not finite.
    """
    images, classes = ties.unit(image_embeddings, "image"), ties.unit(classifier, "class")
    num_classes = len(classes)
    labels = _class_ids(labels, len(images), num_classes, "labels").to(images.device)
    greater, tied, predicted = (torch.empty(len(images), dtype=torch.int64) for _ in range(3))
    for start, scores in ties.score_blocks(images, classes, block_size):
        rows = slice(start, start + len(scores))
        at = ties.places(scores, scores.gather(1, labels[rows].unsqueeze(1)).squeeze(1))
        greater[rows], tied[rows] = at.greater.cpu(), at.tied.cpu()
        first = scores >= ties.lowest_tied(scores.amax(dim=1)).unsqueeze(1)
        predicted[rows] = first.byte().argmax(dim=1).cpu()
    at = ties.Places(greater, tied)
    return ClassificationOutcomes(
        labels=labels.cpu(),
        predicted=predicted,
        top1=ties.share_within(1, at),
        top5=ties.share_within(5, at) if num_classes >= 5 else None,
        strict_top1=(greater == 0) & (tied == 1),
        tied=(greater == 0) & (tied > 1),
        num_classes=num_classes,
    )


def classification_metrics(outcomes: ClassificationOutcomes) -> dict[str, float]:
    """Returns top1, top5 (from five classes on) and mean_class_top1 (absent classes dropped)."""
    _require_rows(outcomes.labels)
    hits = torch.bincount(outcomes.labels, outcomes.top1, outcomes.num_classes)
    counts = torch.bincount(outcomes.labels, minlength=outcomes.num_classes)
    metrics = {"top1": float(outcomes.top1.mean())}
    if outcomes.top5 is not None:
        metrics["top5"] = float(outcomes.top5.mean())
    metrics["mean_class_top1"] = float((hits / counts)[counts > 0].mean())
    return metrics


def classification_intervals(outcomes: ClassificationOutcomes) -> dict[str, Interval]:
    """Returns the 95 % interval of each of `classification_metrics`."""
    _require_rows(outcomes.labels)
    intervals = {"top1": interval(outcomes.top1)}
    if outcomes.top5 is not None:
        intervals["top5"] = interval(outcomes.top5)
    intervals["mean_class_top1"] = class_mean_interval(outcomes.top1, outcomes.labels)
    return intervals


@torch.no_grad()
def classify_multilabel(
    image_embeddings: Tensor,
    classifier: Tensor,
    targets: Tensor,
    *,
    block_size: int | None = None,
) -> MultilabelOutcomes:
    """Ranks N images for each of C classes: non-interpolated average precision, ties expected.

    The precision met at a positive is averaged over the places it may take among those tied with
    it, the tied positives before it counted by their expected number: exact wherever being tied is
    transitive. (VOC2007 is often quoted as 11-point interpolated precision: not comparable.)

    Args:
        image_embeddings: (N, D)
        classifier: (C, D)
        targets: (N, C) bool or 0 and 1
        block_size: classes at a time.
    """
    images, classes = ties.unit(image_embeddings, "image"), ties.unit(classifier, "class")
    if targets.shape != (len(images), len(classes)):
        raise ValueError(
            f"targets are {tuple(targets.shape)} for {len(images)} images and "
            f"{len(classes)} classes; they must be (images, classes)"
        )
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise UserError("targets of a multi-label data set hold a value other than 0 and 1")
    present = targets.to(images.device).bool().T
    # Average precision of a class: sum over its positives of the precision at their rank.
    harmonic = torch.cat(
        [torch.zeros(1).double(), (1.0 / torch.arange(1, len(images) + 1).double()).cumsum(0)]
    )
    found: list[tuple[int, Tensor]] = []
    for start, scores in ties.score_blocks(classes, images, block_size):
        for row, row_scores in enumerate(scores):
            if present[start + row].any():
                value = _average_precision(row_scores, present[start + row], harmonic)
                found.append((start + row, value))
    return MultilabelOutcomes(
        classes=torch.tensor([which for which, _ in found], dtype=torch.int64),
        average_precision=torch.tensor([float(value) for _, value in found], dtype=torch.float64),
    )


def multilabel_metrics(outcomes: MultilabelOutcomes) -> dict[str, float]:
    """Returns map, the mean over the classes that have an image."""
    _require_rows(outcomes.classes)
    return {"map": float(outcomes.average_precision.mean())}


def _average_precision(scores: Tensor, present: Tensor, harmonic: Tensor) -> Tensor:
    positives = scores[present].sort().values
    everyone = _places_in(scores.sort().values, positives)
    right = _places_in(positives, positives)
    # At place j of the `tied` ones the precision is (right.greater + 1 + (j - 1) * density) over
    # (greater + j), which is density + rest / (greater + j): a harmonic sum.
    density = (right.tied - 1).double() / (everyone.tied - 1).clamp(min=1)
    rest = right.greater + 1 - density - density * everyone.greater
    sums = harmonic[everyone.greater + everyone.tied] - harmonic[everyone.greater]
    return (density + rest * sums / everyone.tied).mean()


def _places_in(ascending: Tensor, positives: Tensor) -> ties.Places:
    ascending, positives = ascending.contiguous(), positives.contiguous()
    not_above = torch.searchsorted(ascending, positives + ties.TIE_TOLERANCE, right=True)
    below = torch.searchsorted(ascending, ties.lowest_tied(positives))
    return ties.Places((len(ascending) - not_above).cpu(), (not_above - below).cpu())


def _class_ids(ids: Tensor, num_rows: int, num_classes: int, name: str) -> Tensor:
    if ids.shape != (num_rows,):
        raise ValueError(
            f"{name} are {tuple(ids.shape)} for {num_rows} rows; one id a row is needed"
        )
    if ids.dtype.is_floating_point or ids.dtype is torch.bool:
        raise ValueError(f"{name} are {ids.dtype}; integer class ids are needed")
    outside = ids[(ids < 0) | (ids >= num_classes)]
    if len(outside):
        raise UserError(
            f"{name} name classes outside the list: {_some(sorted(set(outside.tolist())))} "
            f"({len(outside)} rows); there are {num_classes} classes, numbered from 0"
        )
    return ids.long()


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:10])) + (", ..." if len(ids) > 10 else "")


def _require_rows(rows: Tensor) -> None:
    if not len(rows):
        raise ValueError("there is no row to average over")
