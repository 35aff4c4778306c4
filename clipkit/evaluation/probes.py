"""Linear probes: a multinomial logistic regression on frozen embeddings.

Embeddings are brought to unit norm first, as in CLIP_benchmark and ELEVATER, so that models of any
norm meet the same penalties; OpenAI fitted features of the norm they came with, hence its C of
0.316 on features of norm ten or so is about 0.03 as a penalty here.

The objective is the sum over the training images of the cross-entropy plus penalty / 2 times the
squared weights; the bias is free. That is scikit-learn's, whose C is 1 / penalty. A model that
embeds everything alike leaves the bias only: its probe names the most frequent class of the
training images, and that is chance. Ties are shared fairly (see `ties`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
from clipkit.evaluation.statistics import (
    SEED,
    Interval,
    class_mean_interval,
    student_quantile,
    wilson,
)

# Eight a decade from 1e-6 to 1e6: 96 steps, appendix A.3 of https://arxiv.org/abs/2103.00020
PENALTIES = tuple(10.0 ** (step / 8 - 6) for step in range(97))
FEW_SHOT_PENALTY = 10.0**-1.5

_MAX_ITERATIONS = 1000  # OpenAI's
_VALIDATION_RATIO = 0.2


class Labelled(NamedTuple):
    """Embeddings and their classes."""

    embeddings: Tensor  # (N, D)
    labels: Tensor  # (N,) int64, in [0, C)


@dataclass(frozen=True, eq=False, kw_only=True)
class Probe:
    """A fitted probe: scores of C classes from embeddings at unit norm.

    A class without a training image scores minus infinity.
    """

    weight: Tensor  # (C, D) float64
    bias: Tensor  # (C,) float64
    counts: Tensor  # (C,) int64, training images of each class
    penalty: float
    objective: float  # a training image
    iterations: int

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Returns scores (N, C) of embeddings (N, D), in float64."""
        return ties.similarities(ties.unit(embeddings, "image"), self.weight) + self.bias


class Tried(NamedTuple):
    """One penalty of a sweep, judged on the validation images."""

    penalty: float
    top1: float
    loss: float  # cross-entropy


@dataclass(frozen=True, eq=False, kw_only=True)
class ProbeOutcomes:
    """What a probe with the chosen penalty made of the test images."""

    test: ClassificationOutcomes
    penalty: float
    sweep: tuple[Tried, ...]  # by penalty; empty where none was needed


@dataclass(frozen=True, eq=False, kw_only=True)
class FewShotOutcomes:
    """What probes on k images a class made of the same test images, one a seed."""

    shots: int
    seeds: tuple[int, ...]
    runs: tuple[ClassificationOutcomes, ...]

    @property
    def top1(self) -> Tensor:
        """(N,) float64, the mean over the seeds."""
        return torch.stack([run.top1 for run in self.runs]).mean(dim=0)


@torch.no_grad()
def fit_probe(train: Labelled, *, num_classes: int, penalty: float) -> Probe:
    """Fits a probe by L-BFGS until it converges, on the device of the embeddings.

    In float64: penalties span twelve decades, and float32 stalls short of the optimum at both ends.

    Args:
        train: embeddings of any norm, and their classes
        num_classes: C
        penalty: 1 / C of scikit-learn.

    Raises:
        UserError: embeddings that are not finite, labels outside the classes, or no image.
    """
    if not penalty > 0:
        raise UserError(f"penalty is {penalty}; it must be more than 0")
    images = ties.unit(train.embeddings, "training").double()
    labels, counts = _counted(train, num_classes)
    if not len(images):
        raise UserError("a probe needs training images, and there is none")
    # The bias is free, so the same optimum is found from centred features; brought to a variance
    # of one, the first steps have about the right length.
    centre = images.mean(dim=0)
    features = images - centre
    size = float(features.square().mean().sqrt())
    size = size if size > ties.TIE_TOLERANCE else 1.0
    features /= size
    # Only classes with an image take part: the bias of any other falls without end.
    present = (counts > 0).nonzero().squeeze(1)
    column = torch.full((num_classes,), -1).scatter(0, present, torch.arange(len(present)))
    targets = column[labels].to(images.device)
    present = present.to(images.device)
    # Log frequencies: the answer where all images are alike.
    weight = features.new_zeros(len(present), images.shape[1])
    bias = counts.to(images.device)[present].to(features).log()
    bias -= bias.mean()
    objective, iterations = _minimise(features, targets, weight, bias, penalty / size**2)
    weight /= size
    bias -= weight @ centre
    return Probe(
        weight=weight.new_zeros(num_classes, images.shape[1]).index_copy_(0, present, weight),
        bias=bias.new_full((num_classes,), -torch.inf).index_copy_(0, present, bias),
        counts=counts,
        penalty=penalty,
        objective=objective,
        iterations=iterations,
    )


