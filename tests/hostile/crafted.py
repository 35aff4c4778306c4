"""Hostile files, each with the command that a user would give for it.

A file lies in `inside`, where the command runs; `outside` holds what it is after: `secret.*`, whole
files of every kind, and `evil.py`, which leaves a mark where it is imported. The command's folder
has an `evil.py` too: the current folder is on the import path.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipkit.checkpoint import KEY
from clipkit.tokenizer import Tokenizer

SECRETS = 16
"""How many pictures there are that are nobody's business."""

DEEP = 100_000
"""How deep what is nested is nested."""

EVIL_CODE = """\
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
class Encoder: pass
def function(*args, **kwargs): pass
"""


@dataclass(frozen=True)
class Place:
    """Where a hostile file is put: the command's folder, a forbidden one, a whole checkpoint."""

    inside: Path
    outside: Path
    checkpoint: Path
    pictures: Path

    def prepare(self) -> None:
        """Put bait into both folders."""
        (self.outside / "tower").mkdir(parents=True)
        self.inside.mkdir(parents=True)
        for folder in (self.inside, self.outside):
            (folder / "evil.py").write_text(EVIL_CODE)
        for number in range(SECRETS):
            secret = Image.new("RGB", (20, 20), (number, 0, 255 - number))
            secret.save(self.outside / f"secret{number}.png")
        (self.outside / "secret.json").write_text('["secret"]')
        (self.outside / "secret.txt").write_text("secret\n")
        (self.outside / "tokenizer.json").write_text(Tokenizer().definition)
        (self.outside / "tower" / "config.json").write_text(
            json.dumps({"model_type": "bert", "auto_map": {"AutoModel": "evil.Encoder"}})
        )

    def forge(self, change: Callable[[dict[str, Any]], object], name: str = "forged.ckpt") -> str:
        """Write the checkpoint after a change of all that it holds."""
        loaded = torch.load(self.checkpoint, weights_only=True)
        change(loaded)
        torch.save(loaded, self.inside / name)
        return name


Words = list[str]
CASES: dict[str, Callable[[Place], list[Words]]] = {}
"""By name, what writes the file and returns the commands that meet it."""


def case(make: Callable[[Place], list[Words]]) -> Callable[[Place], list[Words]]:
    CASES[make.__name__.replace("_", " ")] = make
    return make


# --- Doors -------------------------------------------------------------------------------------


def doors_of_checkpoint(path: str) -> list[Words]:
    return [
        ["load", path],
        ["validate", "--ckpt_path", path],
        ["fit", "--ckpt_path", path, "--trainer.max_epochs=3"],
        ["benchmark", path, "--suite", "offline", "--limit", "8", "--output", "out.json"],
    ]


def every_door(path: str) -> list[Words]:
    return [*doors_of_checkpoint(path), ["fit", *RECIPE, "--weights", path]]


RECIPE = ["-c", "base", "-c", "tiny.yaml", "--data.dataset", "pictures"]


def record(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """A change of what clipkit keeps beside the weights."""
    return lambda loaded: change(loaded[KEY])


def model(**parts: Any) -> Callable[[dict[str, Any]], object]:
    return record(lambda kept: kept["configuration"]["model"].update(parts))


def _laughs() -> list[Any]:
    value: list[Any] = ["lol"]
    for _ in range(40):
        value = [value] * 10
    return value


LAUGHS = "a0: &a0 [lol, lol]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 40)
)
TAGS = '!!python/object/apply:os.system ["touch ran"]'
DEEP_JSON = "[" * DEEP + "]" * DEEP


# --- Checkpoints: the file ---------------------------------------------------------------------


class Runs:
    """What a pickle runs when it is loaded."""

    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('ran').touch()",)


@case
def pickle_in_a_checkpoint(place: Place) -> list[Words]:
    return every_door(place.forge(lambda loaded: loaded.update(state_dict=Runs())))


@case
def bare_pickle(place: Place) -> list[Words]:
    (place.inside / "bare.ckpt").write_bytes(pickle.dumps({"state_dict": Runs()}))
    return every_door("bare.ckpt")


@case
def old_format_of_torch(place: Place) -> list[Words]:
    loaded = {"state_dict": {"weight": torch.zeros(4)}, KEY: {}, "more": Runs()}
    torch.save(loaded, place.inside / "old.ckpt", _use_new_zipfile_serialization=False)
    return every_door("old.ckpt")


@case
def tar_as_a_checkpoint(place: Place) -> list[Words]:
    with tarfile.open(place.inside / "tar.ckpt", "w") as archive:
        for name in ("../escaped", str(place.outside / "escaped"), "storages", "pickle"):
            add(archive, name, pickle.dumps(Runs()))
    return every_door("tar.ckpt")


