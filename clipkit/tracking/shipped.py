"""What MLflow has of a run: shipped.json of its folder, and what it is still to be told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from clipkit.tracking.journal_file import JOURNAL_FILE, points_after
from clipkit.tracking.run_record import RECORD_FILE, STATUS_FILE, read_status
from clipkit.tracking.tracking_uri import absolute, without_password

SHIPPED_FILE = "shipped.json"
WRITTEN_ONCE = ("config*.yaml", "pictures/*")
EVERYTHING = (*WRITTEN_ONCE, "outcomes/*", "quarantine.jsonl")
RECORDS = ("*.json", "*.jsonl", "config.yaml", ".*")
"""What is read and written of a run folder besides the files that are sent."""
ENDS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


@dataclass
class Shipped:
    """What MLflow has of a run.

    Args:
        store: the address it was sent to; another has none of it.
        run_id: MLflow's; None before the run was made there.
        experiment_id: MLflow's.
        offset: bytes of the journal that it has.
        epoch: the step and epoch that it was told last.
        has_non_finite: whether a value was no finite number.
        described: which configuration and tags it has.
        files: which version of each file it has.
        status: which status it was told.
    """

    store: str
    run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0
    epoch: list[int] | None = None
    has_non_finite: bool = False
    described: str = ""
    files: dict[str, str] = field(default_factory=dict)
    status: str | None = None


def read_shipped(folder: Path, uri: str) -> Shipped:
    """Return what a store has of the run of a folder, as the folder knows it."""
    store = without_password(absolute(uri))
    try:
        said = json.loads((folder / SHIPPED_FILE).read_text(encoding="utf-8"))
        known = {one.name for one in fields(Shipped)}
        shipped = Shipped(**{key: value for key, value in said.items() if key in known})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return Shipped(store)  # all is sent again, and taken once
    return shipped if shipped.store == store and _is_well_formed(shipped) else Shipped(store)


def left(folder: Path, shipped: Shipped) -> int:
    """Return how many points of the journal a store has not."""
    return points_after(folder / JOURNAL_FILE, shipped.offset)


def is_complete(folder: Path, shipped: Shipped) -> bool:
    """Return whether a store has the whole run, how it ended included."""
    said = str(read_status(folder).get("status"))
    return (
        left(folder, shipped) == 0
        and shipped.described == description_of(folder)
        and all(
            shipped.files.get(name) == version for name, version in files_of(folder, EVERYTHING)
        )
        and shipped.status == ENDS.get(said, shipped.status)
    )


def files_of(folder: Path, patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the files of a run that MLflow is to have, and which version of each is there.

    A link that leads out of the folder is no file of the run: who made it may be after any file of
    whoever sends it.
    """
    for path in _matching(folder, patterns):
        if not _leads_out(folder, path) and path.is_file():
            yield str(path.relative_to(folder)), version_of(path)


def links_out_of(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return the names in a folder that are links to what lies elsewhere."""
    found = _matching(folder, patterns)
    return [str(path.relative_to(folder)) for path in found if _leads_out(folder, path)]


def _matching(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Yield what is there; of a folder that is a link to one elsewhere the link alone."""
    for pattern in patterns:
        within = (folder / pattern).parent
        yield from [within] if _leads_out(folder, within) else sorted(folder.glob(pattern))


def _leads_out(folder: Path, path: Path) -> bool:
    return not path.resolve().is_relative_to(folder.resolve())


def description_of(folder: Path) -> str:
    """Return which version of its names, tags and end a run folder has."""
    return " ".join(version_of(folder / name) for name in (RECORD_FILE, STATUS_FILE))


def version_of(path: Path) -> str:
    """Return what changes when a file does; nothing where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ""
    return f"{found.st_size}-{found.st_mtime_ns}"


def _is_well_formed(shipped: Shipped) -> bool:
    """Whether a file that anybody may have written has values of the types that are asked for."""
    epoch, files = shipped.epoch, shipped.files
    return (
        isinstance(shipped.run_id, str | None)
        and isinstance(shipped.experiment_id, str | None)
        and type(shipped.offset) is int
        and 0 <= shipped.offset < 2**63
        and (epoch is None or isinstance(epoch, list))
        and isinstance(shipped.has_non_finite, bool)
        and isinstance(shipped.described, str)
        and isinstance(files, dict)
        and all(isinstance(version, str) for version in files.values())
        and isinstance(shipped.status, str | None)
    )
