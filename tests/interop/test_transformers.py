"""transformers' models: what the adapter gives is what the library itself gives."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkit.errors import UserError
from clipkit.interop import EmbeddingModel, open_model
from tests.interop.conftest import TEXTS

transformers = pytest.importorskip("transformers", reason="needs the extra huggingface")


@pytest.fixture(params=["clip", "siglip"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, clip_folder, siglip_folder):
    return clip_folder if kind == "clip" else siglip_folder


def library_embeddings(kind, folder, images, texts):
    model = {"clip": transformers.CLIPModel, "siglip": transformers.SiglipModel}[kind]
    model = model.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        image = model.get_image_features(pixels).pooler_output
        if kind == "clip":
            inputs = tokenizer(
                texts, padding=True, truncation=True, max_length=77, return_tensors="pt"
            )
            text = model.get_text_features(
                inputs["input_ids"], attention_mask=inputs["attention_mask"]
            )
        else:
            inputs = tokenizer(
                texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt"
            )
            text = model.get_text_features(inputs["input_ids"])
    return image, text.pooler_output


def test_embeddings_are_the_librarys_own(kind, folder, images):
    opened = open_model(str(folder))
    image, text = library_embeddings(kind, folder, images, TEXTS)
    torch.testing.assert_close(opened.model.embed_images(images), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(opened.model.embed_texts(TEXTS), text, atol=1e-5, rtol=0)
    one_by_one = torch.cat([opened.model.embed_texts([text]) for text in TEXTS])
    torch.testing.assert_close(one_by_one, text, atol=1e-5, rtol=0)
    assert isinstance(opened.model, EmbeddingModel)
    assert opened.name == f"tiny-{kind}"
    assert opened.embed_dim == image.shape[1]
    assert opened.scale > 0
    assert opened.model.embed_texts([]).shape == (0, opened.embed_dim)
    assert opened.model.embed_images([]).shape == (0, opened.embed_dim)


def test_clip_leaves_its_padding_out_and_siglip_keeps_it(kind, folder):
    opened = open_model(f"transformers:{folder}")
    lengths = []
    block = opened.model.model.text_model.encoder.layers[0]
    block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    opened.model.embed_texts(["a dog", "a"])
    assert lengths == [6 if kind == "clip" else 64]


def test_siglip_lower_cases_as_its_tokenizer_does(siglip_folder):
    model = open_model(str(siglip_folder)).model
    upper, lower = model.embed_texts(["A BLUE dog", "a blue dog"])
    assert torch.equal(upper, lower)


def test_the_configuration_of_early_exports(clip_folder, tmp_path, images):
    """eos_token_id 2 means: pool at the largest id."""
    folder = tmp_path / "early"
    shutil.copytree(clip_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    _, text = library_embeddings("clip", folder, images, TEXTS)
    found = open_model(str(folder)).model.embed_texts(TEXTS)
    torch.testing.assert_close(found, text, atol=1e-5, rtol=0)


def test_half_precision_weights_compute_in_float32(clip_folder, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(clip_folder, folder)
    transformers.CLIPModel.from_pretrained(clip_folder).half().save_pretrained(folder)
    opened = open_model(str(folder))
    assert opened.model.embed_texts(["a dog"]).dtype == torch.float32
    assert {p.dtype for p in opened.model.model.parameters()} == {torch.float32}


def test_folders_that_are_no_model(clip_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip_folder, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no preprocessor_config\.json that transformers can read"):
        open_model(str(folder))
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 of the model's tensors, such as text_projection"):
        open_model(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its weights cannot be had"):
        open_model(str(folder))
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"model_type bert of config\.json is not accepted"):
        open_model(str(folder))
    with pytest.raises(UserError, match=r"config\.json cannot be had"):
        open_model("transformers:nobody/nothing")


def test_no_code_of_the_folder_is_run(clip_folder, tmp_path):
    folder = tmp_path / "stranger"
    shutil.copytree(clip_folder, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for file, auto_class in (
        ("config.json", "AutoConfig"),
        ("tokenizer_config.json", "AutoTokenizer"),
        ("preprocessor_config.json", "AutoImageProcessor"),
    ):
        settings = json.loads((folder / file).read_text())
        settings["auto_map"] = {auto_class: "evil.Evil"}
        (folder / file).write_text(json.dumps(settings))
    open_model(str(folder))  # by the library's own classes
    assert not (tmp_path / "ran").exists()