@case
def zip_bomb(place: Place) -> list[Words]:
    path = place.inside / place.forge(lambda loaded: None)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    largest = max(records, key=lambda name: len(records[name]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in records.items():
            with archive.open(name, "w", force_zip64=True) as stream:
                stream.write(content)
                for _ in range(2**6 if name == largest else 0):
                    stream.write(bytes(2**20))
    return every_door(path.name)


@case
def terabytes_of_weights_in_a_kilobyte(place: Place) -> list[Words]:
    def claim(loaded: dict[str, Any]) -> None:
        state = loaded["state_dict"]
        for name in state:
            state[name] = torch.zeros(1).expand(2**20, 2**20)

    return every_door(place.forge(claim))


@case
def weights_that_are_no_tensors(place: Place) -> list[Words]:
    return every_door(place.forge(lambda loaded: loaded.update(state_dict={"a": "evil.Encoder"})))


@case
def states_of_training_that_are_something_else(place: Place) -> list[Words]:
    doors = []
    for key, value in {
        "optimizer_states": "evil.Encoder",
        "lr_schedulers": [5],
        "loops": {"fit_loop": 7},
        "callbacks": {"ModelCheckpoint": {"best_model_path": str(place.outside / "secret.txt")}},
        "epoch": "many",
    }.items():
        path = place.forge(lambda loaded, k=key, v=value: loaded.update({k: v}), f"{key}.ckpt")
        doors.append(["fit", "--ckpt_path", path, "--trainer.max_epochs=3"])
    return doors


# --- Checkpoints: what they carry --------------------------------------------------------------


@case
def class_path_of_the_system(place: Place) -> list[Words]:
    return doors_of_checkpoint(
        place.forge(model(loss={"class_path": "os.system", "init_args": {"command": "touch ran"}}))
    )


@case
def function_of_python(place: Place) -> list[Words]:
    return doors_of_checkpoint(place.forge(model(image_head={"class_path": "builtins.eval"})))


@case
def file_of_the_current_folder(place: Place) -> list[Words]:
    return doors_of_checkpoint(place.forge(model(image_encoder={"class_path": "evil.Encoder"})))


@case
def short_name(place: Place) -> list[Words]:
    return doors_of_checkpoint(place.forge(model(loss="evil.Encoder")))


@case
def function_as_a_value(place: Place) -> list[Words]:
    return doors_of_checkpoint(place.forge(model(embed_dim="evil.function")))


@case
def yaml_in_a_string(place: Place) -> list[Words]:
    text = "{class_path: evil.Encoder, init_args: {}}"
    return doors_of_checkpoint(
        place.forge(
            record(lambda kept: kept["configuration"]["data"]["init_args"].update(augment=text))
        )
    )


@case
def dotted_key(place: Place) -> list[Words]:
    return doors_of_checkpoint(place.forge(model(**{"loss.class_path": "evil.Encoder"})))


@case
def nested_class_path(place: Place) -> list[Words]:
    inner = {"class_path": "evil.Encoder"}
    part = {"class_path": "clipkit.temperature.Temperature", "init_args": {"init": [inner]}}
    return doors_of_checkpoint(place.forge(model(temperature=part)))


@case
def nested_a_hundred_thousand_deep(place: Place) -> list[Words]:
    # No pickler nests so deep, hence by hand: a list for a text.
    path = place.inside / place.forge(model(embed_dim="marker"))
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            if name.endswith("data.pkl"):
                text = b"X\x06\0\0\0marker"
                assert text in content
                content = content.replace(text, b"]" * DEEP + b"a" * (DEEP - 1))
            archive.writestr(name, content)
    return doors_of_checkpoint(path.name)


@case
def billion_laughs_in_a_checkpoint(place: Place) -> list[Words]:
    part = {"class_path": "clipkit.encoders.HuggingFaceTextEncoder", "init_args": {"name": "x"}}

    def change(kept: dict[str, Any]) -> None:
        kept["configuration"]["model"]["text_encoder"] = part
        kept["carried"]["text_encoder"] = {"config": {"model_type": "bert", "x": _laughs()}}

    laughing = record(lambda kept: kept["configuration"]["data"]["init_args"].update(a=_laughs()))
    return [
        *doors_of_checkpoint(place.forge(record(change))),
        *doors_of_checkpoint(place.forge(laughing, "laughs.ckpt")),
    ]


@case
def model_of_terabytes(place: Place) -> list[Words]:
    def change(kept: dict[str, Any]) -> None:
        kept["configuration"]["model"]["text_encoder"]["init_args"].update(width=2**21, heads=1)

    return doors_of_checkpoint(place.forge(record(change)))


@case
def model_of_a_million_tensors(place: Place) -> list[Words]:
    def change(kept: dict[str, Any]) -> None:
        tower = kept["configuration"]["model"]["text_encoder"]["init_args"]
        tower.update(width=1, heads=1, depth=10**6)

    return doors_of_checkpoint(place.forge(record(change)))


def part(name: str, **arguments: Any) -> Callable[[dict[str, Any]], object]:
    """A change of the arguments of one part of the model."""
    return record(
        lambda kept: (
            kept["configuration"]["model"][name].setdefault("init_args", {}).update(arguments)
        )
    )


@case
def numbers_out_of_range(place: Place) -> list[Words]:
    changes = [
        model(embed_dim=-3),
        part("text_encoder", width=0, heads=1),
        part("text_encoder", width=2**70, heads=1),
        part("text_encoder", width=10**5000, heads=1),
        part("text_encoder", mlp_ratio=float("nan")),
        part("image_encoder", feature_dim=-1),
    ]
    doors = [
        door
        for number, change in enumerate(changes)
        for door in doors_of_checkpoint(place.forge(change, f"{number}.ckpt"))
    ]
    typed = ("embed_dim=-3", "text_encoder.width=0", "text_encoder.mlp_ratio=-1")
    return [*doors, *(["fit", *RECIPE, f"--model.{option}"] for option in typed)]


@case
def carried_values_of_another_type(place: Place) -> list[Words]:
    def carrying(**values: Any) -> Callable[[dict[str, Any]], object]:
        return record(lambda kept: kept["carried"].update(values))

    changes = [
        carrying(tokenizer={"definition": 5}),
        carrying(image_encoder={"image_size": "large"}),
        carrying(image_encoder={"mean": ["x", 1, [2]]}),
        carrying(image_encoder={"std": 10**5000}),
        carrying(image_encoder={"interpolation": ["a"]}),
        record(lambda kept: kept.update(schema=10**5000)),
    ]
    return [
        door
        for number, change in enumerate(changes)
        for door in doors_of_checkpoint(place.forge(change, f"{number}.ckpt"))
    ]


def _quantised(weight: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will give them up, and files with them will be left
        return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


@case
def weights_of_another_kind(place: Place) -> list[Words]:
    def first(make: Callable[[torch.Tensor], object]) -> Callable[[dict[str, Any]], object]:
        def change(loaded: dict[str, Any]) -> None:
            name = "text_encoder.token_embedding.weight"
            loaded["state_dict"][name] = make(loaded["state_dict"][name])

        return change

    changes = [
        lambda loaded: loaded["state_dict"].update({5: torch.zeros(1)}),
        first(lambda weight: weight.to("meta")),
        first(_quantised),
        first(lambda weight: weight.to_sparse()),
        first(lambda weight: weight.to(torch.complex64)),
        first(lambda weight: weight.to(torch.uint8).view(torch.bits8)),
    ]
    return [
        door
        for number, change in enumerate(changes)
        for door in every_door(place.forge(change, f"{number}.ckpt"))
    ]


@case
def tokenizer_that_lies_outside(place: Place) -> list[Words]:
    def change(kept: dict[str, Any]) -> None:
        path = str(place.outside / "tokenizer.json")
        kept["configuration"]["model"]["tokenizer"]["init_args"]["path"] = path
        kept["carried"].pop("tokenizer")

    return doors_of_checkpoint(place.forge(record(change)))


@case
def carried_tokenizer_beside_another(place: Place) -> list[Words]:
    """What is carried takes the place of a path; left-out defaults shall not make it another."""
    part = {
        "class_path": "clipkit.tokenizer.Tokenizer",
        "init_args": {"path": str(place.outside / "tokenizer.json")},
    }
    return doors_of_checkpoint(place.forge(model(tokenizer=part)))


@case
def tower_that_lies_outside(place: Place) -> list[Words]:
    part = {
        "class_path": "clipkit.encoders.HuggingFaceTextEncoder",
        "init_args": {"name": str(place.outside / "tower"), "pretrained": True},
    }
    return doors_of_checkpoint(place.forge(model(text_encoder=part)))


@case
def image_tower_from_a_folder(place: Place) -> list[Words]:
    return [
        door
        for name in (f"local-dir:{place.outside}", "hf-hub:evil/tower", "hf_hub:evil/tower")
        for door in doors_of_checkpoint(
            place.forge(
                model(
                    image_encoder={
                        "class_path": "clipkit.encoders.TimmImageEncoder",
                        "init_args": {"name": name},
                    }
                ),
                f"{name[:5]}.ckpt",
            )
        )
    ]


@case
def carried_tower_with_code(place: Place) -> list[Words]:
    config = {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Encoder", "AutoModel": "evil.Encoder"},
        "quantization_config": {"quant_method": "evil"},
        "_attn_implementation": "evil/kernel",
    }

    def change(kept: dict[str, Any]) -> None:
        kept["configuration"]["model"]["text_encoder"] = {
            "class_path": "clipkit.encoders.HuggingFaceTextEncoder",
            "init_args": {"name": str(place.outside / "tower"), "pretrained": False},
        }
        kept["carried"]["text_encoder"] = {"config": config}

    return doors_of_checkpoint(place.forge(record(change)))


def tokenizers() -> dict[str, str]:
    """Definitions of tokenizers that take more than they are worth."""

    def changed(**parts: Any) -> str:
        definition = json.loads(Tokenizer().definition)
        definition.update(parts)
        return json.dumps(definition)

    grow = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 200}
    huge = json.loads(Tokenizer().definition)
    huge["model"]["vocab"]["evil"] = 2**32 - 2
    backtracking = {
        "type": "Split",
        "pattern": {"Regex": "(a+a+)+b|(o+o+)+z|( *.*)*=|(x+x+)+y"},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "grows": changed(normalizer={"type": "Sequence", "normalizers": [grow] * 6}),
        "huge-id": json.dumps(huge),
        "backtracks": changed(pre_tokenizer=backtracking),
        "deep": '{"normalizer":' + DEEP_JSON + "}",
        "text": "no json",
    }


@case
def tokenizers_in_a_checkpoint(place: Place) -> list[Words]:
    return [
        door
        for name, definition in tokenizers().items()
        for door in doors_of_checkpoint(
            place.forge(
                record(
                    lambda kept, d=definition: kept["carried"]["tokenizer"].update(definition=d)
                ),
                f"{name}.ckpt",
            )
        )
    ]


@case
def names_that_become_folders(place: Place) -> list[Words]:
    def change(kept: dict[str, Any]) -> None:
        kept["configuration"].update(experiment="../outside/x", run_name="../../outside")

    return [["fit", "--ckpt_path", place.forge(record(change)), "--trainer.max_epochs=3"]]


@case
def set_name_that_becomes_a_file(place: Place) -> list[Words]:
    callback = {
        "class_path": "clipkit.callbacks.ZeroShotRetrieval",
        "init_args": {"datasets": {"../../outside/x": {}}},
    }

    def change(kept: dict[str, Any]) -> None:
        kept["configuration"]["trainer"]["callbacks"].append(callback)

    return doors_of_checkpoint(place.forge(record(change)))[1:3]


@case
def logger_and_plugins(place: Place) -> list[Words]:
    evil = {"class_path": "evil.Encoder"}
    change = {"logger": evil, "plugins": [evil], "callbacks": [evil], "strategy": "evil.Encoder"}
    forged = place.forge(record(lambda kept: kept["configuration"]["trainer"].update(change)))
    return [["validate", "--ckpt_path", forged]]


@case
def cache_outside(place: Place) -> list[Words]:
    change = {"cache_tokens": True, "cache_folder": str(place.outside / "cache")}
    forged = place.forge(
        record(lambda kept: kept["configuration"]["data"]["init_args"].update(change))
    )
    return [["validate", "--ckpt_path", forged]]


@case
def trusted_module_that_names_another(place: Place) -> list[Words]:
    (place.inside / "mine.py").write_text(
        "from typing import Any, Callable\n"
        "from clipkit.losses import InfoNCELoss\n"
        "class Loss(InfoNCELoss):\n"
        "    def __init__(self, inner: Any = None, call: Callable | None = None) -> None:\n"
        "        super().__init__()\n"
    )
    return [
        [*door, "--trust", "mine"]
        for number, arguments in enumerate(
            (
                {"inner": {"class_path": "evil.Encoder"}},
                {"call": "evil.function"},
                {"inner": [{"x": {"class_path": "evil.Encoder"}}]},
                {"inner": "{class_path: evil.Encoder}"},
            )
        )
        for door in doors_of_checkpoint(
            place.forge(
                model(loss={"class_path": "mine.Loss", "init_args": arguments}), f"t{number}.ckpt"
            )
        )
    ]


# --- Tokenizers --------------------------------------------------------------------------------


@case
def tokenizers_in_a_file(place: Place) -> list[Words]:
    doors = []
    for name, definition in tokenizers().items():
        (place.inside / f"{name}.json").write_text(definition)
        doors.append(["fit", *RECIPE, f"--model.tokenizer.path={name}.json"])
    return doors


@case
def tokenizer_folder(place: Place) -> list[Words]:
    folder = place.inside / "words"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(Tokenizer().definition)
    config = {"pad_token": DEEP_JSON, "auto_map": {"AutoTokenizer": ["evil.Encoder", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(DEEP_JSON)
    bare = json.loads(Tokenizer().definition)
    bare["padding"] = None
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    return [["fit", *RECIPE, "--model.tokenizer.path=words"]]


# --- Suites and settings -----------------------------------------------------------------------


def suite(place: Place, text: str, name: str = "suite.yaml") -> Words:
    (place.inside / name).write_text(text)
    return ["benchmark", str(place.checkpoint), "--suite", name, "--output", "out.json"]


@case
def suite_with_tags(place: Place) -> list[Words]:
    return [
        suite(place, TAGS),
        suite(place, f"tasks: {TAGS}\n", "1.yaml"),
        suite(
            place,
            f"tasks:\n- {{task: zeroshot, set: {TAGS}, data: {{path: shapes, split: test}}}}\n",
            "2.yaml",
        ),
        suite(
            place,
            "tasks:\n- task: zeroshot\n  set: a\n  data:\n    path: shapes\n    split: test\n"
            f"    class_names: [{TAGS}]\n",
            "3.yaml",
        ),
    ]


UNREADABLE = ("!!bool x", "!!int ''", "!!timestamp x", "2001-99-99", "0x" + "f" * 5000)
"""Plain values by their tag, which they are not."""


@case
def suite_with_values_that_are_not_what_their_tag_says(place: Place) -> list[Words]:
    task = "tasks:\n- task: zeroshot\n  set: {}\n  data: {{path: shapes, split: test, limit: {}}}\n"
    return [
        suite(place, task.format(*fields), f"{number}-{which}.yaml")
        for number, value in enumerate(UNREADABLE)
        for which, fields in enumerate(((value, "4"), ("a", value)))
    ]


@case
def suite_of_billion_laughs(place: Place) -> list[Words]:
    task = "- {task: zeroshot, set: a, data: {path: shapes, split: test, class_names: *a39}}\n"
    inline = "- {task: zeroshot, set: a, data: {path: shapes, split: test, prompts: {x: *a39}}}\n"
    laughs = LAUGHS.replace("\n", "\n  ").rstrip()
    return [
        suite(place, f"{LAUGHS}tasks:\n{task}", "0.yaml"),
        suite(place, f"name:\n  {laughs}\ntasks:\n{task}", "1.yaml"),
        suite(place, f"name:\n  {laughs}\ntasks:\n{inline}", "2.yaml"),
        suite(place, "tasks: &a [*a]\n", "3.yaml"),
        suite(
            place,
            f"tasks:\n- task: zeroshot\n  set:\n    {laughs.replace(chr(10), chr(10) + '  ')}\n",
            "4.yaml",
        ),
    ]


@case
def suite_nested_deeply(place: Place) -> list[Words]:
    (place.inside / "deep.json").write_text(DEEP_JSON)
    names = (
        "tasks:\n- task: zeroshot\n  set: a\n"
        "  data: {path: shapes, split: test, class_names: deep.json}\n"
    )
    return [
        suite(place, f"tasks: {DEEP_JSON}"),
        suite(place, names, "1.yaml"),
        suite(place, "tasks:\n" + "".join(" " * n + "-\n" for n in range(3000)), "2.yaml"),
    ]


@case
def suite_whose_set_is_a_path(place: Place) -> list[Words]:
    return [
        suite(
            place,
            f"tasks:\n- {{task: zeroshot, set: {name!r}, data: {{path: shapes, split: test}}}}\n",
            f"{number}.yaml",
        )
        for number, name in enumerate(
            ("../../outside/x", str(place.outside / "x"), "..", "a/../../outside/y", "a\0b")
        )
    ]


@case
def template_with_a_format(place: Place) -> list[Words]:
    template = "{c.__class__.__init__.__globals__} {} {0.__class__} {c!r:>1000000000}"
    return [
        suite(
            place,
            "tasks:\n- {task: zeroshot, set: a, data: {path: shapes, split: test, limit: 4, "
            f"templates: '{template}'}}}}\n",
        )
    ]


@case
def sugar_crepe_that_names_pictures_outside(place: Place) -> list[Words]:
    doors = []
    for number, name in enumerate(("../outside/secret0.png", str(place.outside / "secret0.png"))):
        entry = {"filename": name, "caption": "a", "negative_caption": "b"}
        (place.inside / f"crepe{number}.json").write_text(json.dumps({"0": entry, "1": entry}))
        doors.append(
            suite(
                place,
                "tasks:\n- {task: sugarcrepe, set: a, "
                f"data: {{path: crepe{number}.json, split: test}}}}\n",
                f"{number}.yaml",
            )
        )
    return doors


@case
def webdataset_with_objects(place: Place) -> list[Words]:
    doors = []
    for name, kind, shards in (("a", "multilabel", "1"), ("b", "multilabel", "999999")):
        root = place.inside / name
        (root / "test").mkdir(parents=True)
        (root / "test" / "nshards.txt").write_text(shards)
        (root / "dataset_type.txt").write_text(kind)
        (root / "classnames.txt").write_text("x\ny\n")
        objects = io.BytesIO()
        np.save(objects, np.array([Runs(), Runs()], dtype=object), allow_pickle=True)
        with tarfile.open(root / "test" / "0.tar", "w") as archive:
            add(archive, "0.png", picture())
            add(archive, "0.npy", objects.getvalue())
        doors.append(
            suite(
                place,
                f"tasks:\n- {{task: multilabel, set: a, data: {{path: {name}, split: test, "
                "templates: 'a {}'}}\n",
                f"{name}.yaml",
            )
        )
    return doors


@case
def claims_of_an_array(place: Place) -> list[Words]:
    root = place.inside / "claims"
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "dataset_type.txt").write_text("multilabel")
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }"
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head + b"\n"
    with tarfile.open(root / "test" / "0.tar", "w") as archive:
        add(archive, "0.png", picture())
        add(archive, "0.npy", npy)
    text = (
        "tasks:\n- task: multilabel\n  set: a\n"
        "  data: {path: claims, split: test, templates: 'a {}'}\n"
    )
    return [suite(place, text)]


@case
def settings_with_tags(place: Place) -> list[Words]:
    (place.inside / "evil.yaml").write_text(f"model: {TAGS}\n")
    return [["fit", *RECIPE, "-c", "evil.yaml"]]


@case
def settings_that_are_not_what_their_tag_says(place: Place) -> list[Words]:
    doors = []
    for number, value in enumerate(UNREADABLE):
        (place.inside / f"{number}.yaml").write_text(f"model: {{embed_dim: {value}}}\n")
        doors.append(["fit", *RECIPE, "-c", f"{number}.yaml"])
    return doors


@case
def settings_of_billion_laughs(place: Place) -> list[Words]:
    (place.inside / "laughs.yaml").write_text(f"{LAUGHS}model: {{embed_dim: *a39}}\n")
    return [["fit", *RECIPE, "-c", "laughs.yaml"]]


@case
def settings_nested_deeply(place: Place) -> list[Words]:
    (place.inside / "deep.yaml").write_text(f"model: {DEEP_JSON}\n")
    return [["fit", *RECIPE, "-c", "deep.yaml"]]


# --- Data --------------------------------------------------------------------------------------


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "blue").save(buffer, "PNG")
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, content: bytes, **header: Any) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in header.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def fit_on(path: str) -> Words:
    return ["fit", *RECIPE[:-1], path]


def stream_of(path: str) -> Words:
    return [*fit_on(path), "--data.streaming=true", "--trainer.max_steps=2"]


@case
def tar_that_leads_out(place: Place) -> list[Words]:
    folder = place.inside / "tars"
    folder.mkdir()
    secret = str(place.outside / "secret0.png")
    with tarfile.open(folder / "train-0.tar", "w") as archive:
        for number in range(16):
            add(archive, f"{number}.png", picture())
            add(archive, f"{number}.txt", b"a caption")
        add(archive, "../../outside/escaped.png", picture())
        add(archive, str(place.outside / "escaped.png"), picture())
        add(archive, "link.png", b"", type=tarfile.SYMTYPE, linkname=secret)
        add(archive, "link.txt", b"a secret")
        add(archive, "hard.png", b"", type=tarfile.LNKTYPE, linkname=secret)
        add(archive, "hard.txt", b"a secret")
        add(archive, "device.png", b"", type=tarfile.CHRTYPE)
        add(archive, "pipe.png", b"", type=tarfile.FIFOTYPE)
    return [fit_on("tars")]


@case
def tar_that_claims_more_than_it_is(place: Place) -> list[Words]:
    doors = []
    for name, size in (("little", 4096), ("much", 2**40), ("negative", -(2**20))):
        folder = place.inside / name
        folder.mkdir()
        with tarfile.open(folder / "train-0.tar", "w", format=tarfile.GNU_FORMAT) as archive:
            for number in range(12):
                add(archive, f"{number}.png", picture())
                add(archive, f"{number}.txt", b"a caption")
            member = tarfile.TarInfo("last.png")
            member.size = abs(size)
            header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
            if size < 0:
                header[124:136] = b"\xff" + size.to_bytes(11, "big", signed=True)
                header[148:156] = b" " * 8
                header[148:156] = b"%06o\0 " % sum(header)
            assert archive.fileobj is not None
            archive.fileobj.write(bytes(header))
            archive.fileobj.write(picture()[:100])
        data = (folder / "train-0.tar").read_bytes().rstrip(b"\0")
        (folder / "train-0.tar").write_bytes(data)
        doors.append(fit_on(name))
    return doors


def member_header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A header of a tar whose field of the size holds these bytes."""
    member = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    member[124:136] = size.ljust(12, b"\0")
    member[156:157] = kind
    member[148:156] = b" " * 8
    member[148:156] = b"%06o\0 " % sum(member)
    return bytes(member)


@case
def tar_that_goes_in_circles(place: Place) -> list[Words]:
    """Members that end where they begin, or before, and names of names of names."""
    doors = []
    for name, members in {
        "octal": member_header("1.png", b"-1000"),
        "back": member_header("1.png", b"-3000"),
        "base256": member_header("1.png", b"\xff" + (-512).to_bytes(11, "big", signed=True)),
        "device": member_header("1.png", b"-1000", b"V"),
        "name": member_header("1.png", b"-1000", b"L"),
        "names": member_header("1.png", b"0", b"L") * 3000,
    }.items():
        folder = place.inside / name
        folder.mkdir()
        whole = member_header("0.png", b"0")
        (folder / "train-0.tar").write_bytes(whole + members + bytes(1024))
        doors += [fit_on(name), stream_of(name)]
    return doors


@case
def lists_that_lead_out(place: Place) -> list[Words]:
    doors = []
    for number, prefix in enumerate(("../../outside/", f"{place.outside}/")):
        names = [f"{prefix}secret{row}.png" for row in range(SECRETS)]
        folder = place.inside / f"csv{number}"
        folder.mkdir()
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file_name", "caption"])
            writer.writerows([name, f"caption {row}"] for row, name in enumerate(names))
        doors.append(fit_on(folder.name))
        folder = place.inside / f"jsonl{number}"
        folder.mkdir()
        rows = [
            json.dumps({"file_name": name, "caption": f"caption {row}"})
            for row, name in enumerate(names)
        ]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
        doors.append(fit_on(folder.name))
    return doors


def secrets_of(place: Place) -> None:
    """Tables of pictures that are nobody's business."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    captions = [f"secret {number}" for number in range(SECRETS)]
    table = pa.table({"image": [picture()] * SECRETS, "caption": captions})
    pq.write_table(table, place.outside / "secret.parquet")
    with pa.ipc.new_stream(str(place.outside / "secret.arrow"), table.schema) as writer:
        writer.write_table(table)


@case
def readme_that_leads_out(place: Place) -> list[Words]:
    secrets_of(place)
    doors = []
    for number, prefix in enumerate(("../../outside/", f"{place.outside}/")):
        folder = place.inside / f"hub{number}"
        folder.mkdir()
        config = {"config_name": "default", "data_files": f"{prefix}*.parquet"}
        (folder / "README.md").write_text(f"---\n{json.dumps({'configs': [config]})}\n---\n")
        doors += [fit_on(folder.name), stream_of(folder.name)]
    return doors


@case
def saved_folder_that_leads_out(place: Place) -> list[Words]:
    secrets_of(place)
    doors = []
    for number, prefix in enumerate(("../../outside", str(place.outside))):
        folder = place.inside / f"saved{number}"
        folder.mkdir()
        files = [{"filename": f"{prefix}/secret.arrow"}]
        (folder / "state.json").write_text(json.dumps({"_data_files": files}))
        doors += [fit_on(folder.name), stream_of(folder.name)]
        folder = place.inside / f"splits{number}"
        folder.mkdir()
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [prefix]}))
        doors += [fit_on(folder.name), stream_of(folder.name)]
    files = [{"filename": "secret.arrow"}]
    (place.outside / "state.json").write_text(json.dumps({"_data_files": files}))
    return doors


