"""A picture finds its captions, a caption its pictures."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.evaluation import ties
from clipkit.evaluation.retrieval import retrieval_metrics, retrieve
from clipkit.suite.embedder import Embedder
from clipkit.suite.examples import choose
from clipkit.suite.opening import Opened, Splits
from clipkit.suite.outcomes import Measured, Outcome
from clipkit.suite.tasks.base import Task


class Retrieval(Task):
    """A picture finds its captions among all captions, a caption its pictures among all pictures.

    Args:
        merge_captions: captions of equal words are one text that belongs to several pictures; the
            field's suites count each of them by itself, so that they are wrong answers to one
            another.
    """

    kind = "retrieval"
    measures = tuple(
        f"{direction}_{measure}"
        for direction in ("text_to_image", "image_to_text")
        for measure in ("r1", "r5", "r10", "recall5", "mean_rank", "median_rank")
    )

    def __init__(self, *, merge_captions: bool = True) -> None:
        self.merge_captions = merge_captions

    def arrange(self, opened: Opened) -> Opened:
        # A picture that stands in several rows is one candidate with several captions.
        from clipkit.data.rows import group_by_picture

        return replace(opened, rows=group_by_picture(opened.rows))

    def check(self, opened: Opened) -> None:
        if not any(opened.rows.all_captions()):
            raise UserError("no caption column was found; name it with caption_column")

    def texts(self, opened: Opened) -> list[str]:
        return self._captions(opened)[0]

    def measure(self, embedder: Embedder, splits: Splits) -> Measured:
        test = splits.test
        captions, pairs = self._captions(test)
        images, texts = embedder.images(test.data, test.rows), embedder.texts(captions)
        found = retrieve(images, texts, pairs)
        outcomes = [
            Outcome(f"{direction}_r{k}", side.rows, side.groups, getattr(side, f"hit{k}"))
            for direction, side in (
                ("image_to_text", found.image_to_text),
                ("text_to_image", found.text_to_image),
            )
            for k in (1, 5, 10)
        ]
        unit = ties.normalise(texts)
        own = {row: captions[text] for row, text in reversed(pairs.tolist())}
        right = torch.zeros(len(images), dtype=torch.bool)
        right[found.image_to_text.rows] = found.image_to_text.strict_hit1

        def first_caption(row: int) -> str:
            scores = ties.similarities(ties.normalise(images[row : row + 1]), unit)
            return captions[int(scores.argmax())]

        examples = choose(right, lambda row: own.get(row, ""), first_caption)
        return Measured(retrieval_metrics(found), outcomes, examples=examples)

    def _captions(self, opened: Opened) -> tuple[list[str], Tensor]:
        """Return the texts and which belong to which picture, pairs (P, 2)."""
        index: dict[object, int] = {}
        texts: list[str] = []
        pairs: list[tuple[int, int]] = []
        for row, captions in enumerate(opened.rows.all_captions()):
            for place, caption in enumerate(captions):
                key = caption if self.merge_captions else (row, place)
                if key not in index:
                    index[key] = len(texts)
                    texts.append(caption)
                pairs.append((row, index[key]))
        return texts, torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
