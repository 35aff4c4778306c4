"""Multi-label classification: the images of each class are ranked by their nearness to its text.

Two values that papers both call mAP, and that differ by points: the mean of the precision met at
each right image (`map`), and VOC2007's mean of the interpolated precision at recall 0, 0.1, ... 1
(`map_11point`; Everingham et al., "The PASCAL Visual Object Classes Challenge", 2010). Ties are
shared fairly (see `ties`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.evaluation.metric import Metric
from clipkit.evaluation.statistics import SEED, spread_interval

# The spread of so many resamples is known to 5 %, and that of the interval it gives.
_RESAMPLES = 200


@dataclass(frozen=True, eq=False, kw_only=True)
class MultilabelOutcomes:
    """How well the images of each class are ranked, and what each image has to do with it.

    On the CPU. Average precision belongs to no single image, so the row of an image says what it
    adds: the mean over all, plus what leaving this image out would change, N - 1 times. The mean of
    the rows is the metric, their variance the one of its jackknife, and two models are compared on
    them, image by image, as on any others.
    """

    classes: Tensor  # (K,) int64, ids of the classes with at least one image
    positives: Tensor  # (K,) int64, how many images each of them has
    average_precision: Tensor  # (K,) float64, expected under random order of ties
    interpolated: Tensor  # (K,) float64, 11-point, of the expected curve
    rows: Tensor  # (N,) float64, what each image adds to the mean of `average_precision`
    interpolated_resamples: Tensor  # (200,) float64, the mean of `interpolated` on images redrawn


@torch.no_grad()
def classify_multilabel(
    image_embeddings: Tensor,
    classifier: Tensor,
    targets: Tensor,
    *,
    block_size: int | None = None,
    seed: int = SEED,
) -> MultilabelOutcomes:
    """Ranks N images for each of C classes.

    Average precision is not interpolated. The precision met at a positive is averaged over the
    places it may take among those tied with it, the tied positives before it counted by their
    expected number: the expected value, exactly, wherever being tied is transitive.

    The 11-point value has no such closed form, since it takes maxima: it is the one of the expected
    curve. After k places the expected number of positives is found, each tied one in equal parts at
    all of its places; precision is that number over k, recall that number over all positives, and
    the precision at recall r is the highest of all places where recall is at least r. Without ties
    that is VOC2007's, and where all is tied it is the share of the positives.

    Args:
        image_embeddings: (N, D)
        classifier: (C, D)
        targets: (N, C) bool or 0 and 1
        block_size: classes at a time.
        seed: of the images redrawn for the interval of the 11-point value.
    """
    images, classes = ties.unit(image_embeddings, "image"), ties.unit(classifier, "class")
    if targets.shape != (len(images), len(classes)):
        raise ValueError(
            f"targets are {tuple(targets.shape)} for {len(images)} images and "
            f"{len(classes)} classes; they must be (images, classes)"
        )
    if not bool(((targets == 0) | (targets == 1)).all()):
        raise UserError("targets of a multi-label data set hold a value other than 0 and 1")
    present = targets.cpu().bool().T.contiguous()
    harmonic = _harmonic_numbers(len(images))
    redrawn = _redrawn(len(images), seed)
    found: list[int] = []
    precisions, interpolated = [], []
    change = torch.zeros(len(images), dtype=torch.float64)
    absent = torch.zeros(len(images), dtype=torch.float64)
    resamples = torch.zeros(_RESAMPLES, dtype=torch.float64)
    resampled = torch.zeros(_RESAMPLES, dtype=torch.float64)
    for start, scores in ties.score_blocks(classes, images, block_size):
        for which, row_scores in enumerate(scores.cpu(), start):
            if not present[which].any():
                continue
            ranking = _rank(row_scores, present[which])
            at_positives = _precision(ranking.everyone, ranking.right, harmonic)
            value = at_positives.mean()
            found.append(which)
            precisions.append(value)
            interpolated.append(_eleven_points(ranking.everyone, len(images)))
            change += _without_each(ranking, at_positives, harmonic) - value
            absent += present[which] / present[which].sum() * (present[which].sum() == 1)
            again = _eleven_points_redrawn(ranking, redrawn)
            resamples += again.nan_to_num(0.0)
            resampled += again.isfinite()
    num_classes = len(found)
    total = torch.stack(precisions).sum() if found else torch.zeros(())
    # An image that is the only one of its class takes the class with it.
    without = (total + change) / (num_classes - absent).clamp(min=1)
    value = total / max(1, num_classes)
    return MultilabelOutcomes(
        classes=torch.tensor(found, dtype=torch.int64),
        positives=present[found].sum(dim=1),
        average_precision=torch.stack(precisions) if found else change[:0],
        interpolated=torch.stack(interpolated) if found else change[:0],
        rows=value + (len(images) - 1) * (without.mean() - without),
        interpolated_resamples=resamples / resampled.clamp(min=1),
    )


def multilabel_metrics(outcomes: MultilabelOutcomes) -> dict[str, Metric]:
    """Returns map and map_11point, means over the classes that have an image.

    Chance is what they are, by the same formula, when all images are tied.
    """
    if not len(outcomes.classes):
        raise ValueError("there is no row to average over")
    n = len(outcomes.rows)
    counts = outcomes.positives
    nothing = torch.zeros_like(counts)
    all_tied = ties.Places(nothing, torch.full_like(counts, n))
    chance = _precision(all_tied, ties.Places(nothing, counts), _harmonic_numbers(n)).mean()
    value = min(1.0, float(outcomes.average_precision.mean()))
    variance = float((outcomes.rows - outcomes.rows.mean()).square().sum()) / n**2
    interpolated = min(1.0, float(outcomes.interpolated.mean()))
    # Redrawn positives vary too little by one in their number, which is small where n is not.
    too_little = ((counts - 1).clamp(min=1) / counts.clamp(min=2)).double().mean()
    spread = float(outcomes.interpolated_resamples.var() / too_little)
    return {
        "map": Metric(value, spread_interval(value, variance, n), n, float(chance)),
        "map_11point": Metric(
            interpolated,
            spread_interval(interpolated, spread, n),
            n,
            float(counts.double().mean()) / n,
        ),
    }


class _Ranking(NamedTuple):
    """One class: where its positives stand, and where the images stand in ascending order."""

    ascending: Tensor  # (N,) int64, the images in ascending order of their scores
    positive: Tensor  # (N,) bool, in that order
    everyone: ties.Places  # the places of the positives among all images
    right: ties.Places  # and among the positives


def _rank(scores: Tensor, present: Tensor) -> _Ranking:
    values, ascending = scores.sort()
    positive = present[ascending]
    positives = values[positive]
    return _Ranking(
        ascending, positive, _places_in(values, positives), _places_in(positives, positives)
    )


def _places_in(ascending: Tensor, positives: Tensor) -> ties.Places:
    not_above = torch.searchsorted(ascending, positives + ties.TIE_TOLERANCE, right=True)
    below = torch.searchsorted(ascending, ties.lowest_tied(positives))
    return ties.Places(len(ascending) - not_above, not_above - below)


def _harmonic_numbers(n: int) -> Tensor:
    parts = 1.0 / torch.arange(1, n + 1).double()
    return torch.cat([torch.zeros(1).double(), parts.cumsum(0)])


def _precision(everyone: ties.Places, right: ties.Places, harmonic: Tensor) -> Tensor:
    """Returns the expected precision (P,) at each positive."""
    # At place j of the `tied` ones the precision is (right.greater + 1 + (j - 1) * density) over
    # (greater + j), which is density + rest / (greater + j): a harmonic sum.
    density = (right.tied - 1).double() / (everyone.tied - 1).clamp(min=1)
    rest = right.greater + 1 - density - density * everyone.greater
    sums = harmonic[everyone.greater + everyone.tied] - harmonic[everyone.greater]
    return density + rest * sums / everyone.tied


def _without_each(ranking: _Ranking, at_positives: Tensor, harmonic: Tensor) -> Tensor:
    """Returns the average precision (N,) without each image in turn; 0 where no positive is left.

    An image that goes changes the precision at a positive in one of four ways: it stood above it or
    was tied with it, and is right or wrong. So two running sums a kind serve all images.
    """
    above, tied = ranking.everyone
    right_above, right_tied = ranking.right
    n = len(ranking.positive)
    first_above = n - above
    first_tied = first_above - tied

    def changes(everyone: ties.Places, right: ties.Places) -> Tensor:
        # Cases that no image is in are computed too, so they must be finite.
        everyone = ties.Places(everyone.greater.clamp(min=0), everyone.tied.clamp(min=1))
        return _precision(everyone, right, harmonic) - at_positives

    def running(starts: Tensor, ends: Tensor | None, values: Tensor) -> Tensor:
        steps = torch.zeros(n + 1, dtype=torch.float64).index_add_(0, starts, values)
        if ends is not None:
            steps.index_add_(0, ends, -values)
        return steps.cumsum(0)[:n]

    tied_right = changes(ties.Places(above, tied - 1), ties.Places(right_above, right_tied - 1))
    if_right = running(
        first_above,
        None,
        changes(ties.Places(above - 1, tied), ties.Places(right_above - 1, right_tied)),
    ) + running(first_tied, first_above, tied_right)
    if_wrong = running(first_above, None, changes(ties.Places(above - 1, tied), ranking.right))
    if_wrong += running(
        first_tied, first_above, changes(ties.Places(above, tied - 1), ranking.right)
    )
    total, count = at_positives.sum(), len(at_positives)
    without = (total + if_wrong) / count
    left = total - at_positives + if_right[ranking.positive] - tied_right
    without[ranking.positive] = left / (count - 1) if count > 1 else 0.0
    return torch.empty_like(without).index_copy_(0, ranking.ascending, without)


def _eleven_points(everyone: ties.Places, n: int) -> Tensor:
    """Returns the mean interpolated precision of the expected curve at recall 0, 0.1, ... 1."""
    count = len(everyone.tied)
    steps = torch.zeros(n + 1, dtype=torch.float64)
    shares = 1.0 / everyone.tied.double()
    steps.index_add_(0, everyone.greater, shares)
    steps.index_add_(0, everyone.greater + everyone.tied, -shares)
    found = steps[:n].cumsum(0).cumsum(0)
    precision = found / torch.arange(1, n + 1)
    best_from = precision.flip(0).cummax(0).values.flip(0)
    # A sum of shares may fall short of a whole number by rounding.
    reached = torch.searchsorted(found, _recalls(count) - 1e-6)
    return best_from[reached.clamp(max=n - 1)].mean()


def _redrawn(n: int, seed: int) -> Tensor:
    """Returns how often each image is drawn in each resample, (N, 200) float32."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(n, (n,), generator=generator) for _ in range(_RESAMPLES if n else 0))
    counts = [torch.bincount(draw, minlength=n).float() for draw in draws]
    return torch.stack(counts, dim=1) if counts else torch.zeros(n, _RESAMPLES)