@case
def folders_that_say_what_cannot_be(place: Place) -> list[Words]:
    doors = []
    for number, (file, text) in enumerate(
        [
            ("README.md", "---\nconfigs: [{default: true, x: 2024-13-45}]\n---\n"),
            ("README.md", "---\nconfigs: [{default: true, data_files: [{split: a}]}]\n---\n"),
            ("README.md", f"---\na: {DEEP_JSON}\n---\n"),
            ("README.md", f"---\n{LAUGHS}configs: [*a39]\n---\n"),
            ("state.json", DEEP_JSON),
            ("dataset_dict.json", '{"splits": {"a": 3}}'),
            ("metadata.jsonl", '{"file_name": "0.png", "caption": ' + "1" * 5000 + "}"),
            ("metadata.jsonl", '{"file_name": "0.png", "caption": "a", "\\ud800": 1}'),
        ]
    ):
        folder = place.inside / f"said{number}"
        folder.mkdir()
        (folder / "0.png").write_bytes(picture())
        (folder / file).write_text(text)
        doors += [fit_on(folder.name), stream_of(folder.name)]
    return doors


@case
def list_nested_deeply(place: Place) -> list[Words]:
    folder = place.inside / "deep"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "caption": ' + DEEP_JSON + "}\n")
    return [fit_on("deep")]


