"""Pictures of what the model mixes up, for the run folder and every logger that takes pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from clipkit.callbacks.evaluation import evaluating, own_data
from clipkit.errors import UserError
from clipkit.evaluation.calibration import calibrate
from clipkit.evaluation.classification import classify
from clipkit.module import CLIPModule
from clipkit.suite import EvalData
from clipkit.suite.embedder import ModuleEmbedder
from clipkit.suite.eval_data import prompts_for
from clipkit.suite.opening import Opened, open_data
from clipkit.suite.pictures import (
    PAIRS_SHOWN,
    confusion_figure,
    most_confused,
    reliability_figure,
    similarity_figure,
)
from clipkit.suite.tasks import classifier_of
from clipkit.tracking import folder_of_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class EvaluationPictures(Callback):
    """Draws similarities of pairs, the most confused classes and the calibration.

    They lie in the run folder as ``pictures/<set>-<kind>-<step>.png`` and go to MLflow, TensorBoard
    and every logger with ``log_image``. A data set without captions has no similarities, one
    without classes neither confusions nor calibration.

    Args:
        datasets: what to draw; the key is in the names of the pictures.
        every_n_epochs: draw after every n-th epoch and the last.
    """

    def __init__(self, datasets: dict[str, EvalData], *, every_n_epochs: int = 1) -> None:
        if every_n_epochs < 1:
            raise UserError(f"every_n_epochs: {every_n_epochs} is less than 1")
        self.datasets = datasets
        self.every_n_epochs = every_n_epochs
        self._opened: dict[str, Opened] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        own = own_data(trainer)
        for name, data in self.datasets.items():
            try:
                self._opened.setdefault(name, open_data(data, own))
            except UserError as error:
                raise UserError(f"EvaluationPictures.datasets.{name}: {error}") from error

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        due = epoch % self.every_n_epochs == 0 or epoch == trainer.max_epochs
        if trainer.sanity_checking or trainer.state.fn != "fit" or not due:
            return
        assert isinstance(pl_module, CLIPModule)
        for name, opened in self._opened.items():
            with evaluating(trainer, pl_module):
                figures = _figures(ModuleEmbedder(pl_module), opened)
            self._keep(trainer, name, figures)

    @rank_zero_only
    def _keep(self, trainer: L.Trainer, name: str, figures: dict[str, Figure]) -> None:
        folder = folder_of_run(trainer)
        step = trainer.global_step
        for kind, figure in figures.items():
            title = f"{name}-{kind}"
            if folder is not None:
                path = folder / "pictures" / f"{title}-{step:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path)
            for logger in trainer.loggers:
                _send(logger, title, figure, step)


def _send(logger: Logger, title: str, figure: Figure, step: int) -> None:
    """Hand a picture to a logger in its own way, if it takes any; MLflow gets what is in files."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        experiment.add_figure(title, figure, global_step=step, close=False)
    elif hasattr(logger, "log_image"):  # W&B and those made like it
        logger.log_image(title, [_pixels(figure)], step=step)


def _pixels(figure: Figure) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def _figures(embedder: ModuleEmbedder, opened: Opened) -> dict[str, Figure]:
    """Draw what the data set has captions and classes for."""
    data, rows = opened.data, opened.rows
    images = embedder.images(data, rows)
    figures: dict[str, Figure] = {}
    captioned = [(row, texts[0]) for row, texts in enumerate(rows.all_captions()) if texts]
    if captioned:
        # Spread over the set: neighbours are often of one class.
        places = np.linspace(0, len(captioned) - 1, min(PAIRS_SHOWN, len(captioned))).astype(int)
        shown, captions = zip(*(captioned[place] for place in places), strict=True)
        texts = embedder.texts(captions)
        figures["similarity"] = similarity_figure(images[list(shown)], texts, captions)
    try:
        classes = opened.classes
    except UserError:
        return figures
    labels = torch.from_numpy(classes.labels)
    classifier = classifier_of(embedder, prompts_for(data, classes.names), len(classes.names))
    figures["confusions"] = confusion_figure(
        most_confused(classify(images, classifier, labels)), classes.names
    )
    assert embedder.scale is not None
    found = calibrate(images, classifier, labels, scale=embedder.scale)
    figures["calibration"] = reliability_figure(found)
    return figures
