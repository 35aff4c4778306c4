"""open_clip's models: what the adapter gives is what open_clip itself gives."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from clipkit.errors import UserError
from clipkit.interop import EmbeddingModel, open_model
from tests.interop.conftest import OPEN_CLIP, TEXTS, VIT

open_clip = pytest.importorskip("open_clip", reason="needs the extra peers")

TRIMMED = {"vit", "resnet", "custom_text", "end_token"}


@pytest.mark.parametrize("kind", OPEN_CLIP)
def test_embeddings_are_open_clips_own(kind, open_clip_folder, images):
    folder = open_clip_folder(kind)
    opened = open_model(str(folder))
    model, _, transform = open_clip.create_model_and_transforms(
        f"local-dir:{folder}", pretrained_text=False
    )
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        image = F.normalize(model.encode_image(torch.stack([transform(i) for i in images])), dim=-1)
        text = F.normalize(model.encode_text(tokenizer(TEXTS)), dim=-1)
        lone = [F.normalize(model.encode_text(tokenizer([text])), dim=-1) for text in TEXTS]

    torch.testing.assert_close(opened.model.embed_images(images), image, atol=1e-5, rtol=0)
    torch.testing.assert_close(opened.model.embed_texts(TEXTS), text, atol=1e-5, rtol=0)
    torch.testing.assert_close(opened.model.embed_texts(TEXTS), torch.cat(lone), atol=1e-5, rtol=0)
    # Texts whose longest is short, so that the tables are really cut.
    short = TEXTS[:1] + TEXTS[3:6]
    expected = text[[0, 3, 4, 5]]
    torch.testing.assert_close(opened.model.embed_texts(short), expected, atol=1e-5, rtol=0)
    assert isinstance(opened.model, EmbeddingModel)
    assert opened.model.trims == (kind in TRIMMED)
    assert opened.name == kind
    assert opened.embed_dim == OPEN_CLIP[kind]["embed_dim"]
    assert opened.scale == pytest.approx(model.logit_scale.exp().item())


def test_short_texts_take_less_work(open_clip_folder):
    """Seen by the tower itself: a caption of two words is no longer 77 tokens."""
    opened = open_model(str(open_clip_folder("vit")))
    lengths = []
    block = opened.model.model.transformer.resblocks[0]
    block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    opened.model.embed_texts(["a dog", "a photo of a dog"])
    assert lengths == [7]


def test_many_texts_come_back_in_their_order(open_clip_folder, monkeypatch):
    opened = open_model(str(open_clip_folder("vit")))
    texts = [" ".join(["dog"] * (index * 7 % 11)) for index in range(23)]
    together = opened.model.embed_texts(texts)
    monkeypatch.setattr("clipkit.interop.base.TEXTS_AT_ONCE", 4)
    torch.testing.assert_close(opened.model.embed_texts(texts), together, atol=1e-6, rtol=0)
    one_by_one = torch.cat([opened.model.embed_texts([text]) for text in texts])
    torch.testing.assert_close(one_by_one, together, atol=1e-6, rtol=0)


def test_nothing_to_embed(open_clip_folder):
    model = open_model(str(open_clip_folder("vit"))).model
    assert model.embed_texts([]).shape == (0, 16)
    assert model.embed_images([]).shape == (0, 16)


def test_the_prefix_and_the_bare_folder_are_the_same(open_clip_folder):
    folder = open_clip_folder("vit")
    bare, prefixed = open_model(str(folder)), open_model(f"open_clip:{folder}")
    assert bare.weights == prefixed.weights


@pytest.fixture
def tiny_name(tmp_path):
    """A model under a name of its own in open_clip's registry, as add_model_config makes them."""
    config = {**OPEN_CLIP["vit"], "vision_cfg": VIT}
    (tmp_path / "tiny-model.json").write_text(json.dumps(config))
    paths = list(open_clip.factory._MODEL_CONFIG_PATHS)
    open_clip.add_model_config(tmp_path / "tiny-model.json")
    yield "tiny-model"
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths
    open_clip.factory._rescan_model_configs()


