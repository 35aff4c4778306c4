"""Data sets of the Hugging Face hub: an id, or a repository's folder with its README."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import replace
from typing import Any

import yaml

from clipkit import safe_yaml
from clipkit.data.layouts.assembly import Found
from clipkit.data.layouts.listing import split_name, suffix
from clipkit.data.layouts.request import Request, named_file
from clipkit.data.layouts.tables import TABLE_SUFFIXES, read_tables


def read_hub(request: Request) -> Found:
    """Rows of a data set named by its id, downloaded or from the cache of `datasets`.

    Raises:
        UserError: the hub and the cache cannot give it.
    """
    try:
        loaded = _load(request.path)
    # Whatever goes wrong (offline, unknown, gated, broken) has its own class in three libraries.
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise request.error(
            f"is no path here, and the hub cannot give a data set of this id ({reason})"
        ) from error
    files = {
        split_name(name): [part["filename"] for part in rows.cache_files]
        for name, rows in loaded.items()
    }
    found = read_tables(request, "", files, "data set of the hub")
    return replace(found, revision=_revision(files))


def _revision(files: dict[str, list[str]]) -> str | None:
    """Return the commit that the cache of `datasets` names its folder after."""
    folders = {os.path.basename(os.path.dirname(file)) for part in files.values() for file in part}
    commits = [folder for folder in folders if re.fullmatch(r"[0-9a-f]{40}", folder)]
    return commits[0] if len(commits) == len(folders) == 1 else None


def declared_files(request: Request, root: str) -> dict[str, list[str]] | None:
    """Files of each split as the README of a hub repository declares them, else None.

    None, too, where these are no tables or tar files: pictures are found without its help. A split
    whose files are not here has an empty list.

    Raises:
        UserError: several configurations, none of which is the default.
    """
    config = _default_config(request, os.path.join(root, "README.md"))
    declared = _patterns((config or {}).get("data_files"))
    if declared is None:
        return None
    files: dict[str, list[str]] = {}
    for split, patterns in declared.items():
        within = files.setdefault(split, [])
        for pattern in patterns:
            pattern = named_file(root, pattern, by="README.md")
            matches = sorted(glob.glob(pattern, root_dir=root, recursive=True))
            within += [path for path in matches if os.path.isfile(os.path.join(root, path))]
    declared_kinds = {suffix(path) for within in files.values() for path in within}
    return files if declared_kinds and declared_kinds <= TABLE_SUFFIXES | {".tar"} else None


def _patterns(declared: object) -> dict[str, list[str]] | None:
    """The patterns of each split; None where nothing is declared as the hub wants it."""
    if isinstance(declared, dict):
        entries = list(declared.items())
    elif isinstance(declared, list) and all(isinstance(entry, dict) for entry in declared):
        entries = [(entry.get("split"), entry.get("path")) for entry in declared]
    else:
        entries = [("train", declared)]
    patterns: dict[str, list[str]] = {}
    for split, paths in entries:
        paths = [paths] if isinstance(paths, str) else paths
        is_known = isinstance(split, str) and isinstance(paths, list)
        if not is_known or not all(isinstance(path, str) for path in paths):
            return None
        patterns.setdefault(split_name(split), []).extend(paths)
    return patterns


def _load(name: str) -> Any:
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    # Without network the download tries for half a minute; a question fails at once.
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError:
        raise
    except Exception:  # the HTTP client, and so its errors, differ between versions
        datasets.config.HF_HUB_OFFLINE = True  # what is in the cache is all there is
    try:
        return datasets.load_dataset(name)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _default_config(request: Request, readme: str) -> dict[str, Any] | None:
    if not os.path.isfile(readme):
        return None
    with open(readme, encoding="utf-8", errors="replace") as stream:
        if stream.readline().strip() != "---":
            return None
        header, closed, _ = stream.read().partition("\n---")
    try:
        card = safe_yaml.load(header) if closed else None
    except yaml.YAMLError:
        return None  # not written for us; the files say enough
    listed = card.get("configs") if isinstance(card, dict) else None
    configs = [c for c in listed if isinstance(c, dict)] if isinstance(listed, list) else []
    default = [c for c in configs if c.get("default") or c.get("config_name") == "default"]
    if len(configs) > 1 and not default:
        names = ", ".join(str(config.get("config_name")) for config in configs)
        raise request.error(
            f"holds several configurations ({names}); pass the files of one, as a folder or a"
            " pattern such as DIR/NAME/*.parquet"
        )
    return next(iter(default or configs), None)
