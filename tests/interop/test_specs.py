"""What a user types: checkpoints, code of one's own, digests, and what is none of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import clipkit
from clipkit.errors import UserError
from clipkit.interop import EmbeddingModel, open_model

BUILD = """
import torch

class Means:
    def __init__(self):
        self.shift = 0.5

    def embed_images(self, images):
        return torch.stack([torch.tensor(image.resize((1, 1)).getpixel((0, 0))) for image in images]
            ).double() / 255 + self.shift

    def embed_texts(self, texts):
        return torch.tensor([[len(t), t.count("a"), self.shift] for t in texts])

def build():
    return Means()

class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 4)
        self.scale = torch.tensor(7.0)

    def embed_images(self, images):
        assert not self.training
        return self.layer(torch.rand(len(images), 3))

    def embed_texts(self, texts):
        return self.layer(torch.ones(len(texts), 3))

ready = Means()
number = 3

class OneVerb:
    def embed_images(self, images):
        return torch.ones(len(images), 2)

class Flat(Means):
    def embed_texts(self, texts):
        return torch.ones(3)

class Counts(Means):
    def embed_texts(self, texts):
        return torch.ones(len(texts), 3, dtype=torch.int64)

class Wide(Means):
    def embed_texts(self, texts):
        return torch.ones(len(texts), 5)

class Broken(Means):
    def embed_texts(self, texts):
        raise RuntimeError("no tower" + chr(10) + "at all")

class Arrays(Means):
    def embed_texts(self, texts):
        return super().embed_texts(texts).numpy()

def fails():
    raise KeyError("weights")
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of drawn weights, saved as a fit would."""
    folder = tmp_path_factory.mktemp("run") / "my_run" / "checkpoints"
    folder.mkdir(parents=True)
    tiny = folder.parent.parent / "tiny.yaml"
    from tests.conftest import TINY

    tiny.write_text(TINY)
    module, _, trainer = clipkit.build(
        "base", str(tiny), overrides=["trainer.logger=false", "data.dataset=nothing"]
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_a_checkpoint(checkpoint, images):
    opened = open_model(str(checkpoint))
    module = clipkit.load(str(checkpoint))
    texts = ["a red circle", "blue", "a much longer caption than these"]
    torch.testing.assert_close(opened.model.embed_texts(texts), module.embed_texts(texts))
    torch.testing.assert_close(opened.model.embed_images(images), module.embed_images(images))
    assert isinstance(opened.model, EmbeddingModel)
    assert opened.name == "my_run/last"
    assert opened.embed_dim == 16
    assert opened.scale == pytest.approx(float(module.scale))
    digests = (opened.weights, opened.tokenizer, opened.preprocess)
    assert all(len(digest) == 64 for digest in digests)


def test_texts_of_every_length_come_back_in_their_order(checkpoint):
    module = clipkit.load(str(checkpoint))
    texts = [" ".join(["dog"] * (index * 7 % 11)) for index in range(23)]
    expected = torch.cat([module.encode_text(module.tokenizer([text])) for text in texts])
    for batch_size in (1, 4, 256):
        found = module.embed_texts(texts, batch_size=batch_size)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert module.embed_texts([]).shape == (0, 16)
    assert module.embed_texts("a dog").shape == (1, 16)


def test_a_padding_that_is_the_end_token(checkpoint):
    """As in CLIP's tokenizer on the hub: the first of the closing run is a token."""
    from dataclasses import replace

    module = clipkit.load(str(checkpoint))
    texts = ["a dog", "blue", "a dog and a dog"]
    expected = module.embed_texts(texts)
    contract = module.tokenizer.contract
    module.tokenizer.contract = replace(contract, pad_id=contract.end_id)
    torch.testing.assert_close(module.embed_texts(texts), expected, atol=1e-6, rtol=0)


def test_code_of_ones_own(code, images):
    code("means_a", BUILD)
    opened = open_model("means_a:build")
    found = opened.model.embed_images(images)
    assert (found.shape, found.dtype) == ((5, 3), torch.float32)
    assert opened.model.embed_texts(["a", "banana"]).tolist() == [[1, 1, 0.5], [6, 3, 0.5]]
    assert (opened.name, opened.scale, opened.tokenizer, opened.preprocess, opened.embed_dim) == (
        "means_a:build", None, None, None, 3,
    )  # fmt: skip
    same = {open_model(f"means_a:{name}").weights for name in ("Means", "ready", "Arrays")}
    assert same == {opened.weights}
    sys.modules["means_a"].ready.shift = 0.25
    assert open_model("means_a:ready").weights != opened.weights


