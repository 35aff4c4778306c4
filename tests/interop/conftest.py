"""Tiny models with random weights, written as folders in the layouts of the libraries."""

import json
import os
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipkit.data.drawing import draw, sample

SENTENCE = (
    "a photo of the large red green blue circle square dog cat many words that make one caption "
    "rather longer than any other"
)
WORDS = SENTENCE.split()
TEXTS = [
    "a dog",
    "A photo of the large red circle, rather longer than any other caption",
    "",
    "many words that make one caption",
    "Blue",
    "a dog",
    " ".join(WORDS * 5),
]
VIT = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
WORDS_TEXT = {**TEXT, "vocab_size": 40, "context_length": 24, "hf_tokenizer_name": "words"}
OPEN_CLIP = {
    "vit": {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": TEXT},
    "resnet": {
        "embed_dim": 16,
        "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None},
        "text_cfg": TEXT,
    },
    "custom_text": {"embed_dim": 16, "custom_text": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "end_token": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": VIT,
        "text_cfg": {**WORDS_TEXT, "pool_type": "eos", "eos_id": 1},
    },
    "siglip": {
        "embed_dim": 64,
        "custom_text": True,
        "init_logit_bias": -10,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            **WORDS_TEXT,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    },
    "bert_text": {
        "embed_dim": 16,
        "vision_cfg": VIT,
        "text_cfg": {
            "hf_model_name": "bert",
            "hf_tokenizer_name": "words",
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
            "context_length": 24,
        },
    },
}
SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}


def word_tokenizer(*, lower_case=True):
    """A word a token, then the end token 1; padding is 0."""
    import tokenizers
    import transformers

    vocabulary = {
        word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS, "A", "Blue"])
    }
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    if lower_case:
        backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory):
    """`open_clip_folder("vit")` writes a model's folder once and returns it."""
    open_clip = pytest.importorskip("open_clip", reason="needs the extra peers")
    root = tmp_path_factory.mktemp("open_clip")

    def write(kind):
        folder = root / kind
        if folder.is_dir():
            return folder
        folder.mkdir()
        config = json.loads(json.dumps(OPEN_CLIP[kind]))
        if config["text_cfg"].get("hf_model_name"):
            config["text_cfg"]["hf_model_name"] = str(write_bert(folder / "bert"))
        preprocess = SQUASH if kind == "siglip" else {}
        written = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(written))
        if config["text_cfg"].get("hf_tokenizer_name"):
            word_tokenizer().save_pretrained(folder)
        torch.manual_seed(1)
        model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        return folder

    return write


def write_bert(folder):
    import transformers

    transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    ).save_pretrained(folder)  # fmt: skip
    return folder


TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PICTURE = {**TOWER, "image_size": 32, "patch_size": 8}


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIPModel as transformers saves it, with a byte-level vocabulary without merges."""
    transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")
    folder = tmp_path_factory.mktemp("transformers") / "tiny-clip"
    letters = [chr(code) for code in range(33, 127)]
    specials = ["<|startoftext|>", "<|endoftext|>"]
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), *specials]
    transformers.CLIPTokenizer(
        vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]
    ).save_pretrained(folder)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    end = len(symbols) - 1
    text = {**TOWER, "vocab_size": len(symbols), "max_position_embeddings": 77}
    torch.manual_seed(2)
    config = transformers.CLIPConfig(
        text_config={**text, "eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end},
        vision_config=PICTURE,
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    """A SiglipModel as transformers saves it, with a tokenizer that lower-cases."""
    transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")
    folder = tmp_path_factory.mktemp("transformers") / "tiny-siglip"
    word_tokenizer().save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    torch.manual_seed(3)
    config = transformers.SiglipConfig(
        text_config={**TOWER, "vocab_size": 40, "max_position_embeddings": 64},
        vision_config=PICTURE,
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images():
    """Five drawn pictures, not square."""
    pictures = [Image.fromarray(draw(sample(0, "test", index), 48)) for index in range(5)]
    return [picture.resize((48 + 4 * index, 40)) for index, picture in enumerate(pictures)]


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Writes a module of the user into the current folder: `code("name", "source")`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(source)

    assert os.getcwd() == str(tmp_path)
    return write
