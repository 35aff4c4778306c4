"""What every kind of evaluation is: rows and an embedder in, numbers and outcomes out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from clipkit.evaluation.prompts import Prompts
from clipkit.suite.embedder import Embedder
from clipkit.suite.opening import Opened, Splits
from clipkit.suite.outcomes import Measured
from clipkit.tracking.digests import digest_of_texts


class Task(ABC):
    """One kind of evaluation.

    Attributes:
        kind: first part of its metrics' names.
        measures: what can be its main metric, the usual one first; logged during training.
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

    def settings(self, splits: Splits) -> dict[str, Any]:
        """Return what decides the score besides the model and the rows, as plain values."""
        names, prompts = self.class_names(splits.test), self.prompts(splits.test)
        learned_from = {
            name: one.digest
            for name, one in splits._asdict().items()
            if name != "test" and one is not None
        }
        return {
            "arguments": dict(vars(self)),
            "class_names": digest_of_texts(names),
            "prompts": digest_of_texts(None if prompts is None else map(str, prompts.of_classes())),
            "learned_from": learned_from or None,
        }

    @abstractmethod
    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        """Evaluate on the test rows; the others are for what learns."""