def linear_probe(
    train: Labelled,
    validation: Labelled | None,
    test: Labelled,
    *,
    num_classes: int,
    penalties: Sequence[float] = PENALTIES,
    seed: int = SEED,
) -> ProbeOutcomes:
    """Chooses a penalty on the validation images, fits train and validation, judges test.

    As OpenAI's: seven penalties evenly over the range first, then the steps between halved around
    the best, down to neighbours. The best has the highest top-1; the cross-entropy decides between
    equals.

    Args:
        train: (R, D) and classes
        validation: (V, D) and classes; without it, a fifth of each class of train is held out
        test: (N, D) and classes, looked at once
        num_classes: C
        penalties: in order; one alone needs no choice
        seed: draws what is held out.
    """
    if not penalties:
        raise UserError("penalties is an empty list; at least one is needed")
    if validation is None and len(penalties) > 1:
        train, validation = hold_out(train, _VALIDATION_RATIO, num_classes=num_classes, seed=seed)
    penalty, sweep = penalties[0], tuple[Tried, ...]()
    everything = train
    if validation is not None:
        everything = Labelled(*map(torch.cat, zip(train, validation, strict=True)))
        if len(penalties) > 1:
            penalty, sweep = _choose(train, validation, num_classes, penalties)
    probe = fit_probe(everything, num_classes=num_classes, penalty=penalty)
    return ProbeOutcomes(test=_judge(probe, test), penalty=penalty, sweep=sweep)


def probe_metrics(outcomes: ProbeOutcomes) -> dict[str, Metric]:
    """Returns the metrics of `classification_metrics` on the test images."""
    return classification_metrics(outcomes.test)