@case
def parquet_that_leads_out(place: Place) -> list[Words]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    doors = []
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for number, prefix in enumerate(("../../outside/", f"{place.outside}/")):
        folder = place.inside / f"parquet{number}"
        folder.mkdir()
        images = [{"bytes": None, "path": f"{prefix}secret{row}.png"} for row in range(SECRETS)]
        captions = [f"caption {row}" for row in range(SECRETS)]
        table = pa.table({"image": pa.array(images, kind), "caption": captions})
        pq.write_table(table, folder / "train.parquet")
        doors.append(fit_on(folder.name))
    return doors


@case
def picture_that_is_a_program(place: Place) -> list[Words]:
    folder = place.inside / "postscript"
    folder.mkdir()
    code = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) (w) file\n"
    for number in range(16):
        (folder / f"{number}.png").write_bytes(code)
        (folder / f"{number}.txt").write_text(f"caption {number}")
    return [fit_on("postscript")]


# --- Run folders and result files --------------------------------------------------------------


def run_folder(place: Place, name: str, **files: str) -> Words:
    folder = place.inside / "runs" / name
    folder.mkdir(parents=True)
    whole = {
        "config.yaml": "experiment: x\nmodel: {embed_dim: 3}\n",
        "metrics.jsonl": '{"time": 1.0, "step": 1, "val/loss": 2.0}\n',
        "status.json": '{"status": "finished"}',
    }
    for file, text in (
        whole | {key.replace("_", "."): text for key, text in files.items()}
    ).items():
        (folder / file).write_text(text)
    return ["compare", str(Path("runs") / name), "--html", "report.html"]


