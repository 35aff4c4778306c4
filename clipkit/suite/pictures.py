"""Pictures of an evaluation: which captions a picture is near to, which classes are confused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from clipkit.evaluation import ties
from clipkit.evaluation.calibration import CalibrationOutcomes, calibration_metrics, reliability
from clipkit.evaluation.classification import ClassificationOutcomes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS_SHOWN = 24
CONFUSIONS_SHOWN = 15
_TEXT_SHOWN = 28


class Confusion(NamedTuple):
    """How often pictures of one class were taken for another."""

    label: int
    predicted: int
    num_images: int
    share: float  # of the pictures of the class


def most_confused(
    outcomes: ClassificationOutcomes, limit: int = CONFUSIONS_SHOWN
) -> list[Confusion]:
    """Return the pairs of classes that were confused most often, the most frequent first."""
    num_classes = outcomes.num_classes
    cells = outcomes.labels * num_classes + outcomes.predicted
    counts = torch.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
    of_class = counts.sum(dim=1)
    counts.fill_diagonal_(0)
    order = counts.flatten().argsort(descending=True, stable=True)[:limit].tolist()
    found = []
    for cell in order:
        label, predicted = divmod(cell, num_classes)
        count = int(counts[label, predicted])
        if count:
            found.append(Confusion(label, predicted, count, count / int(of_class[label])))
    return found


def similarity_figure(images: Tensor, texts: Tensor, captions: Sequence[str]) -> Figure:
    """Draw the cosines of pictures and captions, pairs (B, D) on the diagonal."""
    cosines = ties.similarities(ties.normalise(images), ties.normalise(texts)).numpy()
    figure = _figure(6.4, 6.0)
    axes = figure.add_subplot()
    drawn = axes.imshow(cosines, cmap="viridis", interpolation="nearest")
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="cosine")
    axes.set_xticks(range(len(captions)), map(_short, captions), rotation=90, fontsize=6)
    axes.set_yticks(range(len(captions)), map(_short, captions), fontsize=6)
    axes.set_xlabel("caption")
    axes.set_ylabel("picture of")
    return figure


def confusion_figure(confused: Sequence[Confusion], names: Sequence[str]) -> Figure:
    """Draw the pairs of classes that are confused most often, as bars."""
    figure = _figure(6.4, 1.2 + 0.28 * max(len(confused), 1))
    axes = figure.add_subplot()
    places = range(len(confused))
    axes.barh(places, [100 * one.share for one in confused], color="#4878a8")
    labels = [f"{_short(names[c.label])} → {_short(names[c.predicted])}" for c in confused]
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("per cent of the pictures of the class")
    for place, one in zip(places, confused, strict=True):
        axes.annotate(f" {one.num_images}", (100 * one.share, place), va="center", fontsize=7)
    return figure


def reliability_figure(outcomes: CalibrationOutcomes) -> Figure:
    """Draw how often the model is right against how sure it is, and how often it is that sure."""
    curve = reliability(outcomes)
    low, count = curve.low.numpy(), curve.count.numpy()
    confidence, accuracy = curve.confidence.numpy(), curve.accuracy.numpy()
    filled = count > 0
    width = 1 / len(low)
    figure = _figure(4.8, 4.8)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--")
    upper.bar(
        low[filled], accuracy[filled], width, align="edge",
        color="#4878a8", edgecolor="white",
    )  # fmt: skip
    upper.plot(confidence[filled], accuracy[filled], "o", color="#c44e52", markersize=3)
    error = calibration_metrics(outcomes)["ece"].value
    upper.set_title(f"expected calibration error {100 * error:.1f} %", fontsize=9)
    upper.set_ylabel("right")
    upper.set_ylim(0, 1)
    lower.bar(low, count, width, align="edge", color="#999999", edgecolor="white")
    lower.set_ylabel("pictures")
    lower.set_xlabel("probability of the class that scores highest")
    lower.set_xlim(0, 1)
    return figure


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it keeps every figure and picks a window system.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_SHOWN else f"{text[: _TEXT_SHOWN - 1]}…"
