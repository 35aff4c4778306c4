"""A run's configuration and surroundings as flat names and values."""

from __future__ import annotations

import getpass
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

REPORTED = ("clipkit", "torch", "lightning", "timm", "tokenizers", "datasets", "mlflow")


def flatten(configuration: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"model.optimizer.lr": 0.001, ...}``: classes by their name, arguments below it.

    The two levels that say nothing to a reader are left out: ``model.loss`` is the class's name
    where the file has ``model.loss.class_path``, ``model.loss.label_smoothing`` its argument.
    """
    return dict(_flat(configuration, ""))


def _flat(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and "class_path" in value:
        yield where, str(value["class_path"]).rpartition(".")[2]
        for key, inner in (value.get("init_args") or {}).items():
            yield from _flat(inner, f"{where}.{key}")
    elif isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _flat(item, f"{where}.{index}")
    else:
        yield where, value


def versions() -> dict[str, str]:
    """Return what the numbers of a run may depend on: ``version.<package>`` and the platform."""
    found = {"version.python": platform.python_version()}
    for package in REPORTED:
        try:
            found[f"version.{package}"] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of the current folder's repository, ``-dirty`` where it has changes."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None


def origin() -> dict[str, str]:
    """Return who started what, as MLflow's own client would tell it."""
    try:
        user = {"mlflow.user": getpass.getuser()}
    except (ImportError, KeyError, OSError):  # a container without a name for the user
        user = {}
    return {**user, "mlflow.source.name": sys.argv[0], "mlflow.source.type": "LOCAL"}


def device_name() -> str:
    """Return the name of the GPU, else of the processor."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