@case
def run_folders(place: Place) -> list[Words]:
    metrics = '{"time": 1.0, "step": 1, "../../outside/x": 2.0, "<script>alert(1)</script>": 1.0}\n'
    return [
        run_folder(place, "tags", config_yaml=f"model: {TAGS}\n"),
        *(
            run_folder(place, f"value{number}", config_yaml=f"model: {{embed_dim: {value}}}\n")
            for number, value in enumerate(UNREADABLE)
        ),
        run_folder(place, "laughs", config_yaml=f"{LAUGHS}model: *a39\n"),
        run_folder(place, "deep", config_yaml=f"model: {DEEP_JSON}\n"),
        run_folder(place, "recursive", config_yaml="model: &a [*a]\n"),
        run_folder(place, "metrics", metrics_jsonl=DEEP_JSON + "\n" + DEEP_JSON + "\n"),
        run_folder(place, "values", metrics_jsonl='{"time": 1, "step": 1, "a": [[1]]}\n{"a": 1}\n'),
        run_folder(place, "names", metrics_jsonl=metrics),
        run_folder(place, "status", status_json=DEEP_JSON),
        run_folder(place, "id", status_json='{"id": [["x"]], "chosen": {"step": "../x"}}'),
    ]


def run_to_send(place: Place, name: str, **record: Any) -> Path:
    """A whole run folder, as `clipkit sync` takes it, with what its run.json says besides."""
    run_folder(place, name)
    folder = place.inside / "runs" / name
    said = {"id": name, "experiment": "x", "run_name": name, "began": 1.0, "tags": {}, **record}
    (folder / "run.json").write_text(json.dumps(said))
    return folder


