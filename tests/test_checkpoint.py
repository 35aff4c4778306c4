"""A checkpoint alone is enough; a stranger's runs nothing."""

import copy
import pickle
import sys

import pytest
import torch

import clipkit
from clipkit import checkpoint as checkpoints
from clipkit import strangers
from clipkit.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pictures, mlflow_template):
    """A run folder: two epochs on the small data set, with a vocabulary of its own."""
    import shutil

    from clipkit.cli import main
    from clipkit.tokenizer_training import train_tokenizer
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("trained")
    shutil.copy(mlflow_template, folder / "mlflow.db")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "words.json").write_text(train_tokenizer(["a red circle on white"], vocab_size=520))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code = main(
            [
                *("fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", str(pictures)),
                *("--trainer.max_epochs=2", "--model.tokenizer.path=words.json", "--run_name=run"),
                "--trainer.callbacks+=ZeroShotRetrieval",
                "--trainer.callbacks.datasets={own: {}}",
            ]
        )
        assert code == 0
        (folder / "words.json").unlink()  # the checkpoint carries it
    return folder / "runs" / "tiny" / "run"


@pytest.fixture
def last(trained):
    return trained / "checkpoints" / "last.ckpt"


def journal(run):
    import json

    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_validate_alone_gives_the_logged_values(last, trained, tmp_path, monkeypatch, capsys):
    from clipkit.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["validate", "--ckpt_path", str(last)]) == 0
    printed = dict(
        line.split() for line in capsys.readouterr().out.splitlines()
        if line.startswith(("val/", "retrieval/")) and len(line.split()) == 2
    )  # fmt: skip
    logged = next(line for line in reversed(journal(trained)) if "val/loss" in line)
    promised = {
        name: value for name, value in logged.items() if "/" in name and "train/" not in name
    }
    assert promised
    assert {name: float(printed[name]) for name in promised} == promised
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "runs").exists()


def test_load_rebuilds_the_model(last):
    model = clipkit.load(str(last))
    assert not model.training
    assert 512 < model.tokenizer.vocab_size <= 520  # words.json, which is gone
    state = torch.load(last, weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    texts = model.embed_texts(["a red circle", "a blue moon"])
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    images = model.encode_image(torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8))
    assert images.shape == texts.shape == (2, 16)


