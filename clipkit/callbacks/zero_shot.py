"""Zero-shot classification and retrieval inside training."""

from __future__ import annotations

from clipkit.callbacks.evaluation import Evaluation
from clipkit.suite.tasks import Retrieval, ZeroShot


class ZeroShotClassification(Evaluation):
    """Names what is in a picture from the names of the classes alone.

    Logs ``zeroshot/<set>/top1``, ``top5`` and ``mean_class_top1``, each with its 95 % interval.
    """

    task = ZeroShot()


class ZeroShotRetrieval(Evaluation):
    """Finds a picture's captions among all captions, and a caption's pictures among all pictures.

    Logs ``retrieval/<set>/image_to_text_r1`` and its like, each with its 95 % interval. Captions of
    equal words are one text, which belongs to all of their pictures.
    """

    task = Retrieval()