def few_shot_probe(
    train: Labelled,
    test: Labelled,
    *,
    num_classes: int,
    shots: int,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    penalty: float = FEW_SHOT_PENALTY,
) -> FewShotOutcomes:
    """Fits a probe to k images a class for each seed, and judges all of them on the test images.

    The penalty is fixed: a validation split would be further shots. By default it is OpenAI's C of
    0.316 at a norm of about ten, as features of its ViT-B/32 have.

    Args:
        train: what is drawn from
        test: (N, D) and classes
        num_classes: C
        shots: k; the same seed draws the same images, and k of them are among those of a larger k.
        seeds: one draw each
        penalty: as in `fit_probe`.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise UserError(f"seeds are {list(seeds)}; one or more are needed, each different")
    runs = []
    for seed in seeds:
        few = draw_shots(train, shots, num_classes=num_classes, seed=seed)
        runs.append(_judge(fit_probe(few, num_classes=num_classes, penalty=penalty), test))
    return FewShotOutcomes(shots=shots, seeds=tuple(seeds), runs=tuple(runs))


def few_shot_metrics(outcomes: FewShotOutcomes) -> dict[str, Metric]:
    """Returns the means over the seeds of `classification_metrics`.

    The interval is for another draw of the shots and another draw of the test images: variance
    between the seeds and between the images both count (a two-way random-effects analysis, what
    both hold taken off once), with Student's quantile at Satterthwaite's degrees of freedom. One
    seed alone says nothing of the spread of others, and has no interval.
    """
    runs = [classification_metrics(run) for run in outcomes.runs]
    labels = outcomes.runs[0].labels
    everything = torch.zeros_like(labels)
    metrics = {}
    for name, first in runs[0].items():
        mean = math.fsum(run[name].value for run in runs) / len(runs)
        values = torch.stack([_rows_of(name, run) for run in outcomes.runs])
        strata = labels if name.startswith("mean_class") else everything
        metrics[name] = first._replace(value=mean, interval=_two_way_interval(values, strata))
    return metrics


def per_seed(outcomes: FewShotOutcomes) -> dict[str, list[float]]:
    """Returns the value of each of `few_shot_metrics` for each seed, in their order."""
    runs = [classification_metrics(run) for run in outcomes.runs]
    return {name: [run[name].value for run in runs] for name in runs[0]}


def draw_shots(rows: Labelled, shots: int, *, num_classes: int, seed: int) -> Labelled:
    """Draws k images of each class, the same ones for the same labels and seed.

    Raises:
        UserError: a class has fewer images than are asked for.
    """
    if shots < 1:
        raise UserError(f"shots is {shots}; it must be at least 1")
    labels, counts = _counted(rows, num_classes)
    few = (counts < shots).nonzero().squeeze(1).tolist()
    if few:
        raise UserError(
            f"{len(few)} of {num_classes} classes have fewer than {shots} training images, "
            f"class {few[0]} has {int(counts[few[0]])}"
        )
    drawn, place = _shuffled_by_class(labels, counts, seed)
    return _those(rows, drawn[place < shots])


def hold_out(
    rows: Labelled, ratio: float, *, num_classes: int, seed: int = SEED
) -> tuple[Labelled, Labelled]:
    """Splits a share of each class off, drawn at random: what is left, and what is held out."""
    labels, counts = _counted(rows, num_classes)
    drawn, place = _shuffled_by_class(labels, counts, seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[drawn] = place < (counts[labels[drawn]] * ratio).round()
    if not held.any():
        raise UserError(
            f"no class of the {len(labels)} training images has enough of them to hold "
            f"{ratio:.0%} out for validation; give a validation split"
        )

    return _those(rows, (~held).nonzero().squeeze(1)), _those(rows, held.nonzero().squeeze(1))


def _counted(rows: Labelled, num_classes: int) -> tuple[Tensor, Tensor]:
    """Returns the labels and how many rows each class has, on the CPU."""
    name = "labels of the training images"
    labels = class_ids(rows.labels, len(rows.embeddings), num_classes, name).cpu()
    return labels, torch.bincount(labels, minlength=num_classes)


def _those(rows: Labelled, which: Tensor) -> Labelled:
    embeddings = rows.embeddings[which.to(rows.embeddings.device)]
    return Labelled(embeddings, rows.labels[which.to(rows.labels.device)])


def _shuffled_by_class(labels: Tensor, counts: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Returns all rows, class by class and shuffled in each, and the place of each in its class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows = order[labels[order].argsort(stable=True)]
    first = counts.cumsum(0) - counts
    return rows, torch.arange(len(rows)) - first[labels[rows]]


def _choose(
    train: Labelled, validation: Labelled, num_classes: int, penalties: Sequence[float]
) -> tuple[float, tuple[Tried, ...]]:
    """Returns the best penalty and all that were tried, in their order."""
    tried: dict[int, Tried] = {}
    last = len(penalties) - 1
    step = 2 ** max(0, math.ceil(math.log2(last / 6)))
    candidates = [*range(0, last, step), last]
    while True:
        for which in set(candidates) - set(tried):
            probe = fit_probe(train, num_classes=num_classes, penalty=penalties[which])
            tried[which] = _try(probe, validation)
        best = max(tried, key=lambda at: (tried[at].top1, -tried[at].loss, penalties[at]))
        if step == 1:
            return penalties[best], tuple(tried[at] for at in sorted(tried))
        step //= 2
        candidates = [at for at in (best - step, best + step) if 0 <= at <= last]


def _try(probe: Probe, validation: Labelled) -> Tried:
    top1 = float(_judge(probe, validation).top1.mean())
    labels = validation.labels.long()
    known = probe.counts[labels.cpu()] > 0
    loss, seen = 0.0, 0
    for start, scores in _score_blocks(probe, validation.embeddings):
        rows = slice(start, start + len(scores))
        own = labels[rows].to(scores.device)
        losses = F.cross_entropy(scores, own, reduction="none").cpu()[known[rows]]
        loss += float(losses.sum())
        seen += len(losses)
    return Tried(probe.penalty, top1, loss / max(1, seen))


def _judge(probe: Probe, test: Labelled) -> ClassificationOutcomes:
    num_classes = len(probe.counts)
    labels = class_ids(test.labels, len(test.embeddings), num_classes, "labels")
    return judge(_score_blocks(probe, test.embeddings), labels, probe.counts)


def _score_blocks(probe: Probe, embeddings: Tensor) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for block in torch.split(embeddings, _block_rows(len(probe.counts))):
        yield start, probe(block)
        start += len(block)


def _block_rows(num_classes: int) -> int:
    return max(1, 2**21 // max(1, num_classes))


def _minimise(
    features: Tensor,
    targets: Tensor,
    weight: Tensor,
    bias: Tensor,
    penalty: float,
) -> tuple[float, int]:
    """Minimises the objective a row in place; returns its value and the number of iterations."""
    rows, step = len(features), _block_rows(len(bias))
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        max_eval=2 * _MAX_ITERATIONS,
        tolerance_grad=1e-8,
        tolerance_change=1e-12,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        # The gradient is written down: it needs no graph, and no gradient mode of the caller's.
        loss = penalty / 2 * float(weight.square().sum())
        weight.grad = penalty / rows * weight
        bias.grad = torch.zeros_like(bias)
        for block, own in zip(torch.split(features, step), torch.split(targets, step), strict=True):
            log_share = (ties.similarities(block, weight) + bias).log_softmax(dim=1)
            loss -= float(log_share.gather(1, own.unsqueeze(1)).sum())
            residual = log_share.exp_()
            residual.scatter_add_(1, own.unsqueeze(1), residual.new_full((len(own), 1), -1.0))
            weight.grad += ties.similarities(residual.T, block.T) / rows
            bias.grad += residual.sum(dim=0) / rows
        return loss / rows

    optimiser.step(objective)  # type: ignore[no-untyped-call]
    return objective(), int(optimiser.state[weight]["n_iter"])


def _rows_of(metric: str, run: ClassificationOutcomes) -> Tensor:
    name = {"mean_class_top1": "top1", "tie_rate": "tied"}.get(metric, metric)
    values: Tensor = getattr(run, name)
    return values.double()


def _two_way_interval(values: Tensor, strata: Tensor) -> Interval | None:
    """Interval for the mean of values (S, N) in [0, 1] over seeds and rows.

    Args:
        values: (S, N)
        strata: (N,), each of which has the same share in the mean, whatever its number of rows.
    """
    num_seeds, num_rows = values.shape
    if num_seeds < 2:
        return None
    _, which, counts = torch.unique(strata, return_inverse=True, return_counts=True)
    weight = 1.0 / (counts.double() * len(counts))[which]  # (N,), sums to one
    seed_means = values @ weight
    mean = min(1.0, max(0.0, float(seed_means.mean())))
    row_means = values.mean(dim=0)
    centres = torch.bincount(which, row_means) / counts
    spread = mean * (1 - mean)
    # One row of the spread over all is mixed into each stratum, as in `class_mean_interval`.
    squares = torch.bincount(which, (row_means - centres[which]).square())
    of_rows = float(((squares + spread) / counts.square()).sum()) / len(counts) ** 2
    of_seeds = float(seed_means.var()) / num_seeds
    # What is left of each value beside its row and its seed stands in both of these.
    run_centres = torch.stack([torch.bincount(which, run) for run in values]) / counts
    rest = values - row_means - run_centres[:, which] + centres[which]
    common = float((rest.square().sum(dim=0) * weight.square()).sum())
    common /= num_seeds * (num_seeds - 1)
    variance = max(of_rows, of_seeds, of_rows + of_seeds - common)
    if spread == 0:
        return class_mean_interval(row_means, strata)
    freedom = variance**2 / (of_seeds**2 / (num_seeds - 1) + of_rows**2 / max(1, num_rows - 1))
    return wilson(mean, spread / variance, critical=student_quantile(freedom))
