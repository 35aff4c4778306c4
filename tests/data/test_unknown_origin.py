"""Files of unknown origin: what they name stays within their folder, what they say is checked."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipkit.data.layouts import open_layout
from clipkit.data.streaming.opening import open_stream
from clipkit.errors import UserError

DIGITS = "1" * 5000  # more than Python reads as a number

doors = pytest.mark.parametrize("door", [open_layout, open_stream])


def png(shade: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def table() -> pa.Table:
    return pa.table({"image": [png(n) for n in range(4)], "caption": [f"a {n}" for n in range(4)]})


def write_parquet(path: Path, features: bytes | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = None if features is None else {b"huggingface": features}
    pq.write_table(table().replace_schema_metadata(metadata), path)


def write_arrow(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(path), table().schema) as writer:
        writer.write_table(table())


def write_tar(path: Path, field: str, content: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        for number in range(4):
            for name, data in (("png", png(number)), (field, content)):
                member = tarfile.TarInfo(f"{number}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_list(folder: Path, field: str) -> None:
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png(number))
    lines = [f'{{"file_name": "{n}.png", "caption": "a {n}", {field}}}' for n in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def readme(folder: Path, card: str) -> None:
    (folder / "README.md").write_text(f"---\n{card}\n---\n# A data set\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for a data set, beside one that is nobody's business."""
    write_parquet(tmp_path / "outside" / "secret.parquet")
    write_arrow(tmp_path / "outside" / "secret.arrow")
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


def refused(door: Callable[..., object], path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        door(str(path))
    message = str(caught.value)
    assert message.startswith("data.dataset")
    assert "\n" not in message
    for word in words:
        assert word in message


# --- What they name --------------------------------------------------------------------------


@doors
@pytest.mark.parametrize("prefix", ["../outside/", "data/../../outside/", "/outside/"])
def test_a_readme_that_leads_out(door: Callable[..., object], prefix: str, folder: Path) -> None:
    secret = prefix.replace("/outside/", f"{folder.parent}/outside/", not prefix.startswith("."))
    for form in ('"{}"', '["{}"]', '[{{split: train, path: "{}"}}]', '{{train: "{}"}}'):
        for name in ("*.parquet", "secret.parquet"):
            data_files = form.format(secret + name)
            readme(folder, f"configs: [{{default: true, data_files: {data_files}}}]")
            refused(door, folder, "README.md names", "outside of")


@doors
def test_saved_folders_that_lead_out(door: Callable[..., object], folder: Path) -> None:
    secret = folder.parent / "outside" / "secret.arrow"
    (folder / "train").mkdir()
    for place, name in (("", "../outside/secret.arrow"), ("", str(secret)),
                        ("train", "../../outside/secret.arrow")):  # fmt: skip
        state = folder / place / "state.json"
        state.write_text(json.dumps({"_data_files": [{"filename": name}]}))
        if place:
            (folder / "dataset_dict.json").write_text(json.dumps({"splits": [place]}))
        refused(door, folder, "state.json names", "outside of")
    (folder.parent / "outside" / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "secret.arrow"}]})
    )
    for name in ("../outside", str(secret.parent)):
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [name]}))
        refused(door, folder, "dataset_dict.json names", "outside of")


@doors
def test_files_within_are_found_as_they_are_named(
    door: Callable[..., object], folder: Path
) -> None:
    write_parquet(folder / "data" / "a.parquet")
    for declared in ("./data/*.parquet", "data/../data/a.parquet", "**/*.parquet"):
        readme(folder, f'configs: [{{default: true, data_files: {{test: "{declared}"}}}}]')
        assert list(door(str(folder)).splits) == ["test"]  # type: ignore[attr-defined]


@doors
def test_links_of_a_folder_may_lead_out(door: Callable[..., object], folder: Path) -> None:
    """As those of the hub's own cache do."""
    (folder / "a.parquet").symlink_to(folder.parent / "outside" / "secret.parquet")
    readme(folder, "configs: [{default: true, data_files: a.parquet}]")
    assert list(door(str(folder)).splits) == ["train"]  # type: ignore[attr-defined]


# --- What they say ---------------------------------------------------------------------------


@doors
@pytest.mark.parametrize(
    "card",
    [
        "configs: [a, b]", "configs: 3", "configs: {a: b}", "configs: [{default: true}, 3]",
        "configs: [{default: true, data_files: [{split: train}]}]",
        "configs: [{default: true, data_files: [{split: 3, path: a.parquet}]}]",
        "configs: [{default: true, data_files: [{split: train, path: 3}]}]",
        "configs: [{default: true, data_files: [a.parquet, 3]}]",
        "configs: [{default: true, data_files: 3}]", "a: " + "[" * 3000, "- a", "3",
    ],
)  # fmt: skip
def test_a_readme_that_is_none_of_the_hub(
    door: Callable[..., object], card: str, folder: Path
) -> None:
    write_parquet(folder / "a.parquet")
    readme(folder, card)
    assert "caption column caption" in door(str(folder)).describe()  # type: ignore[attr-defined]


