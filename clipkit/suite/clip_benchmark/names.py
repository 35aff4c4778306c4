"""Class names, templates and prompts from text files and JSON."""

from __future__ import annotations

import json
import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from clipkit.data.layouts.columns import lines_of
from clipkit.errors import UserError, named

_REFERENCE = re.compile(r"([^{}]+\.(?:json|txt))(?:#(.+))?", re.IGNORECASE)


def is_reference(text: str) -> bool:
    """Whether a text names a file of class names or templates: FILE.txt, FILE.json, with #KEY."""
    return _REFERENCE.fullmatch(text) is not None


def read_reference(reference: str, *, folder: str = "", key: str = "") -> Any:
    """Read class names, templates or prompts from a file.

    Args:
        reference: `FILE.txt` (one a line), `FILE.json#KEY`, or `FILE.json`, which is whole a list,
            or has the given key.
        folder: what a relative path is relative to.
        key: looked up where the reference names none: the name of the data set.

    Returns:
        A list of texts, or, of class-specific prompts (CuPL), a list for each class name.

    Raises:
        UserError: no such file or key, or it holds something else.
    """
    match = _REFERENCE.fullmatch(reference)
    assert match is not None
    path = os.path.join(folder, os.path.expanduser(match[1]))
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path!r}")
    if path.lower().endswith(".txt"):
        return read_lines(path)
    held = read_json(path)
    if isinstance(held, dict) and (match[2] or not _is_prompts(held) or key in held):
        wanted = match[2] or key
        if wanted not in held:
            close = get_close_matches(wanted, list(held), n=1)
            hint = f"did you mean {match[1]}#{close[0]}? " if close else ""
            raise UserError(
                f"{path!r} has no key {wanted!r}; {hint}it has: {named(list(held), 20)}"
            )
        held = held[wanted]
    elif match[2]:
        raise UserError(f"{path!r} has no keys, so no {match[2]!r}")
    if not _is_texts(held) and not _is_prompts(held):
        where = f"{path!r} at {match[2] or key!r}"
        raise UserError(f"{where} holds neither a list of texts nor prompts for each class")
    return held


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file, stripped; an empty one counts, the last line's end does not.

    Raises:
        UserError: it is no UTF-8 text.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path!r} is not UTF-8 text") from error
    return [line.strip() for line in lines_of(text.removesuffix("\n"))] if text else []


def read_json(path: str) -> Any:
    """Return what a JSON file holds; anything else is one sentence."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            return json.load(stream)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path!r} is not JSON ({error})") from error
    except OSError as error:
        raise UserError(f"{path!r} cannot be read ({error.strerror})") from error


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_prompts(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_texts, value.values()))
