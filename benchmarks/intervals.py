"""How often the intervals hold the truth, and the claims alarm: simulated models of known accuracy.

python -m benchmarks.intervals [--repeats 1000] [proportions] [retrieval] [multilabel] ...

Everything is measured on the functions of `clipkit.evaluation` that every result goes through. Each
simulation says what its truth is. A share of 1,000 repeats is known to 1.4 points (95 %).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from clipkit.evaluation import (
    Interval,
    classify_multilabel,
    interval,
    multilabel_metrics,
    pairs_of,
    retrieve,
)
from clipkit.evaluation.calibration import CalibrationOutcomes, calibration_metrics
from clipkit.evaluation.comparison import configuration_difference, paired_difference
from clipkit.evaluation.statistics import mean_interval

RESULTS = Path(__file__).parent / "results"


def coverage(truth: float, intervals: Iterable[Interval]) -> float:
    """Return the share of intervals that hold the truth."""
    held = [found.low <= truth <= found.high for found in intervals]
    return round(sum(held) / len(held), 4)


def proportions(repeats: int) -> dict[str, Any]:
    """Exact: every number of hits among n, weighed by how often it comes up at each truth."""
    del repeats
    found = {}
    truths = [step / 1000 for step in range(20, 981)]
    for n in (50, 100, 200, 500, 1000):
        ends = [interval((torch.arange(n) < hits).double()) for hits in range(n + 1)]
        low, high = (torch.tensor(side, dtype=torch.float64) for side in zip(*ends, strict=True))
        hits = torch.arange(n + 1).double()
        ways = math.lgamma(n + 1) - torch.lgamma(hits + 1) - torch.lgamma(n - hits + 1)
        held = []
        for truth in truths:
            chance = (ways + hits * math.log(truth) + (n - hits) * math.log1p(-truth)).exp()
            held.append(float(chance[(low <= truth) & (truth <= high)].sum()))
        found[f"n={n}"] = {
            "mean": round(sum(held) / len(held), 4),
            "lowest": round(min(held), 4),
            "at_truth": truths[held.index(min(held))],
        }
    return {"truth": "the chance of a hit, 961 of them from 0.02 to 0.98", **found}


def draw_pairs(n: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return images (n, 32), five captions each, and the pairs; some images are harder."""
    images = torch.randn(n, 32, generator=generator)
    hard = noise * torch.exp(0.5 * torch.randn(n, 1, generator=generator))
    of_image = torch.arange(n).repeat_interleave(5)
    common = 0.7 * hard * torch.randn(n, 32, generator=generator)
    own = hard[of_image] * torch.randn(5 * n, 32, generator=generator)
    return images, (images + common)[of_image] + own, pairs_of(of_image)


def retrieval(repeats: int, sizes: Sequence[int] = (50, 200)) -> dict[str, Any]:
    """Real embeddings, ranked by `retrieve`; the gallery is drawn again with the queries."""
    rows = []
    for n in sizes:
        for noise in (0.6, 1.0, 1.5, 2.5, 4.0):
            generator = torch.Generator().manual_seed(0)
            runs = [retrieve(*draw_pairs(n, noise, generator)) for _ in range(repeats)]
            for direction in ("image_to_text", "text_to_image"):
                each = [getattr(run, direction) for run in runs]
                row: dict[str, Any] = {"n": n, "noise": noise, "direction": direction}
                for name in ("hit1", "hit5", "recall5", "rank"):
                    truth = float(torch.stack([getattr(of, name).mean() for of in each]).mean())
                    if name == "rank":
                        ends = [mean_interval(of.rank, of.groups, bounds=(1.0, n)) for of in each]
                    else:
                        ends = [interval(getattr(of, name), of.groups) for of in each]
                    row[name] = {"truth": round(truth, 4), "coverage": coverage(truth, ends)}
                rows.append(row)
    return {
        "truth": "the mean over all repeats: what an evaluation of this size gives on average",
        "summary": {
            f"n={n}, {kind}": {
                name: _summary([row[name]["coverage"] for row in some])
                for name in ("hit1", "hit5", "recall5", "rank")
            }
            for n in sizes
            for kind, some in (
                ("R@1 under 0.9", [r for r in rows if r["n"] == n and r["hit1"]["truth"] < 0.9]),
                # A handful of rows then decide the mean rank, or none is seen.
                ("R@1 above 0.9", [r for r in rows if r["n"] == n and r["hit1"]["truth"] >= 0.9]),
            )
        },
        "rows": rows,
    }


