"""Linear probes and nearest neighbours inside training: what the image side alone has learned."""

from __future__ import annotations

from clipkit.callbacks.evaluation import Evaluation
from clipkit.suite import EvalData, tasks


class LinearProbe(Evaluation):
    """Logistic regression on the image embeddings of each data set's training split.

    Logs ``probe/<set>/top1`` and ``mean_class_top1``, each with its 95 % interval.

    Args:
        datasets: what to evaluate on; the key names the set in its metrics.
        train_split: the split it learns from, a fifth of which chooses the penalty.
        every_n_epochs: evaluate after every n-th epoch, the first and the last; left out, after
            every epoch, but where steps or samples are given.
        every_n_steps: evaluate after every n-th optimiser step.
        every_n_samples: evaluate each time so many further pairs were seen.
        max_time_ratio: leave an evaluation out where they would take more than this share of the
            time; before the first step and at the end is always.
    """

    task = tasks.LinearProbe()

    def __init__(
        self,
        datasets: dict[str, EvalData],
        *,
        train_split: str = "train",
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every_n_samples: int | None = None,
        max_time_ratio: float | None = None,
    ) -> None:
        super().__init__(
            datasets,
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            every_n_samples=every_n_samples,
            max_time_ratio=max_time_ratio,
        )
        self.train_split = train_split


class NearestNeighbours(Evaluation):
    """The vote of the k nearest pictures of each data set's training split.

    Logs ``knn/<set>/top1`` and ``mean_class_top1``, each with its 95 % interval.

    Args:
        datasets: what to evaluate on; the key names the set in its metrics.
        k: how many pictures vote.
        train_split: the split that votes.
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
        k: int = 20,
        train_split: str = "train",
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        every_n_samples: int | None = None,
        max_time_ratio: float | None = None,
    ) -> None:
        super().__init__(
            datasets,
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            every_n_samples=every_n_samples,
            max_time_ratio=max_time_ratio,
        )
        self.task = tasks.NearestNeighbours(k=k)
        self.train_split = train_split
