"""Every shipped YAML: its first line is its command, it parses, and offline ones train."""

import re
from pathlib import Path

import pytest
import yaml

from clipkit import recipes

ROOT = Path(__file__).parents[1]
NAMES = recipes.names()
# What a recipe fetches from the hub, and so cannot be tried without a network.
FROM_THE_HUB = {
    "flickr8k": "its pictures",
    "ablations/locked_image": "pretrained weights",
    "ablations/huggingface_text": "pretrained weights and a tokenizer",
}


def words_of(name):
    """The words of the command on a recipe's first line."""
    first = recipes.find(name).read_text().splitlines()[0]
    assert first.startswith("# clipkit fit "), f"{name}: its first line is not its command"
    return first.removeprefix("# clipkit ").split()


def words_on(name, pictures):
    """The same on the small data set."""
    folder = str(pictures)
    return [w.replace("~/my_pictures", folder).replace("DIR", folder) for w in words_of(name)]


def test_recipes_are_found_by_glob():
    assert {"base", "quickstart", "pairs", "emoji", "grocery", "flickr8k"} <= set(NAMES)
    assert {f"ablations/{n}" for n in ("siglip", "mlp_head", "resnet", "bag_of_tokens")} <= set(
        NAMES
    )
    assert set(FROM_THE_HUB) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_first_line_names_the_recipe_and_second_says_what_it_is(name):
    words = words_of(name)
    assert name in words
    assert words[1:3] == ["-c", "base"]
    assert recipes.summary(recipes.find(name))
    assert yaml.safe_load(recipes.find(name).read_text())


@pytest.mark.parametrize("name", [n for n in NAMES if n != "base"])
def test_the_command_parses(name, workdir, pictures):
    from clipkit.building import configuration_of, names_of_run

    words = words_on(name, pictures)[1:]
    assert configuration_of(words)["model"]["loss"]
    assert names_of_run(words)[0] not in ("base", "clipkit")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "base" and n not in FROM_THE_HUB])
def test_offline_recipes_train_two_steps(name, workdir, pictures, command):
    words = words_on(name, pictures)
    small = ["--trainer.max_steps=2", "--trainer.max_epochs=-1", "--trainer.log_every_n_steps=1"]
    small += ["--trainer.limit_val_batches=1", "--data.batch_size=8", "--run_name=run"]
    small += ["--trainer.logger=false"]
    if "quickstart" in words:
        small += ["--data.length=16"]
    if name == "emoji":
        small += [
            "--data.caption_column=caption",
            *without_end("ZeroShotRetrieval", "caption_column: caption"),
        ]
    if name == "grocery":
        small += without_end("ZeroShotClassification", 'label_column: label, templates: "{}"')
    assert command(*words, *small) == 0
    (journal,) = Path("runs").rglob("metrics.jsonl")
    assert journal.read_text().count('"train/loss"') == 2


def without_end(callback, data):
    """The evaluation on a test split, which the small data set lacks, left out."""
    return [f"--trainer.callbacks={callback}", f"--trainer.callbacks.datasets={{own: {{{data}}}}}"]


def test_the_readmes_commands_parse(workdir, pictures, command):
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^(?:clipkit|mlflow) .*$", text, flags=re.MULTILINE)
    assert len(commands) >= 8
    from clipkit.cli import COMMANDS

    for line in commands:
        line = line.split(" #")[0].split()
        if line[0] == "clipkit":
            assert line[1] in COMMANDS
            for value in (line[i + 1] for i, word in enumerate(line) if word == "-c"):
                assert recipes.find(value).is_file()


def test_readme_has_its_two_one_line_commands():
    lines = [
        line for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("python3 -m venv ")
    ]  # fmt: skip
    assert len(lines) == 2
    assert "quickstart" in lines[0]
    assert "tests" in lines[1]


def test_an_existing_file_wins_over_a_recipe(workdir):
    (workdir / "emoji").write_text("{}")
    assert recipes.find("emoji") == Path("emoji")
    (workdir / "emoji").unlink()
    assert recipes.find("emoji").name == "emoji.yaml"
    assert recipes.find("experiments/emoji.yaml").name == "emoji.yaml"


@pytest.mark.parametrize(
    ("words", "run"),
    [
        ("", "emoji"),
        ("--data.dataset ~/my_pictures/", "my_pictures"),
        ("-c ablations/siglip --data.dataset a/b.csv --seed_everything=3",
         "siglip-b.csv-seed_everything=3"),
        ("--model.image_encoder my_code.MyEncoder --model.optimizer.lr 1e-3",
         "image_encoder=MyEncoder-lr=1e-3"),
    ],
)  # fmt: skip
def test_a_run_is_named_after_what_differs(words, run):
    from clipkit.building import names_of_run

    assert names_of_run(f"-c base -c emoji {words}".split()) == ("emoji", run)
