"""Towers: pixels or tokens in, one feature vector for each out."""

from clipkit.encoders.base import ImageEncoder, TextEncoder
from clipkit.encoders.convnet import ConvNet
from clipkit.encoders.huggingface import HuggingFaceTextEncoder
from clipkit.encoders.image import TimmImageEncoder
from clipkit.encoders.text import BagOfTokens, TextTransformer

__all__ = [
    "BagOfTokens",
    "ConvNet",
    "HuggingFaceTextEncoder",
    "ImageEncoder",
    "TextEncoder",
    "TextTransformer",
    "TimmImageEncoder",
]
