"""Short digests of what decides a score, by which results are told apart."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from typing import Any


def digest_of_texts(items: Iterable[str] | None) -> str | None:
    """Return a digest of a list of texts, in its order."""
    return None if items is None else digest_of_values(list(items))


def digest_of_values(values: Any) -> str:
    """Return a digest of plain values; the order of keys does not matter."""
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
