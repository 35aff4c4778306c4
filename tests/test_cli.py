"""The command line: bad input gets one clear line and exit code 2; help and recipes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture
def refused(workdir, pictures, command, capsys):
    """Runs `fit` with something wrong; gives the one line it prints."""

    def run(*words, verb="fit", config=("-c", "base", "-c", "tiny.yaml"), data=True):
        dataset = ["--data.dataset", pictures] if data else []
        code = command(verb, *config, *dataset, *words)
        error = capsys.readouterr().err
        assert code == 2, error
        assert error.startswith("clipkit: ")
        assert error.count("\n") == 1, error
        assert "Traceback" not in error
        return error

    return run


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--data.dataset", "/nowhere"], ["data.dataset '/nowhere'", "does not exist"]),
        (["--data.caption_column", "captoin"], ["data.caption_column 'captoin'", "caption, label"]),
        (["--data.batch_size", "64"], ["data.batch_size: 64", "23 pairs"]),
        (["--data.batch_size", "0"], ["data.batch_size: 0"]),
        (["--data.batch_size", "many"], ["data.batch_size: many", "a whole number"]),
        (["--model.optimzer.lr", "1"], ["--model.optimzer.lr", "did you mean --model.optimizer"]),
        (["--model.embed_dim", "-3"], ["model.embed_dim: -3", "from 1 to 1,048,576"]),
        (["--model.text_encoder.width", "0"], ["model.text_encoder.width: 0"]),
        (["--model.image_lr", "-1"], ["model.image_lr: -1", "numbers from 0"]),
        (["--model.optimizer.lr", "-1"], ["model.optimizer: Invalid learning rate: -1.0"]),
        (["--model.embed_dimm", "1"], ["did you mean --model.embed_dim"]),
        (["--model.image_encoder", "NoSuch"], ["model.image_encoder: NoSuch", "TimmImageEncoder"]),
        (["--model.image_encoder", "no_such.My"], ["no_such.My", "cannot be imported"]),
        (["--model.loss", "ConvNet"], ["model.loss: ConvNet", "InfoNCELoss, SigLIPLoss"]),
        (["--model.text_encoder.heads", "3"], ["model.text_encoder.heads: 3"]),
        (["--model.temperature.init", "5"], ["model.temperature.init: 5"]),
        (["--model.tokenizer.path", "nope.json"], ["model.tokenizer.path", "nope.json"]),
        (["--model.schedule.warmup_ratio", "7"], ["model.schedule.warmup_ratio: 7"]),
        (["--trainer.precision", "17"], ["trainer.precision: 17", "bf16-mixed"]),
        (["--trainer.max_epochs", "x"], ["trainer.max_epochs: x", "a whole number"]),
        (["--ckpt_path", "nope.ckpt"], ["nope.ckpt", "no such file"]),
        (["--weights", "nope.ckpt"], ["nope.ckpt", "no such file"]),
        (["-c", "emojy"], ["-c emojy", "did you mean emoji", "ablations/siglip"]),
        (["--trust"], ["--trust"]),
        (["--trust", "no_such_code"], ["--trust no_such_code", "no_such_code.py", "PYTHONPATH"]),
        (["--trainer.max_epoch", "3"], ["no such option", "did you mean --trainer.max_epochs"]),
        (["--data.train_split", "tain"], ["data.train_split", "no split 'tain'; it has: train"]),
        (["--model.micro_batch", "1"], ["model.micro_batch: 1 pair", "batch norm", "2 or more"]),
        (["--model.compile", "perhaps"], ["model.compile: perhaps", "true or false"]),
        (["--data.image_sizes", "{0:32}"], ["data.image_sizes", "a space behind the colon"]),
        (["--data.image_sizes", "{one: 32}"], ["data.image_sizes", "one", "a whole number"]),
        (["--data.image_sizes", "{0: 1000}"], ["data.image_sizes: 1000", "the 16 pixels"]),
        (["--trainer.callbacks+=Throughputs"], ["did you mean Throughput?", "LinearProbe"]),
        (["--trainer.strategy", "dpp"], ["trainer.strategy: dpp", "did you mean ddp?"]),
        (["--trainer.strategy=ddp", "--trainer.num_nodes=2"], ["torchrun", "MASTER_ADDR"]),
    ],
)  # fmt: skip
def test_mistakes(refused, words, parts):
    error = refused(*words)
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        (
            "htp://127.0.0.1:9",
            ["MLflow knows no htp:", "did you mean http?", "sqlite:///mlflow.db"],
        ),
        ("file:./mlruns", ["file store", "sqlite:///mlflow.db"]),
        ("sqlite:////nowhere/x.db", ["cannot be opened"]),
    ],
)
def test_tracking_that_cannot_be_used(refused, uri, parts):
    error = refused("--trainer.logger.tracking_uri", uri)
    assert all(part in error for part in ["trainer.logger.tracking_uri", uri, *parts]), error


def callback(name, datasets, *more):
    return [f"--trainer.callbacks+={name}", f"--trainer.callbacks.datasets={datasets}", *more]


STOP = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (callback("ZeroShotRetrieval", "{own: {split: tset}}"), ["own", "no split 'tset'"]),
        (callback("ZeroShotClassification", "{own: {label_column: lable}}"), ["lable", "caption"]),
        (callback("ZeroShotClassification", "{own: {lable: x}}"), ["trainer.callbacks", "lable"]),
        (callback("ZeroShotClassification", "{own: {templates: photo of}}"), ["'photo of'", "{}"]),
        (
            callback("ZeroShotRetrieval", "{own: {}}", STOP, "--trainer.callbacks.monitor=val/lss"),
            ["EarlyStopping.monitor", "did you mean val/loss", "retrieval/own/text_to_image_r1"],
        ),
        (
            callback(
                "ZeroShotRetrieval",
                "{own: {split: train, when: end}}",
                STOP,
                "--trainer.callbacks.monitor=retrieval/own/text_to_image_r1",
            ),
            ["choose on validation"],
        ),
    ],
)  # fmt: skip
def test_mistakes_in_callbacks_end_before_a_run_folder_is_made(refused, workdir, words, parts):
    error = refused(*words)
    assert all(part in error for part in parts), error
    assert not (workdir / "runs").exists()


def test_help_is_not_what_a_misspelt_option_was_meant_to_be(refused):
    assert ".help" not in refused("--model.text_encoder.patch_drop_ratio=0.5")


def test_nothing_given(refused):
    assert "begin with a recipe" in refused(config=(), data=False)


def test_broken_yaml(refused, workdir):
    (workdir / "broken.yaml").write_text("model: [unclosed\n")
    assert "broken.yaml, line" in refused(config=("-c", "base", "-c", "broken.yaml"))


def test_a_misspelt_key_in_a_file(refused, workdir):
    (workdir / "typo.yaml").write_text("model: {embed_dimm: 8}\n")
    assert "embed_dimm" in refused("-c", "typo.yaml")


def test_an_empty_folder_is_told_what_is_accepted(refused, workdir):
    (workdir / "empty").mkdir()
    error = refused("--data.dataset", "empty")
    assert all(part in error for part in ("metadata.csv", "name.txt", "webdataset", "csv"))


def test_an_empty_split(refused, workdir):
    (workdir / "pairs.csv").write_text("filepath,caption\n")
    assert "pairs.csv" in refused("--data.dataset", "pairs.csv")


def test_a_file_in_the_place_of_the_run_folder(refused, workdir):
    (workdir / "runs").write_text("")
    assert "run folder" in refused()


def test_unknown_command(command, capsys):
    assert command("fitt") == 2
    assert "did you mean fit" in capsys.readouterr().err


def test_debug_shows_the_traceback(workdir, command):
    from clipkit.errors import UserError

    with pytest.raises(UserError):
        command("fit", "-c", "nope", "--debug")


@pytest.mark.parametrize(
    "words", [["--help"], ["tokenizer", "--help"], ["check", "--help"], ["recipes"]]
)
def test_help_is_quick_and_has_an_example(words):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "clipkit.cli", *words],
        capture_output=True, text=True, check=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert "clipkit" in done.stdout or "siglip" in done.stdout
    assert "torch" not in done.stderr


def test_help_of_fit_shows_an_example(workdir, command, capsys):
    from clipkit.building import ClipkitCLI

    with pytest.raises(SystemExit) as stopped:
        ClipkitCLI(["fit", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "clipkit fit -c base -c pairs" in text
    assert "--weights" in text


def test_a_vocabulary_of_ones_own(workdir, pictures, command, capsys):
    words = ["--vocab_size", "540", "--output", "words.json"]
    assert command("tokenizer", pictures, *words) == 0
    assert "24 captions" in capsys.readouterr().out
    fit = ["fit", "-c", "base", "-c", "tiny.yaml", "--data.dataset", pictures]
    assert (
        command(*fit, "--model.tokenizer.path=words.json", "--trainer.limit_train_batches=1") == 0
    )
    assert command("tokenizer", "/nowhere") == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(refused, workdir, pictures, workers):
    shutil.copytree(pictures, workdir / "broken")
    for picture in (workdir / "broken").glob("*.png"):
        picture.write_bytes(picture.read_bytes()[:100])
    error = refused(f"--data.num_workers={workers}", "--data.dataset", "broken")
    assert all(part in error for part in ("pairs tried in turn", "first is '00", "truncated"))