@doors
@pytest.mark.parametrize("text", ['{"_data_', '{"x": 1}', "[]", '{"_data_files": 3, "splits": 3}',
                                  '{"_data_files": [{}], "splits": [3]}', "[" * 100_000, "\xff",
                                  f'{{"_data_files": {DIGITS}}}'])  # fmt: skip
def test_saved_folders_that_are_damaged(
    door: Callable[..., object], text: str, folder: Path
) -> None:
    for name in ("state.json", "dataset_dict.json"):
        (folder / name).write_bytes(text.encode("latin-1"))
        refused(door, folder, name, "not as datasets writes it")


@doors
@pytest.mark.parametrize(
    "features", [b"", b'{"info":', b"[]", b'{"info": {"features": 3}}', b"[" * 100_000, b"\xff"]
)
def test_features_that_are_none(door: Callable[..., object], features: bytes, folder: Path) -> None:
    write_parquet(folder / "a.parquet", features)
    assert "caption column caption" in door(str(folder)).describe()  # type: ignore[attr-defined]


@doors
@pytest.mark.parametrize("names", ["[1, 2]", '["\\ud800", null]', "[[], {}]"])
def test_names_of_classes_that_are_no_texts(
    door: Callable[..., object], names: str, folder: Path
) -> None:
    label = f'{{"info": {{"features": {{"label": {{"names": {names}}}}}}}}}'
    columns = {"image": table().column("image"), "label": pa.array([0, 1, 0, 1])}
    found = pa.table(columns).replace_schema_metadata({b"huggingface": label.encode()})
    pq.write_table(found, folder / "a.parquet")
    assert "caption column label" in door(str(folder)).describe()  # type: ignore[attr-defined]


@doors
def test_classes_of_a_column_of_texts(door: Callable[..., object], folder: Path) -> None:
    write_parquet(folder / "a.parquet", b'{"info": {"features": {"caption": {"names": ["a"]}}}}')
    assert "caption column caption" in door(str(folder)).describe()  # type: ignore[attr-defined]


@doors
def test_fields_of_tars(door: Callable[..., object], folder: Path) -> None:
    path = folder / "a.tar"
    write_tar(path, "cls", b"9" * 30)
    assert "caption column cls" in door(str(path)).describe()  # type: ignore[attr-defined]
    (folder / "classes.txt").write_bytes(b"\xff\xfe\x80")
    refused(door, path, "classes.txt", "not UTF-8")
    (folder / "classes.txt").unlink()
    write_tar(path, "json", f'{{"caption": "a", "n": {DIGITS}}}'.encode())
    refused(door, path, "0.json", "is no JSON object")
    write_tar(path, "json", b'{"caption": "a", "n": 1' + b"1" * 30 + b', "\\ud800": 1}')
    assert "caption column caption" in door(str(path)).describe()  # type: ignore[attr-defined]


@doors
@pytest.mark.parametrize(
    "field", [f'"n": {"1" * 30}', f'"n": [{"1" * 30}]', '"\\ud800": 1', '"n": "\\ud800"',
              f'"n": {"[" * 900}{"]" * 900}'],
)  # fmt: skip
def test_lists_with_odd_fields(door: Callable[..., object], field: str, folder: Path) -> None:
    write_list(folder, field)
    opened = door(str(folder))
    assert "caption column caption" in opened.describe()  # type: ignore[attr-defined]
    if door is open_layout:
        opened.fingerprint  # type: ignore[attr-defined]  # noqa: B018
        assert opened.columns[0] == "caption"  # type: ignore[attr-defined]
        "".join(opened.columns).encode()  # type: ignore[attr-defined]


@doors
def test_a_list_with_endless_numbers(door: Callable[..., object], folder: Path) -> None:
    write_list(folder, f'"n": {DIGITS}')
    refused(door, folder, "metadata.jsonl", "line 1")


@doors
@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), KeyError("a"), TypeError(), AttributeError(), OverflowError(),
              RecursionError(), pa.ArrowNotImplementedError("a")],
)  # fmt: skip
def test_what_nobody_thought_of_is_a_sentence(
    door: Callable[..., object], error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    write_parquet(folder / "a.parquet")
    for module in ("clipkit.data.layouts", "clipkit.data.streaming.opening"):
        monkeypatch.setattr(f"{module}.declared_files", fails)
    refused(door, folder, "cannot be read", type(error).__name__)
