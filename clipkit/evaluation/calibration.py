"""Whether a model is right as often as its probabilities say.

Calibration error depends on the scale of the logits, which accuracy does not: it takes the one the
model has learned, not the customary 100.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clipkit.evaluation import ties
from clipkit.evaluation.classification import classify
from clipkit.evaluation.metric import Metric
from clipkit.evaluation.statistics import Interval, student_quantile


@dataclass(frozen=True, eq=False, kw_only=True)
class CalibrationOutcomes:
    """How sure the model is of its first class, and how far that is right; on the CPU."""

    confidence: Tensor  # (N,) float64, the probability of the first class
    correct: Tensor  # (N,) float64, expected under random order of ties


@dataclass(frozen=True, eq=False, kw_only=True)
class ReliabilityCurve:
    """Bins of equal width, the empty ones too, for a picture."""

    low: Tensor  # (B,) float64, where each bin begins; it ends where the next begins
    count: Tensor  # (B,) int64
    confidence: Tensor  # (B,) float64, mean of the bin; NaN where it is empty
    accuracy: Tensor  # (B,) float64, NaN likewise


@torch.no_grad()
def calibrate(
    image_embeddings: Tensor,
    classifier: Tensor,
    labels: Tensor,
    scale: float,
    *,
    block_size: int | None = None,
) -> CalibrationOutcomes:
    """Softmax over the classes of scale times cosine similarity.

    A bias, which SigLIP adds to every logit, cancels out.

    Args:
        image_embeddings: (N, D)
        classifier: (C, D), from `build_classifier`
        labels: (N,) int64, in [0, C)
        scale: the model's own, the exponential of its `log_scale`
        block_size: images at a time.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}; a finite number above 0 is needed")
    correct = classify(image_embeddings, classifier, labels, block_size=block_size).top1
    images, classes = ties.unit(image_embeddings, "image"), ties.unit(classifier, "class")
    confidence = torch.empty(len(images), dtype=torch.float64)
    for start, scores in ties.score_blocks(images, classes, block_size):
        logits = scores.double() * scale
        highest = logits.amax(dim=1) - logits.logsumexp(dim=1)
        confidence[start : start + len(scores)] = highest.exp().cpu()
    return CalibrationOutcomes(confidence=confidence, correct=correct)


def reliability(outcomes: CalibrationOutcomes, *, num_bins: int = 15) -> ReliabilityCurve:
    """How often the model is right where it is about so sure."""
    which = _bins(outcomes, num_bins)
    count = torch.bincount(which, minlength=num_bins)
    return ReliabilityCurve(
        low=torch.arange(num_bins).double() / num_bins,
        count=count,
        confidence=torch.bincount(which, outcomes.confidence, num_bins) / count,
        accuracy=torch.bincount(which, outcomes.correct, num_bins) / count,
    )


def calibration_metrics(outcomes: CalibrationOutcomes, *, num_bins: int = 15) -> dict[str, Metric]:
    """Returns ece and ece_plugin, the mean over images of how far their bin is from the diagonal.

    `ece_plugin` is the formula as the field writes it (Guo et al., "On Calibration of Modern Neural
    Networks", 2017). It is never below the truth on average: a perfectly calibrated model shows
    0.08 on 200 images, because no bin is right exactly as often as it should be. `ece` is the
    calibration error that would make the plug-in value what it is, half of the time above and half
    below; its interval is that of the true error, and the two agree as images grow many. Chance is
    0: who gives all classes the same probability is right exactly as often as that.
    """
    n = len(outcomes.confidence)
    if not n:
        raise ValueError("there is no row to average over")
    value, interval, plugin = _calibration_error(outcomes, num_bins)
    return {
        "ece": Metric(value, interval, n, 0.0, best=0.0),
        "ece_plugin": Metric(plugin, None, n, 0.0, best=0.0),
    }


def _calibration_error(
    outcomes: CalibrationOutcomes, num_bins: int
) -> tuple[float, Interval, float]:
    """Returns the error that explains the plug-in value, the interval of it, and the plug-in value.

    The plug-in value is a sum of absolute values of nearly normal gaps, one a bin, so its mean and
    variance are known for any true gaps. Truths of one shape and growing size are asked whether
    they could have shown what was seen (a test, inverted). The shape is not known: in that of the
    gaps seen, noise passes for error spread over all bins, which is right for the upper end; with
    the noise taken off, the error is in the few bins that stand out, which is right for the lower.
    """
    n = len(outcomes.confidence)
    which = _bins(outcomes, num_bins)
    residuals = outcomes.correct - outcomes.confidence
    gaps = torch.bincount(which, residuals, num_bins) / n
    plugin = float(gaps.abs().sum())
    if n < 2:
        return plugin, Interval(0.0, 1.0), plugin
    squares = torch.bincount(which, residuals.square(), num_bins) / n
    variances = (squares - gaps.square()).clamp(min=0) / (n - 1)
    if float(variances.sum()) < 1e-24:  # rounding alone: nothing here is random
        return plugin, Interval(plugin, plugin), plugin
    noise = variances.sqrt().tolist()
    # An eighth more noise than was seen: in simulations the upper end was else a little low.
    spread = (gaps.square() + variances / 8).sqrt().tolist()
    few = (gaps.square() - 3 * variances).clamp(min=0).sqrt().tolist()
    if not sum(few):
        few = [gap if gap == max(spread) else 0.0 for gap in spread]
    quantile = student_quantile(n - 1)
    value = _size_that_shows(plugin, spread, noise, 0.0, n)
    ends = [
        _size_that_shows(plugin, shape, noise, at, n)
        for shape in (spread, few)
        for at in (quantile, -quantile)
    ]
    return value, Interval(min(value, *ends), max(value, *ends)), plugin


def _size_that_shows(
    plugin: float, shape: list[float], noise: list[float], deviation: float, n: int
) -> float:
    """Returns how large gaps of a shape are that show the plug-in value at so many deviations.

    Args:
        plugin: what was seen
        shape: gaps of the bins, of which only the proportions matter
        noise: standard error of each gap
        deviation: standard deviations from the mean of what is shown up to what was seen
        n: rows, for the covariance of the bins.
    """
    total = sum(shape)
    low, high = 0.0, 1.0
    if not total:
        return plugin
    if _deviation(plugin, [0.0] * len(shape), noise, n) <= deviation:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if _deviation(plugin, [gap * middle / total for gap in shape], noise, n) > deviation:
            low = middle
        else:
            high = middle
    return high


def _deviation(plugin: float, gaps: list[float], noise: list[float], n: int) -> float:
    mean, variance, signed, squares = 0.0, 0.0, 0.0, 0.0
    for gap, error in zip(gaps, noise, strict=True):
        # Mean and variance of the absolute value of a normal, and how surely its sign is right.
        ratio = gap / error if error else math.inf
        sure = math.erf(ratio / math.sqrt(2)) if gap else 0.0
        folded = (
            error * math.sqrt(2 / math.pi) * math.exp(-(min(ratio, 40.0) ** 2) / 2) + gap * sure
        )
        mean += folded
        variance += max(0.0, gap * gap + error * error - folded * folded)
        signed += gap * sure
        squares += (gap * sure) ** 2
    # A row is in one bin only, so the bins are slightly against each other.
    variance -= (signed * signed - squares) / n
    return (plugin - mean) / math.sqrt(max(variance, 1e-30))


def _bins(outcomes: CalibrationOutcomes, num_bins: int) -> Tensor:
    # Open on the left: a confidence of exactly 0.2 is in the bin that ends there.
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    return (torch.bucketize(outcomes.confidence, edges) - 1).clamp(0, num_bins - 1)