@case
def run_folders_to_send(place: Place) -> list[Words]:
    here = ["--tracking_uri", "sqlite:///mlflow.db"]
    address = run_to_send(place, "address", tracking_uri=f"sqlite:///{place.outside}/evil.db")
    server = run_to_send(place, "server", tracking_uri="http://127.0.0.1:9/evil")
    files = run_to_send(place, "files", artifact_location=str(place.outside / "evil"))
    links = run_to_send(place, "links")
    (links / "pictures").mkdir()
    (links / "pictures" / "a.png").symlink_to(place.outside / "secret0.png")
    (links / "outcomes").symlink_to(place.outside)
    (links / "config-2.yaml").symlink_to(place.outside / "secret.txt")
    doors = [["sync", str(folder)] for folder in (address, server, files, links)]
    for name in ("config.yaml", "metrics.jsonl", ".shipping", ".shipped.json.unfinished"):
        folder = run_to_send(place, f"through{name}")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(place.outside / "secret.json")
        doors.append(["sync", str(folder), *here])
    note = run_to_send(place, "note")
    sent = {"store": f"sqlite:///{place.inside}/mlflow.db", "offset": "x"}
    (note / "shipped.json").write_text(json.dumps(sent))
    return [["sync", "runs"], *doors, ["sync", str(note), *here]]


