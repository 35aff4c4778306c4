"""``clipkit sync``: what MLflow has not of a run is sent from the run's folder."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.arguments import Parser
from clipkit.errors import UserError, named

if TYPE_CHECKING:
    from clipkit.tracking.run_record import RunRecord

EPILOG = """\
examples:
  clipkit sync runs/emoji/run_a                         what a server that was away has missed
  clipkit sync runs/emoji                               every run of an experiment
  clipkit sync runs/emoji/run_a --tracking_uri http://HOST:5000
                                                        a copy of the run in another store

What MLflow has already is not sent again, so it may be run as often as wanted; also after a run was
killed, which is then given the status KILLED.
"""
_ATTEMPTS = 3
_SECONDS_FOR_THE_LAST = 60.0  # another process may be about to end with the run


def run(arguments: Sequence[str]) -> int:
    """Run ``clipkit sync`` with the words after its name; returns the exit code."""
    options = _parser().parse_args([*arguments])
    for what in options.run:
        folders = [*_folders(what)]
        for folder in folders:
            try:
                said = _sync(folder, options.tracking_uri, options.artifact_location)
            except _LeftAloneError as error:
                if len(folders) == 1:
                    raise UserError(f"sync {folder}: {error}") from error
                said = str(error)
            print(f"{folder}: {said}", flush=True)
    return 0


class _LeftAloneError(Exception):
    """A run that is not to be sent, and why."""


def _folders(what: str) -> Iterator[Path]:
    """Yield the run folders that a word stands for."""
    from clipkit.tracking.folder_runs import is_run_folder

    path = Path(what).expanduser()
    if not path.is_dir() and not path.is_absolute() and (Path("runs") / path).is_dir():
        path = Path("runs") / path
    if is_run_folder(path):
        yield path
        return
    inner = sorted(filter(is_run_folder, path.iterdir())) if path.is_dir() else []
    if not inner:
        raise UserError(
            f"sync {what}: no run folder; accepted is runs/<experiment>/<run>, or runs/<experiment>"
            " for all of its runs"
        )
    yield from inner


def _sync(folder: Path, uri: str | None, location: str | None) -> str:
    """Send what is left of a run; return what is to be said of it."""
    from clipkit.tracking.journal_file import JOURNAL_FILE
    from clipkit.tracking.locks import holding, is_held
    from clipkit.tracking.run_record import read_record
    from clipkit.tracking.shipment import LOCK_FILE
    from clipkit.tracking.shipped import RECORDS, links_out_of

    if outside := links_out_of(folder, RECORDS):
        raise _LeftAloneError(f"left alone; {outside[0]!r} is a link that leads out of it")
    record = read_record(folder)
    if record is None:
        raise _LeftAloneError("left alone; it has no run.json, and an older clipkit has sent it")
    if not (folder / JOURNAL_FILE).is_file():
        raise _LeftAloneError("left alone; it has no metrics.jsonl")
    if is_held(folder / JOURNAL_FILE):
        raise _LeftAloneError("left alone; it is being written just now, and sent as it is written")
    try:
        with holding(folder / LOCK_FILE, wait=_SECONDS_FOR_THE_LAST) as free:
            if not free:
                raise _LeftAloneError("left alone; another process is sending it")
            _refuse_places_of_others(record, uri, location)
            return _send(folder.resolve(), uri, replace(record, artifact_location=location or None))
    except OSError as error:
        raise UserError(
            f"sync {folder}: the folder cannot be written ({error.strerror}), and what was sent "
            "is noted there"
        ) from error


def _refuse_places_of_others(record: RunRecord, uri: str | None, location: str | None) -> None:
    """Leave a run alone that names places which the person has not named.

    Whoever hands on a folder has written its run.json: no host and no path in it proves anything.
    """
    from clipkit.tracking.tracking_uri import is_default

    places = []
    if uri is None and record.tracking_uri is not None and not is_default(record.tracking_uri):
        places.append(f"--tracking_uri {_to_type(record.tracking_uri)}")
    if location is None and record.artifact_location is not None:
        places.append(f"--artifact_location {_to_type(record.artifact_location)}")
    if places:
        raise _LeftAloneError(
            "left alone; its run.json names a place to send it to, as that of a folder from "
            f"elsewhere might too; if it is right, add {' '.join(places)}"
        )


def _to_type(place: str) -> str:
    """Return a text of unknown origin as it would be typed, on one line."""
    place = place[:500]
    return shlex.quote(place) if place.isprintable() else ascii(place)


def _send(folder: Path, given: str | None, record: RunRecord) -> str:
    from clipkit.tracking.left_running import end_those
    from clipkit.tracking.mlflow_errors import RefusedError, UnreachableError
    from clipkit.tracking.shipment import Shipment
    from clipkit.tracking.shipped import EVERYTHING, left, links_out_of
    from clipkit.tracking.tracking_uri import (
        given_or_default,
        refuse_unreachable,
        refuse_unusable,
        without_password,
    )

    uri = given or given_or_default()
    refuse_unusable(uri, "--tracking_uri")
    refuse_unreachable(uri, "--tracking_uri")
    shipment = Shipment(folder, uri, record)
    for attempt in range(_ATTEMPTS):
        try:
            shipment.send(ended=True)
            assert shipment.shipped.experiment_id is not None
            end_those(shipment.client, shipment.shipped.experiment_id)
            break
        except RefusedError as error:
            raise _LeftAloneError(f"left alone; MLflow takes no more of it ({error})") from error
        except UnreachableError as error:
            if attempt == _ATTEMPTS - 1:
                points = left(folder, shipment.shipped)
                raise UserError(
                    f"sync {folder}: {without_password(uri)} does not take it ({error}); "
                    f"{shipment.sent:,} points were sent and {points:,} are left, so run it again"
                ) from error
            time.sleep(2.0**attempt)
    sent = f"{shipment.sent:,} points sent" if shipment.sent else "nothing was left"
    refused = f"; MLflow refused {shipment.refused[0]}" if shipment.refused else ""
    links = links_out_of(folder, EVERYTHING)
    left_out = (
        f"; left out, as it leads out of the folder: {named([*map(repr, links)])}" if links else ""
    )
    has = f"{without_password(uri)} has all of it, {shipment.shipped.status}"
    return f"{sent}; {has}{refused}{left_out}"


def _parser() -> Parser:
    parser = Parser(
        prog="clipkit sync",
        description="Send to MLflow what it has not of a run, from the run's folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        nargs="+",
        metavar="RUN",
        help="a run folder (runs/<experiment>/<run>), or an experiment's for all its runs",
    )
    parser.add_argument(
        "--tracking_uri",
        metavar="URI",
        help="of MLflow; left out, MLFLOW_TRACKING_URI, else sqlite:///mlflow.db",
    )
    parser.add_argument(
        "--artifact_location",
        metavar="URI",
        help="where an experiment that MLflow has not yet keeps its files; '' for MLflow's choice",
    )
    return parser