def draw_labels(
    n: int, prevalence: Tensor, signal: float, classes: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return images (n, D), each the sum of its classes and noise, and its classes (n, C)."""
    present = torch.rand(n, len(classes), generator=generator) < prevalence
    noise = torch.randn(n, classes.shape[1], generator=generator) / classes.shape[1] ** 0.5
    return signal * (present.float() @ classes) + noise, present


def multilabel(repeats: int, sizes: Sequence[int] = (50, 200, 1000)) -> dict[str, Any]:
    """Ten classes of 3 to 10 % or 10 to 40 % of the images, weakly to clearly separated."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.nn.functional.normalize(torch.randn(10, 32, generator=generator), dim=1)
    rows = []
    for n in sizes:
        for rare, frequent in ((0.03, 0.1), (0.1, 0.4)):
            for signal in (0.3, 0.8):
                prevalence = torch.linspace(rare, frequent, 10)
                runs = []
                for repeat in range(repeats):
                    images, present = draw_labels(n, prevalence, signal, classes, generator)
                    outcomes = classify_multilabel(images, classes, present, seed=repeat)
                    runs.append(multilabel_metrics(outcomes))
                images, present = draw_labels(100_000, prevalence, signal, classes, generator)
                many = multilabel_metrics(classify_multilabel(images, classes, present))
                row: dict[str, Any] = {"n": n, "prevalence": [rare, frequent], "signal": signal}
                for name in ("map", "map_11point"):
                    truth = sum(run[name].value for run in runs) / repeats
                    ends = [run[name].interval or Interval(0.0, 0.0) for run in runs]
                    row[name] = {
                        "truth": round(truth, 4),
                        "coverage": coverage(truth, ends),
                        "value_of_100000": round(many[name].value, 4),
                        "coverage_of_that": coverage(many[name].value, ends),
                    }
                rows.append(row)
    return {
        "truth": "the mean over all repeats: what an evaluation of this size gives on average, "
        "which for few positives lies above the value of very many images",
        "summary": {
            f"n={n}": {
                name: _summary([row[name]["coverage"] for row in rows if row["n"] == n])
                for name in ("map", "map_11point")
            }
            for n in sizes
        },
        "rows": rows,
    }


# Confidence: the two parameters of a beta distribution stretched to [0.1, 1]. Accuracy: of it.
CALIBRATIONS: dict[str, tuple[tuple[float, float], Callable[[Tensor], Tensor]]] = {
    "overconfident": ((4.0, 1.5), lambda sure: sure**1.3),
    "very overconfident": ((5.0, 1.0), lambda sure: 0.55 * sure),
    "underconfident": ((2.0, 3.0), lambda sure: sure**0.6),
    "3 points everywhere": ((3.0, 2.0), lambda sure: sure - 0.03),
    "1 point everywhere": ((3.0, 2.0), lambda sure: sure - 0.01),
    "over and under": ((2.0, 2.0), lambda sure: sure + 0.15 * torch.sin(6 * sure)),
    "only where sure": ((3.0, 0.4), lambda sure: sure - 0.05 * (sure > 0.8)),
    "in two bins only": ((2.0, 2.0), lambda sure: sure - 0.25 * ((sure > 0.6) & (sure < 0.72))),
    "perfect": ((3.0, 2.0), lambda sure: sure),
}


def draw_confidence(kind: str, n: int) -> Tensor:
    """Return confidences (n,) of one of CALIBRATIONS, by torch's global generator."""
    return 0.1 + 0.9 * torch.distributions.Beta(*CALIBRATIONS[kind][0]).sample((n,)).double()


def true_calibration_error(kind: str) -> float:
    """Return the error of 15 bins of a model of which everything is known."""
    sure = draw_confidence(kind, 2_000_000)
    known = CalibrationOutcomes(confidence=sure, correct=CALIBRATIONS[kind][1](sure))
    return calibration_metrics(known)["ece_plugin"].value


def calibration(repeats: int, sizes: Sequence[int] = (50, 200, 1000, 5000)) -> dict[str, Any]:
    """Models whose accuracy at each confidence is known."""
    torch.manual_seed(0)
    rows = []
    for kind, (_, accuracy) in CALIBRATIONS.items():
        truth = 0.0 if kind == "perfect" else true_calibration_error(kind)
        for n in sizes:
            found = []
            for _ in range(repeats):
                sure = draw_confidence(kind, n)
                right = (torch.rand(n) < accuracy(sure)).double()
                metrics = calibration_metrics(CalibrationOutcomes(confidence=sure, correct=right))
                found.append((metrics["ece"], metrics["ece_plugin"].value))
            ends = [metric.interval or Interval(0.0, 0.0) for metric, _ in found]
            rows.append(
                {
                    "model": kind,
                    "n": n,
                    "truth": round(truth, 4),
                    "coverage": coverage(truth, ends),
                    "mean_ece": round(sum(metric.value for metric, _ in found) / repeats, 4),
                    "mean_ece_plugin": round(sum(plugin for _, plugin in found) / repeats, 4),
                }
            )
    return {
        "truth": "the binned error of two million images whose chances are known",
        "summary": {
            f"n={n}": _summary([row["coverage"] for row in rows if row["n"] == n]) for n in sizes
        },
        "rows": rows,
    }


def draw_two_models(
    first: float, second: float, rows: int, groups: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return outcomes of two models (groups * rows,) of given accuracies that mostly agree.

    Both are right where a normal is low enough: of its variance, 0.6 is common to both (how hard
    the image is), 0.15 a model's own on the image and 0.25 its own on the row.
    """
    hard = math.sqrt(0.6) * torch.randn(groups, 1, generator=generator)
    outcomes = []
    for accuracy in (first, second):
        own = math.sqrt(0.15) * torch.randn(groups, 1, generator=generator)
        row = math.sqrt(0.25) * torch.randn(groups, rows, generator=generator)
        level = torch.special.ndtri(torch.tensor(accuracy))
        outcomes.append((hard + own + row < level).double().flatten())
    return outcomes[0], outcomes[1]


def checkpoint_claim(repeats: int) -> dict[str, Any]:
    """Pairs against unpaired intervals, with and without captions that share an image."""
    found: dict[str, Any] = {"truth": "the difference of the two accuracies drawn from"}
    for accuracy, rows, groups in (
        (0.6, 1, 1000), (0.9, 1, 1000), (0.4, 5, 1000), (0.6, 1, 200), (0.4, 5, 50),
    ):  # fmt: skip
        for gain in (0.0, 0.02):
            generator = torch.Generator().manual_seed(0)
            paired = unpaired = held = 0
            for repeat in range(repeats):
                first, second = draw_two_models(accuracy, accuracy + gain, rows, groups, generator)
                ids = torch.arange(groups).repeat_interleave(rows)
                claim = paired_difference(first, second, ids, samples=2000, seed=repeat)
                paired += claim.p < 0.05
                held += claim.interval.low <= gain <= claim.interval.high
                one, other = (mean_interval(of, ids) for of in (first, second))
                error = math.hypot(one.high - one.low, other.high - other.low) / 2
                unpaired += abs(float(second.mean() - first.mean())) > error
            found[f"accuracy {accuracy}, {groups} images x {rows}, {100 * gain:.0f} points"] = {
                "paired": round(paired / repeats, 4),
                "unpaired": round(unpaired / repeats, 4),
                "coverage": round(held / repeats, 4),
            }
    return found


def configuration_claim(repeats: int) -> dict[str, Any]:
    """2 x 5 seeds of equal truth on 1,000 images, seed noise twice the noise of the sample."""
    generator = torch.Generator().manual_seed(0)
    sample = math.sqrt(0.6 * 0.4 / 1000)
    welch = checkpoint = bootstrap = 0
    for repeat in range(repeats):
        images = torch.rand(1000, generator=generator)
        truths = 0.6 + 2 * sample * torch.randn(10, generator=generator)
        # The same images are easy for all models.
        draws = torch.rand(10, 1000, generator=generator)
        outcomes = ((0.5 * images + 0.5 * draws) < _triangular(truths).unsqueeze(1)).double()
        means = outcomes.mean(dim=1).tolist()
        claim = configuration_difference(means[:5], means[5:])
        welch += claim is not None and claim.p < 0.05
        one = paired_difference(outcomes[0], outcomes[5], samples=2000, seed=repeat)
        checkpoint += one.p < 0.05
        sides = torch.tensor(means).reshape(2, 5)
        redrawn = torch.randint(5, (2, 2000, 5), generator=generator)
        again = sides.unsqueeze(1).expand(2, 2000, 5).gather(2, redrawn).mean(dim=2)
        low, high = (again[1] - again[0]).quantile(torch.tensor([0.025, 0.975])).tolist()
        bootstrap += not low <= 0 <= high
    return {
        "truth": "no difference between the configurations",
        "welch": round(welch / repeats, 4),
        "checkpoint_test_of_the_first_seeds": round(checkpoint / repeats, 4),
        "bootstrap_of_the_five_seeds": round(bootstrap / repeats, 4),
    }


def _triangular(chance: Tensor) -> Tensor:
    # The level that half the sum of two uniform variables stays below with this chance, over 0.5.
    return 1 - ((1 - chance).clamp(0, 0.5) / 2).sqrt()


def _summary(shares: list[float]) -> dict[str, float]:
    return {
        "mean": round(sum(shares) / len(shares), 4),
        "lowest": min(shares),
        "highest": max(shares),
    }


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "proportions": proportions,
    "retrieval": retrieval,
    "multilabel": multilabel,
    "calibration": calibration,
    "checkpoint_claim": checkpoint_claim,
    "configuration_claim": configuration_claim,
}


def main() -> None:
    """Measure the parts named and write them into the day's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=1000)
    options = parser.parse_args()
    path = RESULTS / f"{date.today()}-intervals.json"
    result = json.loads(path.read_text()) if path.is_file() else {"schema": 1, "parts": {}}
    for name in options.parts:
        began = time.monotonic()
        found = PARTS[name](options.repeats)
        found |= {"repeats": options.repeats, "seconds": round(time.monotonic() - began, 1)}
        # The day's file gathers parts that were measured one by one.
        result |= {"machine": describe(), "parts": {**result["parts"], name: found}}
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        print(name, json.dumps({k: v for k, v in found.items() if k != "rows"}, indent=2))


if __name__ == "__main__":
    main()