def test_a_module_of_ones_own(code):
    code("means_b", BUILD)
    opened = open_model("means_b:Module")
    assert opened.scale == 7
    assert not opened.model.embed_texts(["a"]).requires_grad
    assert opened.weights == open_model("means_b:Module").weights


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("OneVerb", "what it returns (OneVerb) has no embed_texts"),
        ("Flat", "embed_texts gives float32 (3,) for a list of 2, expected are floating-point"),
        ("Counts", "embed_texts gives int64 (2, 3) for a list of 2, expected are floating-point"),
        ("Wide", "embed_images gives 3 numbers a picture and embed_texts 5 a text"),
        ("Broken", "embed_texts fails on a list of 2 (RuntimeError: no tower)"),
        ("fails", "fails (KeyError: 'weights')"),
        ("number", "has no function or class number (it has Means, build, Module"),
        ("bild", "has no function or class bild"),
    ],
)
def test_code_that_gives_no_model(name, expected, code):
    code("means_c", BUILD)
    with pytest.raises(UserError) as error:
        open_model(f"means_c:{name}")
    assert str(error.value).startswith(f"means_c:{name}: ")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_modules_that_are_not_there(code):
    with pytest.raises(UserError, match=r"no module absent here; go to the folder that holds abs"):
        open_model("absent:build")
    code("means_d", "import absent_library\n")
    with pytest.raises(UserError, match="means_d imports absent_library, which is not there"):
        open_model("means_d:build")
    code("means_e", "def build(:\n")
    with pytest.raises(UserError, match=r"means_e cannot be imported \(SyntaxError: "):
        open_model("means_e:build")


def test_what_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file, folder or model.*my_code:build"):
        open_model("nothing-like-it")
    with pytest.raises(UserError, match=r"neither open_clip_config\.json .* nor a checkpoint"):
        open_model(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        open_model("runs/last.ckpt")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match=r"a folder; name one of checkpoints/last\.ckpt"):
        open_model(str(tmp_path))
    with pytest.raises(UserError, match="not a checkpoint that can be read"):
        open_model("checkpoints/last.ckpt")


MISSING = """
import sys
from clipkit.errors import UserError
from clipkit.interop import open_model
sys.modules["open_clip"] = sys.modules["transformers"] = None
for spec in sys.argv[1:]:
    try:
        open_model(spec)
    except UserError as error:
        print(error)
"""


def test_a_library_that_is_missing(open_clip_folder, clip_folder, tmp_path):
    specs = ["open_clip:ViT-B-32", "hf-hub:a/b", open_clip_folder("vit")]
    done = run(MISSING, tmp_path, *specs, clip_folder, "transformers:a/b")
    lines = done.splitlines()
    assert [line.split(": ")[-1] for line in lines] == [
        *["needs the library open_clip, pip install 'clipkit[peers]' brings it"] * 3,
        *["needs the library transformers, pip install 'clipkit[huggingface]' brings it"] * 2,
    ]


DIGESTS = """
import sys
from clipkit.interop import open_model
for spec in sys.argv[1:]:
    opened = open_model(spec)
    print(opened.weights, opened.tokenizer, opened.preprocess)
"""


def test_digests_are_the_same_in_every_process(
    open_clip_folder, clip_folder, siglip_folder, checkpoint, code, tmp_path
):
    code("means_f", BUILD)
    specs = [
        *map(str, map(open_clip_folder, ("vit", "siglip"))),
        *map(str, (clip_folder, siglip_folder, checkpoint)),
        "means_f:build",
    ]
    opened = [open_model(spec) for spec in specs]
    here = [f"{one.weights} {one.tokenizer} {one.preprocess}" for one in opened]
    opened[0].model.embed_texts(["using it changes nothing"])
    assert run(DIGESTS, tmp_path, *specs).splitlines() == here
    assert len({one.weights for one in opened}) == len(specs)
    # The words' tokenizer is in two of the folders, with another cleaning and context.
    assert len({one.tokenizer for one in opened}) == len(specs)
    assert len({one.preprocess for one in opened}) == len(specs)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_any_weight_changes_the_digest(kind, open_clip_folder, clip_folder, tmp_path):
    source = open_clip_folder("vit") if kind == "vit" else clip_folder
    folder = tmp_path / "other"
    shutil.copytree(source, folder)
    original = open_model(str(folder))
    assert original.weights == open_model(str(source)).weights
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name in sorted(tensors)[:: len(tensors) // 4]:
        changed = {key: value.clone() for key, value in tensors.items()}
        changed[name].view(-1)[-1] += 1e-3
        save_file(changed, file, metadata={"format": "pt"})
        found = open_model(str(folder))
        assert found.weights != original.weights, name
        assert (found.tokenizer, found.preprocess) == (original.tokenizer, original.preprocess)


def run(source, folder, *words):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source, *map(str, words)],
        capture_output=True, text=True, check=True, cwd=folder,
        env={
            "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(clipkit.__file__).parents[1]),
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
    )  # fmt: skip
    return done.stdout
