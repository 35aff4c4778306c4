"""What a run folder says of its run besides metrics: run.json and status.json.

With config.yaml and metrics.jsonl that is all that MLflow is told, so a run can be sent there, or
sent again, from its folder alone.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from clipkit.errors import UserError

RECORD_FILE = "run.json"
STATUS_FILE = "status.json"
SCHEMA = 1


@dataclass(frozen=True)
class RunRecord:
    """Who a run is.

    Args:
        id: made when the run begins; a folder may be deleted and its name be taken anew.
        experiment: its name in MLflow.
        run_name: its name in MLflow.
        began: when, in seconds since 1970.
        tags: of the run in MLflow.
        tracking_uri: where MLflow keeps it; None where nobody has said, or said a password.
        artifact_location: where a new experiment keeps its files; None for MLflow's own choice.
        host: the machine that writes it.
        continued: how often the run was taken up again.
    """

    id: str
    experiment: str
    run_name: str
    began: float
    tags: dict[str, str] = field(default_factory=dict)
    tracking_uri: str | None = None
    artifact_location: str | None = None
    host: str = field(default_factory=platform.node)
    continued: int = 0

    def write(self, folder: Path) -> None:
        """Write run.json."""
        write_json(folder / RECORD_FILE, {"schema": SCHEMA, **asdict(self)})


def read_record(folder: Path) -> RunRecord | None:
    """Return who the run of a folder is, None where it does not say."""
    try:
        said = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / RECORD_FILE}: no JSON ({error})") from error
    known = {one.name for one in fields(RunRecord)}
    try:
        record = RunRecord(**{key: value for key, value in said.items() if key in known})
    except (AttributeError, TypeError) as error:
        raise UserError(f"{folder / RECORD_FILE}: does not describe a run ({error})") from error
    if not _is_well_formed(record):
        raise UserError(f"{folder / RECORD_FILE}: does not describe a run (a type is wrong)")
    return record


def _is_well_formed(record: RunRecord) -> bool:
    """Whether a file that anybody may have written has values of the types that are asked for."""
    texts = (record.id, record.experiment, record.run_name, record.host)
    places = (record.tracking_uri, record.artifact_location)
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(place, str | None) for place in places)
        and isinstance(record.began, int | float)
        and 0 <= record.began < 2**40
        and isinstance(record.tags, dict)
        and all(isinstance(value, str) for value in record.tags.values())
        and type(record.continued) is int
    )


def read_status(folder: Path) -> dict[str, Any]:
    """Return what a run says of its end: one that was killed says that it has not come to it."""
    try:
        status = json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        status = None
    return status if isinstance(status, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write a file that is there whole or as it was before, whatever ends the process."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)  # a link there would be followed
    unfinished.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
