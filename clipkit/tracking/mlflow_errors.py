"""What becomes of a call to MLflow that fails: try again, leave out, or begin anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")
_LONGEST_REASON = 160


class UnreachableError(Exception):
    """The store did not answer or could not do it; later it may."""


class RefusedError(Exception):
    """The store will not take what it was given, however often."""


class MissingError(Exception):
    """The store does not know the run."""


@contextmanager
def told_apart() -> Iterator[None]:
    """Turn what the client, the network or the database raises into one of the three."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise MissingError(_reason(error)) from error
        if error.error_code in _REFUSED:
            raise RefusedError(_reason(error)) from error
        raise UnreachableError(_reason(error)) from error
    except Exception as error:  # requests, urllib3, SQLAlchemy, sqlite3, a plugin's own
        raise UnreachableError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """Return why, in few words."""
    text = str(error)
    if system := re.search(r"\[Errno -?\d+\] ([\w ]+)", text):
        return system[1].lower()
    if re.search(r"timed? ?out", text, re.IGNORECASE):
        return "no answer in time"
    if "database is locked" in text:
        return "the database is locked"
    if innermost := re.findall(r"'([^']+)'", text.partition("Caused by")[2]):
        return str(innermost[-1]).lower()
    first = text.strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return first if len(first) <= _LONGEST_REASON else f"{first[:_LONGEST_REASON]} ..."
