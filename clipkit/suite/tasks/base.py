"""What every kind of evaluation is: rows and an embedder in, numbers and outcomes out."""

from __future__ import annotations

from abc import ABC, abstractmethod

from clipkit.evaluation.prompts import Prompts
from clipkit.suite.embedder import Embedder
from clipkit.suite.opening import Opened, Splits
from clipkit.suite.outcomes import Measured


class Task(ABC):
    """One kind of evaluation.

    Attributes:
        kind: first part of its metrics' names.
        measures: the metrics that are logged during training, the main one first.
    """

    kind: str
    measures: tuple[str, ...]

    def arrange(self, opened: Opened) -> Opened:
        """Return the rows as this evaluation counts them."""
        return opened

    def check(self, opened: Opened) -> None:
        """Refuse a data set that lacks what the evaluation needs."""
        self.texts(opened)

    def class_names(self, opened: Opened) -> list[str] | None:
        """Return the names of the classes, None for a task without any."""
        return None

    def prompts(self, opened: Opened) -> Prompts | None:
        """Return what classes are asked for by, None for a task that asks for none."""
        return None

    def texts(self, opened: Opened) -> list[str]:
        """Return the texts it will ask for: those of all tasks are embedded together."""
        prompts = self.prompts(opened)
        return [] if prompts is None else prompts.unique

    @abstractmethod
    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        """Evaluate on the test rows; the others are for what learns."""