def test_a_name_without_a_tag_is_random_and_the_same_every_time(tiny_name, caplog):
    first, second = open_model(f"open_clip:{tiny_name}"), open_model("open_clip:TINY-model")
    assert first.weights == second.weights
    assert "weights are random" in caplog.text
    assert "No pretrained weights" not in caplog.text  # open_clip's own words


def test_drawing_weights_leaves_the_random_state_alone(tiny_name):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    open_model(f"open_clip:{tiny_name}")
    assert torch.equal(torch.rand(3), expected)


def test_a_local_file_of_weights(tiny_name, open_clip_folder, tmp_path, images):
    folder = open_clip_folder("vit")
    weights = load_file(folder / "open_clip_model.safetensors")
    torch.save({"epoch": 1, "name": "run", "state_dict": weights}, tmp_path / "epoch_1.pt")
    opened = open_model(f"open_clip:{tiny_name}/{tmp_path}/epoch_1.pt")
    folder_opened = open_model(str(folder))
    assert opened.name == "tiny-model/epoch_1.pt"
    assert opened.weights == folder_opened.weights
    assert opened.preprocess == folder_opened.preprocess
    expected = folder_opened.model.embed_images(images)
    torch.testing.assert_close(opened.model.embed_images(images), expected)


@pytest.mark.filterwarnings("error")
def test_the_activation_is_the_tags(tiny_name, open_clip_folder, monkeypatch):
    """OpenAI's weights under a name without -quickgelu."""
    weights = str(open_clip_folder("vit") / "open_clip_model.safetensors")
    tags = {"quick": {"file": weights, "quick_gelu": True}, "plain": {"file": weights}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny_name, tags)
    quick, plain = (open_model(f"open_clip:{tiny_name}/{tag}") for tag in tags)
    activation = quick.model.model.transformer.resblocks[0].mlp.gelu
    assert type(activation).__name__ == "QuickGELU"
    assert type(plain.model.model.transformer.resblocks[0].mlp.gelu).__name__ == "GELU"
    assert quick.name == "tiny-model/quick"
    with pytest.raises(UserError, match=r"'quik' is neither a file nor a tag .*did you mean quick"):
        open_model(f"open_clip:{tiny_name}/quik")


def test_a_pickle_that_runs_code_is_refused(tiny_name, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="cannot open it"):
        open_model(f"open_clip:{tiny_name}/{tmp_path}/evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_that_wants_to_run_code_is_refused(open_clip_folder, tmp_path):
    """The configuration itself asks for the code in its folder to be trusted."""
    folder = tmp_path / "stranger"
    shutil.copytree(open_clip_folder("siglip"), folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    own = json.loads((folder / "tokenizer_config.json").read_text())
    own["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    own["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError, match=r"refused, text_cfg\.tokenizer_kwargs"):
        open_model(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("open_clip:ViT-B-33", "open_clip has no model 'ViT-B-33', did you mean ViT-B-32"),
        ("open_clip:ViT-B-32/openia", "'openia' is neither a file nor a tag of ViT-B-32, did you"),
        ("ViT-B-32/openai", "did you mean open_clip:ViT-B-32/openai?"),
        ("open_clip:quite another", "accepted are a folder with open_clip_config.json and names"),
    ],
)
def test_a_name_that_is_not_there(spec, expected):
    with pytest.raises(UserError) as error:
        open_model(spec)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_are_no_model(open_clip_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(open_clip_folder("vit"), folder)
    weights = folder / "open_clip_model.safetensors"
    tensors = load_file(weights)
    del tensors["text_projection"]
    save_file(tensors, weights)
    with pytest.raises(UserError, match="cannot open it"):
        open_model(str(folder))
    weights.unlink()
    with pytest.raises(UserError, match=r"has no weights; open_clip reads \.safetensors"):
        open_model(str(folder))
    (folder / "open_clip_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        open_model(str(folder))
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="no model_cfg"):
        open_model(str(folder))
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"the folder has no open_clip_config\.json"):
        open_model(f"open_clip:{folder}")