def result(**changes: Any) -> str:
    whole = {
        "schema": 1,
        "kind": "clipkit-benchmark",
        "model": {"spec": "x", "name": "x", "weights": "0", "embed_dim": 3, "configuration": None},
        "suite": "offline",
        "settings": {"batch_size": 64, "limit": 8, "seed": 0},
        "environment": {},
        "tasks": [],
        "failed": [],
    }
    return json.dumps(whole | changes)


def _task(**changes: Any) -> dict[str, Any]:
    metric = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10, "chance": 0.1, "normalised": 0.4}
    whole = {
        "task": "zeroshot",
        "set": "x",
        "data": {"id": "x", "split": "test", "n": 10, "digest": "0"},
        "settings": {"arguments": {}},
        "main_metric": "top1",
        "metrics": {"top1": metric},
        "outcomes": "out.outcomes/zeroshot-x.parquet",
    }
    return whole | changes


@case
def result_files(place: Place) -> list[Words]:
    (place.outside / "secret.parquet").write_bytes(b"PAR1 secret PAR1")
    files = {
        "deep": DEEP_JSON,
        "laughs": result(tasks=_deep_json(900)),
        "outside": result(tasks=[_task(outcomes="../outside/secret.parquet")]),
        "absolute": result(tasks=[_task(outcomes=str(place.outside / "secret.parquet"))]),
        "numbers": result(tasks=5),
        "set": result(tasks=[_task(set="../../outside/x", task="../../outside")]),
        "infinite": result(tasks=[_task(metrics={"top1": {"value": 1e400}})]),
        "html": result(suite="<script>alert(1)</script>", tasks=[_task(set="<script>")]),
    }
    doors = []
    for name, text in files.items():
        (place.inside / f"{name}.json").write_text(text)
        doors.append(["compare", f"{name}.json", f"{name}.json", "--html", "report.html"])
        words = ["benchmark", str(place.checkpoint), "--suite", "offline", "--limit", "8"]
        doors.append([*words, "--output", f"{name}.json", "--resume"])
    return doors


