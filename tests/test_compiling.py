"""Compiled towers: the gradient of plain ones, one graph of text for captions of all lengths."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch import nn

import clipkit
from clipkit import compiling
from clipkit import module as clip_module
from clipkit.data.samples import PairCollate, Sample
from clipkit.encoders import ConvNet, HuggingFaceTextEncoder, TextTransformer, TimmImageEncoder
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer
from tests.test_pieces import assert_same, gradients, made


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Everything but the generation of code, which takes long."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    # Many small groups of captions.
    monkeypatch.setitem(clip_module._GROUP_OVERHEAD, "cpu", 4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def small_text(contract, **options):
    options = {"width": 16, "depth": 1, "heads": 2, **options}
    return TextTransformer(contract, **{k: v for k, v in options.items() if k != "text"})


def text_with(**options):
    return lambda contract, **_: small_text(contract, **options)


def small_convnet(**options):
    return ConvNet(image_size=16, widths=(8, 8), feature_dim=16, **options)


def small_resnet(**options):
    return TimmImageEncoder("test_resnet", image_size=32, **options)


def bert(contract, **_):
    config = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 32,
              "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
    return HuggingFaceTextEncoder(contract, name="small", pretrained=False, config=config)


def batch(lengths, size):
    generator = torch.Generator().manual_seed(len(lengths))
    pictures = torch.randint(0, 256, (len(lengths), 3, size, size), generator=generator).byte()
    captions = [" ".join(["dog"] * length) + f" {n}" for n, length in enumerate(lengths)]
    samples = [Sample(p, c, n, n) for n, (p, c) in enumerate(zip(pictures, captions, strict=True))]
    return PairCollate(Tokenizer("english"))(samples)


# Groups of one, of several, of equally many captions as tokens; the sixth has the length of the
# first's group. All have six pairs, as batches of a run have.
BATCHES = [(20, 9, 9, 3, 3, 3), (1, 1, 1, 1, 1, 1), (30, 1, 1, 1, 1, 1), (4, 4, 4, 4, 4, 4),
           (70, 50, 30, 10, 5, 2), (9, 9, 3, 3, 3, 3)]  # fmt: skip


def compiled(module, *sides):
    if "image" in sides:
        module._compiled["image"] = compiling.compiled_image_tower(module.image_encoder)
    if "text" in sides:
        module._compiled["text"] = compiling.compiled_text_tower(module.text_encoder)
    return module


def compare(*sides, size=16, **settings):
    """Gradients and buffers over batches of many lengths, with evaluation in between."""
    settings = {"image_encoder": small_convnet, "text": text_with(), **settings}
    plain, module = made(**settings), compiled(made(**settings), *sides)
    counted = []
    for lengths in BATCHES:
        pairs = batch(lengths, size)
        plain.zero_grad()
        module.zero_grad()
        assert_same(gradients(module, pairs), gradients(plain, pairs))
        for (name, found), expected in zip(module.named_buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=name)
        counted.append(graphs())
        with torch.no_grad():
            module.eval()(batch(lengths[:4], size))
        module.train()
        assert graphs() == counted[-1]  # evaluation runs the towers as they are
    return counted


def test_one_graph_a_tower():
    assert compare("image", "text") == [2] * len(BATCHES)


def test_micro_batches_of_one_size_add_no_graph():
    # Six pairs by four are twice three.
    assert compare("image", "text", micro_batch=4) == [2] * len(BATCHES)


def test_a_vit_and_a_tower_that_is_locked_below_its_top():
    vit = partial(TimmImageEncoder, "test_vit", image_size=32)
    counted = compare(
        "image", "text", size=32, image_encoder=vit, lock_image=1, lock_text=0, micro_batch=3
    )
    assert counted == [2] * len(BATCHES)


def test_checkpointed_blocks():
    again = {"gradient_checkpointing": True}
    counted = compare("text", text=text_with(depth=2, **again), micro_batch=4)
    assert counted == [1] * len(BATCHES)


@pytest.mark.parametrize("make", [small_convnet, small_resnet])
def test_checkpointed_blocks_with_batch_norm(make):
    image = partial(make, gradient_checkpointing=True)
    size = image().image_size
    assert compare("image", size=size, image_encoder=image) == [1] * len(BATCHES)


def test_a_tower_of_transformers():
    pytest.importorskip("transformers")
    assert compare("text", text=bert) == [1] * len(BATCHES)


def test_in_half_precision():
    module = compiled(made(image_encoder=small_convnet, text=text_with()).float(), "image", "text")
    for lengths in BATCHES:
        with torch.autocast("cpu", torch.bfloat16):
            loss, found = gradients(module, batch(lengths, 16))
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in found.values())
    assert graphs() == 2


def test_the_code_that_is_generated(monkeypatch):
    """Inductor itself, on the smallest tower; the tests above stop before it."""
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    counted = compare("text")
    assert counted == [1] * len(BATCHES)


@pytest.fixture
def fit(workdir, pictures, command):
    def run(*words, name):
        return command(
            "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures,
            "--trainer.precision=64-true", f"--run_name={name}", *words,
        )  # fmt: skip

    return run


def losses(name):
    lines = Path(f"runs/tiny/{name}/metrics.jsonl").read_text().splitlines()
    return [v for line in map(json.loads, lines) for k, v in line.items() if k.endswith("/loss")]


def test_a_run_and_its_checkpoint(fit, command):
    assert fit(name="plain") == 0
    assert fit("--model.compile=true", name="compiled") == 0
    assert graphs() == 2
    assert losses("compiled") == pytest.approx(losses("plain"), abs=1e-10)
    plain, found = (
        clipkit.load(f"runs/tiny/{name}/checkpoints/last.ckpt") for name in ("plain", "compiled")
    )
    assert found.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(
        found.embed_texts(["a red circle"]), plain.embed_texts(["a red circle"])
    )
    last = "runs/tiny/compiled/checkpoints/last.ckpt"
    assert command("validate", "--ckpt_path", last) == 0
    assert graphs() == 2  # neither loading nor validating compiles
    words = ["--ckpt_path", last, "--trainer.max_epochs=2", "--model.compile=true"]
    assert fit(*words, name="more") == 0


def test_what_cannot_be_compiled_ends_in_a_sentence(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nowhere/g++"))
    # Nothing else has these widths: what was compiled before is found again on the disk.
    tower = compiling.compiled_image_tower(nn.Sequential(nn.Linear(17, 3), nn.GELU()))
    with pytest.raises(UserError, match=r"model\.compile: .*C\+\+ compiler.*compile=false") as told:
        tower(torch.zeros(2, 17))
    assert "\n" not in str(told.value)
