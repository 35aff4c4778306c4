"""Zero-shot classification and retrieval inside training."""

from __future__ import annotations

from clipkit.callbacks.evaluation import Evaluation
from clipkit.callbacks.schedule import Schedule
from clipkit.suite import EvalData
from clipkit.suite.tasks import Retrieval, ZeroShot


class ZeroShotClassification(Evaluation):
    """Names what is in a picture from the names of the classes alone.

    Logs ``zeroshot/<set>/top1``, ``top5`` and ``mean_class_top1``, each with its 95 % interval.

    Args:
        datasets: what to evaluate on; the key names the set in its metrics.
        every_n_epochs: evaluate after every n-th epoch, the first and the last; left out, after
            every epoch, but where steps or samples are given.
        every_n_steps: evaluate after every n-th optimiser step.
        every_n_samples: evaluate each time so many further pairs were seen.
        max_time_ratio: leave an evaluation out where they would take more than this share of the
            time; before the first step and at the end is always.
    """

    def __init__(
        self,
        datasets: dict[str, EvalData],
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every_n_samples: int | None = None,
        max_time_ratio: float | None = None,
    ) -> None:
        schedule = Schedule(
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            every_n_samples=every_n_samples,
            max_time_ratio=max_time_ratio,
        )
        super().__init__(ZeroShot(), datasets, schedule)


class ZeroShotRetrieval(Evaluation):
    """Finds a picture's captions among all captions, and a caption's pictures among all pictures.

    Logs ``retrieval/<set>/image_to_text_r1`` and its like, each with its 95 % interval. Captions of
    equal words are one text, which belongs to all of their pictures.

    Args:
        datasets: what to evaluate on; the key names the set in its metrics.
        every_n_epochs: evaluate after every n-th epoch, the first and the last; left out, after
            every epoch, but where steps or samples are given.
        every_n_steps: evaluate after every n-th optimiser step.
        every_n_samples: evaluate each time so many further pairs were seen.
        max_time_ratio: leave an evaluation out where they would take more than this share of the
            time; before the first step and at the end is always.
    """

    def __init__(
        self,
        datasets: dict[str, EvalData],
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every_n_samples: int | None = None,
        max_time_ratio: float | None = None,
    ) -> None:
        schedule = Schedule(
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            every_n_samples=every_n_samples,
            max_time_ratio=max_time_ratio,
        )
        super().__init__(Retrieval(), datasets, schedule)
