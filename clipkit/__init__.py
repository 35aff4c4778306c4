"""clipkit: a PyTorch Lightning experiment kit for CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning import LightningDataModule, Trainer

    from clipkit.module import CLIPModule

__version__ = "0.1.0"
__all__ = ["__version__", "build", "load"]


def load(path: str, *, trust: Sequence[str] = ()) -> CLIPModule:
    """Rebuild a model from its checkpoint alone: eval mode, on the CPU, no gradients.

    Args:
        path: a checkpoint written by ``clipkit fit``.
        trust: your own modules whose classes the checkpoint may name (``["my_code"]``).
    """
    from clipkit.building import load_model

    return load_model(path, trust=trust)


def build(
    *configs: str, overrides: Sequence[str] = ()
) -> tuple[CLIPModule, LightningDataModule, Trainer]:
    """Build what ``clipkit fit -c CONFIG ... --OVERRIDE ...`` would run.

    Args:
        configs: recipe names or YAML files, later ones win.
        overrides: ``key=value`` strings, such as ``"model.loss=SigLIPLoss"``.

    Returns:
        The module, the data module and the trainer.
    """
    from clipkit.building import build_run

    return build_run(configs, overrides)
