"""The recipes that ship with clipkit: finding one by its name."""

from __future__ import annotations

from pathlib import Path

from clipkit.errors import UserError, did_you_mean

BASE = "base"


def folder() -> Path:
    """Return where the recipes lie: inside the package in a wheel, beside it in a source tree."""
    inside = Path(__file__).parent / "experiments"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "experiments"


def names() -> list[str]:
    """Return every recipe's name, such as ``emoji`` or ``ablations/siglip``."""
    return sorted(
        path.relative_to(folder()).with_suffix("").as_posix() for path in folder().rglob("*.yaml")
    )


def find(name: str) -> Path:
    """Return the file of ``-c NAME``: an existing file of that name wins over a recipe."""
    if Path(name).is_file():
        return Path(name)
    recipe = folder() / f"{name.removesuffix('.yaml').removeprefix('experiments/')}.yaml"
    if recipe.is_file():
        return recipe
    beside = [path.name for path in Path(name).parent.glob("*.yaml")]
    hint = did_you_mean(name, [*beside, *names()], cutoff=0.5)
    raise UserError(
        f"-c {name}: neither a file nor a recipe; {hint}the recipes are {', '.join(names())}"
    )


def summary(path: Path) -> str:
    """Return what a recipe's first comment says it is for: the line below the command."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return lines[1].lstrip("# ") if len(lines) > 1 else ""
