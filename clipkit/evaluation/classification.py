"""Zero-shot classification: an image belongs to the class whose text embedding is nearest.

Everything is cosine similarity, so embeddings of any norm may be given. Ties are shared fairly (see
`ties`); two classes of one name have one text embedding, hence half the credit each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.evaluation.metric import Metric
from clipkit.evaluation.statistics import class_mean_interval, interval


@dataclass(frozen=True, eq=False, kw_only=True)
class ClassificationOutcomes:
    """What became of each image; everything is on the CPU, one entry a row of the images."""

    labels: Tensor  # (N,) int64
    predicted: Tensor  # (N,) int64, the lowest class id among those tied for the first place
    top1: Tensor  # (N,) float64, expected under random order of ties
    top5: Tensor | None  # (N,) float64, None with fewer than five classes
    strict_top1: Tensor  # (N,) bool, the right class beats every other
    tied: Tensor  # (N,) bool, the right class shares the first place, so chance decides this row
    # (C,) how a classifier ranks the classes where all images look alike to it: zeros, or how many
    # images of each it was trained on
    prior: Tensor

    @property
    def num_classes(self) -> int:
        return len(self.prior)


@torch.no_grad()
def build_classifier(text_embeddings: Tensor, class_of_prompt: Tensor, num_classes: int) -> Tensor:
    """Averages prompts (P, D) into one unit vector a class (C, D): normalise, mean, renormalise.

    Args:
        text_embeddings: (P, D), one row a prompt
        class_of_prompt: (P,) int64, the class of each row
        num_classes: C; every class needs a prompt.
    """
    prompts = ties.unit(text_embeddings, "text")
    classes = class_ids(class_of_prompt, len(prompts), num_classes, "class_of_prompt").cpu()
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
    labels = class_ids(labels, len(images), len(classes), "labels")
    return judge(ties.score_blocks(images, classes, block_size), labels, torch.zeros(len(classes)))


def judge(
    blocks: Iterable[tuple[int, Tensor]], labels: Tensor, prior: Tensor
) -> ClassificationOutcomes:
    """Says how the right class fares in blocks of scores.

    Args:
        blocks: (first row, scores (b, C)), all rows in turn; nearer than 1e-6 they are tied.
        labels: (N,) int64, in [0, C)
        prior: (C,) the scores of the classes where all images look alike.
    """
    labels = labels.cpu()
    greater, tied, predicted = (torch.empty(len(labels), dtype=torch.int64) for _ in range(3))
    for start, scores in blocks:
        rows = slice(start, start + len(scores))
        own = labels[rows].to(scores.device)
        at = ties.places(scores, scores.gather(1, own.unsqueeze(1)).squeeze(1))
        greater[rows], tied[rows] = at.greater.cpu(), at.tied.cpu()
        first = scores >= ties.lowest_tied(scores.amax(dim=1)).unsqueeze(1)
        predicted[rows] = first.byte().argmax(dim=1).cpu()
    at = ties.Places(greater, tied)
    return ClassificationOutcomes(
        labels=labels,
        predicted=predicted,
        top1=ties.share_within(1, at),
        top5=ties.share_within(5, at) if len(prior) >= 5 else None,
        strict_top1=(greater == 0) & (tied == 1),
        tied=(greater == 0) & (tied > 1),
        prior=prior.cpu(),
    )


def classification_metrics(outcomes: ClassificationOutcomes) -> dict[str, Metric]:
    """Returns top1, top5 (from five classes on), mean_class_top1, strict_top1 and tie_rate.

    Classes without an image are left out of mean_class_top1; in strict_top1 only what beats every
    other class counts; tie_rate is the share of images that a tie for the first place decides.
    """
    of, labels = outcomes, outcomes.labels
    if not len(labels):
        raise ValueError("there is no row to average over")
    alike = _places_of_prior(of.prior, labels)
    chance = ties.share_within(1, alike)

    def plain(values: Tensor, chance: Tensor) -> Metric:
        values = values.double()
        mean = float(values.mean())
        return Metric(mean, interval(values), len(labels), float(chance.double().mean()))

    metrics = {"top1": plain(of.top1, chance)}
    if of.top5 is not None:
        metrics["top5"] = plain(of.top5, ties.share_within(5, alike))
    metrics["mean_class_top1"] = Metric(
        class_mean(of.top1, labels),
        class_mean_interval(of.top1, labels),
        len(labels),
        class_mean(chance, labels),
    )
    metrics["strict_top1"] = plain(of.strict_top1, (alike.greater == 0) & (alike.tied == 1))
    metrics["tie_rate"] = plain(of.tied, of.tied)._replace(chance=None, best=0.0)
    return metrics


def class_mean(values: Tensor, labels: Tensor) -> float:
    """Returns the mean over the classes that have a row of the mean of their values (N,)."""
    _, which, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    return float((torch.bincount(which, values) / counts).mean())


def class_ids(ids: Tensor, num_rows: int, num_classes: int, name: str) -> Tensor:
    """Returns ids (num_rows,) as int64; an id outside the classes is refused, `name` says whose."""
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


def _places_of_prior(prior: Tensor, labels: Tensor) -> ties.Places:
    _, which, counts = torch.unique(prior, return_inverse=True, return_counts=True)
    above = len(prior) - counts.cumsum(0)
    return ties.Places(above[which][labels], counts[which][labels])
