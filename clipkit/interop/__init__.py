"""Anybody's model, opened by what a user types, behind `embed_images` and `embed_texts`."""

from clipkit.interop.base import EmbeddingModel, OpenedModel
from clipkit.interop.specs import open_model

__all__ = ["EmbeddingModel", "OpenedModel", "open_model"]