def test_embed_images_takes_pictures_paths_and_bytes(last, pictures):
    from PIL import Image

    model = clipkit.load(str(last))
    path = pictures / "0003.png"
    embeddings = model.embed_images([Image.open(path), str(path), path.read_bytes()], batch_size=2)
    assert embeddings.shape == (3, 16)
    torch.testing.assert_close(embeddings[0], embeddings[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(embeddings[0], embeddings[2], rtol=0, atol=1e-6)


def test_a_new_run_from_weights(last, workdir, pictures, command):
    code = command(
        "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures, "--weights", last,
        "--model.optimizer.lr=0", "--model.tokenizer.path=english",
    )  # fmt: skip
    assert code == 2  # another vocabulary
    (workdir / "words.json").write_text(clipkit.load(str(last)).tokenizer.definition)
    code = command(
        "fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures, "--weights", last,
        "--model.optimizer.lr=0", "--model.tokenizer.path=words.json", "--run_name=again",
    )  # fmt: skip
    assert code == 0
    before = clipkit.load(str(last)).state_dict()
    after = clipkit.load("runs/tiny/again/checkpoints/last.ckpt").state_dict()
    parameters = [name for name in before if name.endswith("weight")]
    assert all(torch.equal(before[n], after[n]) for n in parameters if "running" not in n)


def test_resume_alone_continues(last, trained, workdir, command):
    assert command("fit", "--ckpt_path", last, "--trainer.max_epochs=3", "--run_name=more") == 0
    lines = journal(workdir / "runs" / "tiny" / "more")
    assert {line["epoch"] for line in lines} == {2}


def test_nothing_left_to_train_is_said_before_a_run_is_made(last, workdir, command, capsys):
    assert command("fit", "--ckpt_path", last) == 2
    error = capsys.readouterr().err
    assert "trainer.max_epochs is 2 and 2 are done" in error
    assert "--trainer.max_epochs 12" in error
    assert not (workdir / "runs").exists()


# --- A stranger's file ---------------------------------------------------------------------------


@pytest.fixture
def forge(last, tmp_path):
    """Writes the checkpoint with its record changed by a function; gives its path."""
    original = torch.load(last, weights_only=True)

    def write(change):
        forged = copy.deepcopy(original)
        change(forged[checkpoints.KEY])
        path = tmp_path / "stranger.ckpt"
        torch.save(forged, path)
        return str(path)

    return write


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that a stranger would have us import; importing it is the crime."""
    (tmp_path / "evil.py").write_text(
        "import pathlib; pathlib.Path(__file__).with_name('ran').touch()\n"
        "class Encoder: pass\ndef function(*a, **k): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("evil", None)
    return tmp_path / "ran"


def model_part(name, value):
    return lambda kept: kept["configuration"]["model"].__setitem__(name, value)


CLASS = {"class_path": "evil.Encoder"}
HIDDEN = "{class_path: evil.Encoder}"


def data_argument(name, value):
    return lambda kept: kept["configuration"]["data"]["init_args"].__setitem__(name, value)


def evaluation(datasets):
    callback = {
        "class_path": "clipkit.callbacks.ZeroShotRetrieval",
        "init_args": {"datasets": datasets},
    }
    return lambda kept: kept["configuration"]["trainer"]["callbacks"].append(callback)


def huggingface(config):
    return model_part(
        "text_encoder",
        {
            "class_path": "clipkit.encoders.HuggingFaceTextEncoder",
            "init_args": {"name": "x", "pretrained": False, "unknown": config},
        },
    )


FORGERIES = {
    "dotted key": model_part("loss.class_path", "evil.Encoder"),
    "dotted key of a missing part": lambda kept: [
        kept["configuration"]["model"].pop("loss"),
        kept["configuration"]["model"].update({"loss.class_path": "evil.Encoder"}),
    ],
    "dotted key in data": lambda kept: kept["configuration"]["data"].update(
        {"init_args.tokenizer": "evil.Encoder"}
    ),
    "dotted key in arguments": data_argument("tokenizer.class_path", "evil.Encoder"),
    "string where a tokenizer belongs": data_argument("tokenizer", "evil.Encoder"),
    "YAML where a tokenizer belongs": data_argument("tokenizer", HIDDEN),
    "file where a tokenizer belongs": data_argument("tokenizer", "evil.yaml"),
    "string where augmentation belongs": data_argument("augment", "evil.Encoder"),
    "arguments as YAML": lambda kept: kept["configuration"]["data"].update(init_args=HIDDEN),
    "set as string": evaluation({"x": "evil.Encoder"}),
    "set as file": evaluation({"x": "evil.yaml"}),
    "sets as YAML": evaluation("{x: {class_path: evil.Encoder}}"),
    "set named like a path": evaluation({"../../escape": {}}),
    "dict_kwargs": lambda kept: kept["configuration"]["model"]["optimizer"].update(
        dict_kwargs={"lr": "evil.Encoder"}
    ),
    "unknown argument with YAML": huggingface({"x": HIDDEN}),
    "model as string": lambda kept: kept["configuration"].update(model="evil.Encoder"),
    "no model": lambda kept: kept["configuration"].pop("model"),
    "tensor as value": lambda kept: kept["configuration"]["model"].update(embed_dim=torch.ones(1)),
    "carried by an unknown name": lambda kept: kept["carried"].update(tokenizer={"clean": "none"}),
    "carried by a number": lambda kept: kept["carried"].update({1: {}}),
    "carried by a dotted name": lambda kept: kept["carried"].update(
        tokenizer={"path.class_path": "evil.Encoder"}
    ),
    "class path": model_part("image_encoder", CLASS),
    "bare string": model_part("image_encoder", "evil.Encoder"),
    "function as head": model_part("image_head", "evil.function"),
    "function as factory": model_part("text_head", {"class_path": "evil.function"}),
    "optimizer": model_part("optimizer", {"class_path": "evil.function"}),
    "optimizer's value": lambda kept: kept["configuration"]["model"]["optimizer"][
        "init_args"
    ].update(lr="evil.Encoder"),
    "nested optimizer value": lambda kept: kept["configuration"]["model"]["optimizer"][
        "init_args"
    ].update(betas=["evil.Encoder", 0.9]),
    "optimizer in disguise": model_part(
        "optimizer", {"class_path": "torch.optim.../evil.function"}
    ),
    "submodule of torch.optim": model_part(
        "optimizer", {"class_path": "torch.optim.swa_utils.math"}
    ),
    "class of another library": model_part("loss", {"class_path": "os.system"}),
    "nested": model_part(
        "temperature",
        {"class_path": "clipkit.temperature.Temperature", "init_args": {"init": CLASS}},
    ),
    "in a list": model_part("loss", [CLASS]),
    "data module": lambda kept: kept["configuration"].update(data=CLASS),
    "data module as string": lambda kept: kept["configuration"].update(data="evil.Encoder"),
    "dict instead of a name": model_part("loss", {"class_path": {"class_path": "evil.Encoder"}}),
    "carried": lambda kept: kept["carried"].update(tokenizer={"definition": CLASS}),
    "carried part": lambda kept: kept["carried"].update(loss=CLASS),
    "lookalike": model_part("loss", {"class_path": "clipkit_evil.InfoNCELoss"}),
    "private part of clipkit": model_part("loss", {"class_path": "clipkit.building.run"}),
    "callback argument": evaluation({"x": CLASS}),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_a_strangers_names_are_refused_before_anything_is_imported(kind, forge, evil, capsys):
    from clipkit.cli import main

    path = forge(FORGERIES[kind])
    with pytest.raises(UserError, match="refused"):
        clipkit.load(path)
    assert main(["validate", "--ckpt_path", path]) == 2
    assert "refused" in capsys.readouterr().err
    assert "evil" not in sys.modules
    assert not evil.exists()


@pytest.mark.parametrize("where", ["logger", "plugins", "strategy", "callbacks", "profiler"])
def test_what_a_stranger_adds_to_the_trainer_is_not_used(where, forge, evil):
    from clipkit.cli import main

    value = [CLASS] if where in ("plugins", "callbacks") else CLASS
    path = forge(lambda kept: kept["configuration"]["trainer"].update({where: value}))
    assert main(["validate", "--ckpt_path", path]) == 0
    assert "evil" not in sys.modules


def test_a_run_folder_stays_where_it_belongs(forge, workdir, command):
    path = forge(lambda kept: kept["configuration"].update(experiment="../escaped", run_name=".."))
    assert command("fit", "--ckpt_path", path, "--trainer.max_epochs=3") == 0
    assert not (workdir.parent / "escaped").exists()
    assert [p.name for p in (workdir / "runs").iterdir()] == ["clipkit"]


def test_what_is_written_to_the_disk_is_not_a_strangers_choice(forge, workdir, command):
    kept = {"cache_tokens": True, "cache_pictures_gb": 1, "cache_folder": "escaped"}
    path = forge(lambda record: record["configuration"]["data"]["init_args"].update(kept))
    assert command("validate", "--ckpt_path", path) == 0
    assert not (workdir / "escaped").exists()
    assert command("validate", "--ckpt_path", path, "--data.cache_tokens=true",
                   "--data.cache_folder=mine") == 0  # fmt: skip
    assert len(list((workdir / "mine").glob("tokens-*"))) == 1


def test_a_foreign_configuration_brings_no_code():
    config = {
        "model_type": "bert",
        "hidden_size": 8,
        "attn_implementation": "stranger/kernel",
        "_attn_implementation": "stranger/kernel",
        "auto_map": {"AutoModel": "evil.Encoder"},
        "hidden": HIDDEN,
    }
    found = strangers.carried({"text_encoder": {"config": config}}, source="x")
    assert found == {
        "text_encoder": {"config": {"model_type": "bert", "hidden_size": 8}, "pretrained": False}
    }


def test_the_name_refused_is_in_the_message_and_trust_admits_it(forge, evil):
    path = forge(model_part("image_encoder", {"class_path": "evil.Encoder"}))
    with pytest.raises(UserError, match=r"model\.image_encoder.*'evil\.Encoder'.*--trust evil"):
        clipkit.load(path)
    with pytest.raises(UserError) as refused:  # imported now, and found to be no encoder
        clipkit.load(path, trust=["evil"])
    assert "--trust" not in str(refused.value)
    assert evil.exists()


class Pickled:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('ran').touch()",))


def test_a_pickle_is_not_run(tmp_path, monkeypatch, command, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Pickled()}, "pickle.ckpt")
    with open("raw.ckpt", "wb") as file:
        pickle.dump({"state_dict": Pickled()}, file)
    for name in ("pickle.ckpt", "raw.ckpt"):
        assert command("validate", "--ckpt_path", name) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a checkpoint"),
        (b"PK\x03\x04 but no archive", "not a checkpoint"),
        (None, "no such file"),
    ],
)
def test_no_checkpoint(content, message, tmp_path, command, capsys):
    path = tmp_path / "file.ckpt"
    if content is not None:
        path.write_bytes(content)
    assert command("validate", "--ckpt_path", path) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_of_something_else(tmp_path):
    torch.save({"state_dict": {"weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="carries no configuration"):
        clipkit.load(str(tmp_path / "other.ckpt"))


def test_weights_that_do_not_fit_are_listed():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"missing bias; unexpected scale; of another shape weight"):
        checkpoints.load_weights(
            module, {"weight": torch.zeros(3, 2), "scale": torch.zeros(1)}, "x.ckpt"
        )


def test_every_public_part_is_what_it_says():
    from importlib import import_module

    for name in strangers.PUBLIC_PARTS:
        module, _, attribute = name.rpartition(".")
        assert isinstance(getattr(import_module(module), attribute), type), name