def _deep_json(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


# --- Folders of other libraries ----------------------------------------------------------------


def open_clip_folder(place: Place, name: str, change: Callable[[dict[str, Any]], object]) -> Words:
    import open_clip
    from safetensors.torch import save_file

    from tests.interop.conftest import OPEN_CLIP

    folder = place.inside / name
    folder.mkdir()
    config = copy.deepcopy({"model_cfg": OPEN_CLIP["vit"], "preprocess_cfg": {}})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False).state_dict()
    save_file(weights, folder / "open_clip_model.safetensors")
    change(config)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return ["benchmark", name, "--suite", "offline", "--limit", "4", "--output", f"{name}.o.json"]


@case
def open_clip_folders(place: Place) -> list[Words]:
    tower, secret = str(place.outside / "tower"), str(place.outside / "secret.txt")

    def text(**changes: Any) -> Callable[[dict[str, Any]], object]:
        return lambda config: config["model_cfg"]["text_cfg"].update(changes)

    def vision(**changes: Any) -> Callable[[dict[str, Any]], object]:
        return lambda config: config["model_cfg"]["vision_cfg"].update(changes)

    doors = [
        open_clip_folder(place, name, change)
        for name, change in {
            "hf_tower": text(hf_model_name=tower),
            "hf_relative": text(hf_model_name="../outside/tower"),
            "hf_hub": text(hf_model_name="hf-hub:evil/tower"),
            "hf_remote": text(hf_model_name="evil/tower"),
            "timm_folder": vision(timm_model_name=f"local-dir:{tower}"),
            "timm_hub": vision(timm_model_name="hf-hub:evil/tower"),
            "merges": text(tokenizer_kwargs={"bpe_path": secret}),
            "remote": text(hf_tokenizer_name="x", tokenizer_kwargs={"trust_remote_code": True}),
            "cache": text(hf_tokenizer_name="x", tokenizer_kwargs={"cache_dir": tower}),
            "unknown": lambda config: config["model_cfg"].update(evil="evil.Encoder"),
            "no_tower": lambda config: config["model_cfg"].update(text_cfg="evil.Encoder"),
            "wide": text(width=2**20, heads=1),
        }.items()
    ]
    deep = open_clip_folder(place, "deep", lambda config: None)
    (place.inside / "deep" / "open_clip_config.json").write_text(DEEP_JSON)
    pickled = open_clip_folder(place, "pickled", lambda config: None)
    (place.inside / "pickled" / "open_clip_model.safetensors").unlink()
    torch.save(Runs(), place.inside / "pickled" / "open_clip_pytorch_model.bin")
    return [*doors, deep, pickled]


def transformers_folder(place: Place, name: str) -> Path:
    import transformers

    from tests.interop.conftest import PICTURE, TOWER, word_tokenizer

    folder = place.inside / name
    word_tokenizer().save_pretrained(folder)
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    config = transformers.SiglipConfig(
        text_config={**TOWER, "vocab_size": 40, "max_position_embeddings": 64},
        vision_config=PICTURE,
    )
    transformers.SiglipModel(config).save_pretrained(folder)
    (folder / "evil.py").write_text(EVIL_CODE)
    return folder


@case
def transformers_folders(place: Place) -> list[Words]:
    code = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoImageProcessor", "AutoProcessor"), "evil.Encoder"
    )
    outside = {
        "vocab_file": str(place.outside / "secret.json"),
        "tokenizer_file": str(place.outside / "tokenizer.json"),
    }
    doors = []
    for name, (file, changes) in {
        "auto_map": ("config.json", {"auto_map": code}),
        "model_type": ("config.json", {"auto_map": code, "model_type": "evil"}),
        "quantised": ("config.json", {"quantization_config": {"quant_method": "evil"}}),
        "kernel": ("config.json", {"_attn_implementation": "evil/kernel"}),
        "kernel2": ("config.json", {"attn_implementation": "evil/kernel"}),
        "processor": ("preprocessor_config.json", {"auto_map": code}),
        "processor2": ("preprocessor_config.json", {"image_processor_type": "evil.Encoder"}),
        "words": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.E", None]}}),
        "words2": ("tokenizer_config.json", {"tokenizer_class": "evil.Encoder"}),
        "words3": ("tokenizer_config.json", outside),
    }.items():
        path = transformers_folder(place, name) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        doors.append(name)
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        name = f"deep_{file[:4]}"
        (transformers_folder(place, name) / file).write_text(DEEP_JSON)
        doors.append(name)
    wide = transformers_folder(place, "wide") / "config.json"
    config = json.loads(wide.read_text())
    config["text_config"].update(hidden_size=2**20, intermediate_size=2**22)
    wide.write_text(json.dumps(config))
    pickled = transformers_folder(place, "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(Runs(), pickled / "pytorch_model.bin")
    return [
        ["benchmark", name, "--suite", "offline", "--limit", "4", "--output", f"{name}.o.json"]
        for name in [*doors, "wide", "pickled"]
    ]
