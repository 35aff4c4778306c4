"""Where MLflow keeps its runs: what is typed, and what of it can be refused before training."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import urllib.error
import urllib.request
from importlib.metadata import entry_points
from pathlib import Path

from clipkit.errors import UserError, did_you_mean

DEFAULT_URI = "sqlite:///mlflow.db"
SERVERS = ("http", "https")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_OTHERS = ("databricks", "databricks-uc", "uc")
_SECONDS_TO_OPEN = 5.0
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):([^/@]*)@")


def given_or_default(uri: str | None = None) -> str:
    """Return the address that was given, else the environment's, else sqlite in this folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def is_default(uri: str) -> bool:
    """Return whether an address is what is used here where none is given."""
    return absolute(uri) == absolute(given_or_default())


def is_server(uri: str) -> bool:
    """Return whether a server answers there, and not a file or a database."""
    return uri.partition(":")[0] in SERVERS


def refuse_unusable(uri: str, option: str = "trainer.logger.tracking_uri") -> None:
    """Refuse at once what no waiting would mend; a server that does not answer may come back.

    Args:
        uri: as MLflow takes it.
        option: where it was given, for the message.
    """
    instead = f"leave it out for {DEFAULT_URI}"
    if uri == DEFAULT_URI:
        instead = "work in a folder that you may write to, or name a file elsewhere"
    scheme = uri.partition(":")[0]
    if scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        try:
            with sqlite3.connect(path, timeout=_SECONDS_TO_OPEN) as connection:
                connection.execute("PRAGMA user_version")
            connection.close()
        except sqlite3.Error as error:
            raise UserError(f"{option}: {uri} cannot be opened ({error}); {instead}") from error
    elif scheme in ("file", uri) and uri not in _OTHERS:
        raise UserError(
            f"{option}: {uri} is a file store, which MLflow has given up; "
            f"use sqlite:///FILE, or {instead}"
        )
    elif scheme.partition("+")[0] not in (known := _schemes()):
        raise UserError(
            f"{option}: {without_password(uri)}: MLflow knows no {scheme}:; "
            f"{did_you_mean(scheme, known)}use http://HOST:PORT or sqlite:///FILE, or {instead}"
        )


def refuse_unreachable(uri: str, option: str) -> None:
    """Refuse a server that does not answer, within seconds, for what is nothing without it."""
    if not is_server(uri):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=_SECONDS_TO_OPEN):
            return
    except urllib.error.HTTPError:
        return  # it answers: a proxy may hide /health, and MLflow will say what it wants
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", "") or error)
        raise UserError(
            f"{option}: {without_password(uri)} cannot be reached ({reason}); start the server, or "
            f"name another address"
        ) from error


def quieten() -> None:
    """Have MLflow and its database speak of what is wrong only."""
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _schemes() -> set[str]:
    plugins = {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}
    return {*SERVERS, *_DATABASES, *_OTHERS, *plugins}


def without_password(uri: str) -> str:
    """Return an address that may be shown and stored."""
    return _PASSWORD.sub(r"\1:***@", uri)


def holds_password(uri: str) -> bool:
    """Return whether an address is a secret."""
    return _PASSWORD.search(uri) is not None


def absolute(uri: str) -> str:
    """Return an address that means the same in every folder."""
    file = uri.removeprefix("sqlite:///")
    return uri if file in (uri, "") else f"sqlite:///{os.path.abspath(file)}"