def _eleven_points_redrawn(ranking: _Ranking, redrawn: Tensor) -> Tensor:
    """Returns the 11-point precision (200,) of images redrawn; NaN where no positive is drawn.

    Only the spread of these is used, so tied positives are read at the end of their ties.
    """
    descending = ranking.ascending.flip(0)
    last_tied = (ranking.everyone.greater + ranking.everyone.tied).flip(0) - 1
    last_right = (ranking.right.greater + ranking.right.tied).flip(0) - 1
    # The images between one positive and the next are added up first: far fewer rows to run over.
    between = torch.empty_like(descending)
    between[descending] = torch.searchsorted(last_tied, torch.arange(len(descending)))
    drawn = redrawn.new_zeros(len(last_tied) + 1, _RESAMPLES).index_add_(0, between, redrawn)
    drawn = drawn.cumsum(0)[:-1].T
    right = redrawn[descending[ranking.positive.flip(0)]].cumsum(0)[last_right].T.contiguous()
    best_from = (right / drawn.clamp(min=1)).flip(1).cummax(1).values.flip(1)
    counts = right[:, -1:]
    reached = torch.searchsorted(right, counts * torch.arange(11) / 10 - 1e-3)
    points = best_from.gather(1, reached.clamp(max=right.shape[1] - 1)).double().mean(dim=1)
    return torch.where(counts.squeeze(1) > 0, points, torch.nan)


def _recalls(count: int) -> Tensor:
    return count * torch.arange(11).double() / 10
