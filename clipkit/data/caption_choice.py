"""Which caption of a picture a sample takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np

CaptionPolicy = Literal["random", "first", "longest", "all"]
Caption = TypeVar("Caption")


@dataclass(frozen=True)
class CaptionChoice:
    """What decides between the captions of a row.

    Args:
        policy: which of those of a column; with ``all`` each makes a pair.
        weights: (C,) of the columns that captions come from, by which one is drawn first; None
            where it is all one which column a caption comes from.
        draws: whether a column is drawn, or the likeliest taken.
    """

    policy: CaptionPolicy
    weights: tuple[float, ...] | None = None
    draws: bool = True

    def of_evaluation(self) -> CaptionChoice:
        """Return the same without chance."""
        return replace(
            self, policy="first" if self.policy == "random" else self.policy, draws=False
        )

    def of(
        self,
        captions: Sequence[Caption],
        counts: np.ndarray | None,
        *,
        length: Callable[[Caption], int],
        rng: np.random.Generator,
    ) -> Caption:
        """Return a caption of a row that has some.

        Args:
            captions: all of them.
            counts: (C,) how many of them each column gave, in turn, where columns have weights.
            length: of a caption.
            rng: of the sample.
        """
        if self.weights is not None and counts is not None:
            column = self._column(np.where(counts > 0, self.weights, 0.0), rng)
            start = int(counts[:column].sum())
            captions = captions[start : start + int(counts[column])]
        if self.policy == "random":
            return captions[int(rng.integers(len(captions)))]
        if self.policy == "longest":
            return max(captions, key=length)
        return captions[0]

    def _column(self, weights: np.ndarray, rng: np.random.Generator) -> int:
        if not self.draws:
            return int(weights.argmax())
        upto = weights.cumsum()
        # From the right: a column of weight 0 is never met, also where 0 is drawn.
        return int(upto.searchsorted(rng.random() * upto[-1], side="right"))
