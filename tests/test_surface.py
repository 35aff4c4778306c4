"""The names promised to users: a change here is a change of the promise."""

import inspect
from importlib import import_module

import pytest

import clipkit
from clipkit.cli import COMMANDS

PROMISED = {
    "clipkit": ["load", "build", "__version__"],
    "clipkit.losses": ["InfoNCELoss", "SigLIPLoss"],
    "clipkit.heads": ["LinearHead", "MLPHead"],
    "clipkit.encoders": [
        *("ImageEncoder", "TextEncoder", "TimmImageEncoder", "TextTransformer", "BagOfTokens"),
        *("HuggingFaceTextEncoder", "ConvNet"),
    ],
    "clipkit.data": [
        *("PairDataModule", "HuggingFacePairs", "ShapesPairs", "MixedPairs", "PairSource"),
        *("Filters", "Augmentation"),
    ],
    "clipkit.callbacks": [
        *("ZeroShotClassification", "ZeroShotRetrieval", "LinearProbe", "NearestNeighbours"),
        "EvaluationPictures",
    ],
    "clipkit.interop": ["open_model", "EmbeddingModel"],
    "clipkit.temperature": ["Temperature"],
    "clipkit.tokenizer": ["Tokenizer"],
    "clipkit.module": ["CLIPModule"],
    "clipkit.suite": ["EvalData"],
}


@pytest.mark.parametrize("module", PROMISED)
def test_names(module):
    found = import_module(module)
    assert [name for name in PROMISED[module] if not hasattr(found, name)] == []


def test_commands():
    assert set(COMMANDS) == {
        *("fit", "validate", "test", "check", "benchmark", "compare", "sweep"),
        *("tokenizer", "recipes", "sync"),
    }


def arguments(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_arguments():
    from clipkit.callbacks import ZeroShotClassification, ZeroShotRetrieval
    from clipkit.data import HuggingFacePairs
    from clipkit.module import CLIPModule

    data = arguments(HuggingFacePairs)
    for name in ("dataset", "image_column", "caption_column", "batch_size", "num_workers"):
        assert name in data
    assert "image_size" in data
    for callback in (ZeroShotClassification, ZeroShotRetrieval):
        assert arguments(callback)[0] == "datasets"
    for verb in ("encode_image", "encode_text", "embed_images", "embed_texts", "scale"):
        assert hasattr(CLIPModule, verb)
    assert arguments(clipkit.build) == ["configs", "overrides"]
    assert arguments(clipkit.load) == ["path", "trust"]
