"""Nearest neighbours: an image belongs to the class of the training images most like it.

The k nearest vote, each with the weight exp(cosine / temperature), k = 20 and a temperature of 0.07
as in https://arxiv.org/abs/1805.01978 and those who compare with it. Everything is cosine
similarity, so embeddings of any norm may be given.

Ties are shared fairly (see `ties`). Training images tied for the last of the k places share what is
left of the places, each voting with its chance of one; classes tied in the vote share the credit. A
model that gives everything the same embedding hence names the most frequent class of the training
images, and that is chance.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.evaluation.classification import (
    ClassificationOutcomes,
    class_ids,
    classification_metrics,
    judge,
)
from clipkit.evaluation.metric import Metric


@torch.no_grad()
def classify_by_neighbours(
    train_embeddings: Tensor,
    train_labels: Tensor,
    test_embeddings: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    k: int = 20,
    temperature: float | None = 0.07,
    block_size: int | None = None,
) -> ClassificationOutcomes:
    """Classifies each of N test images by the vote of its k nearest among R training images.

    Args:
        train_embeddings: (R, D)
        train_labels: (R,) int64, in [0, C)
        test_embeddings: (N, D)
        test_labels: (N,) int64, in [0, C)
        num_classes: C
        k: how many neighbours vote
        temperature: a neighbour's weight is exp(cosine / temperature); None gives all one vote.
        block_size: test images at a time; the result does not depend on it.

    Raises:
        UserError: embeddings that are not finite, labels outside the classes, fewer than k
            training images.
    """
    train, test = ties.unit(train_embeddings, "training"), ties.unit(test_embeddings, "test")
    if not 1 <= k <= len(train):
        raise UserError(f"k is {k} for {len(train)} training images; it must be in 1 to that many")
    if temperature is not None and not temperature > 0:
        raise UserError(f"temperature is {temperature}; it must be more than 0, or None")
    train_labels = class_ids(train_labels, len(train), num_classes, "train_labels")
    test_labels = class_ids(test_labels, len(test), num_classes, "test_labels")
    labels = train_labels.to(train.device)

    def votes() -> Iterator[tuple[int, Tensor]]:
        for start, scores in ties.score_blocks(test, train, block_size):
            yield start, _votes(scores, labels, num_classes, k, temperature)

    return judge(votes(), test_labels, torch.bincount(train_labels, minlength=num_classes))


def knn_metrics(outcomes: ClassificationOutcomes) -> dict[str, Metric]:
    """Returns the metrics of `classification_metrics`, top1 first."""
    return classification_metrics(outcomes)


def _votes(
    scores: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float | None
) -> Tensor:
    """Returns the vote (b, C) float64 for each class, from scores (b, R) of the training images.

    Weighted votes are given as temperature * log(sum of weights): the same order, in the unit of a
    cosine, so that scores too near to be told apart give votes too near to be told apart.
    """
    last = scores.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    sure = scores > last + ties.TIE_TOLERANCE
    among = scores >= ties.lowest_tied(last)
    num_sure = sure.sum(dim=1)
    chance = (k - num_sure).double() / (among.sum(dim=1) - num_sure)
    row, neighbour = among.nonzero(as_tuple=True)
    weight = torch.where(sure[row, neighbour], 1.0, chance[row])
    if temperature is not None:
        nearest = scores.amax(dim=1, keepdim=True).double()
        cosine = scores[row, neighbour].double()
        weight = weight * ((cosine - nearest[row, 0]) / temperature).exp()
    votes = torch.zeros(len(scores), num_classes, dtype=torch.float64, device=scores.device)
    votes.view(-1).index_add_(0, row * num_classes + labels[neighbour], weight)
    return votes if temperature is None else temperature * votes.log()
