"""The options of clipkit's own commands: argparse that ends in one sentence."""

from __future__ import annotations

import argparse
import re
from difflib import get_close_matches
from typing import Any, NoReturn

from clipkit.errors import UserError, did_you_mean

_UNKNOWN = "unrecognized arguments: "
_INVALID = re.compile(r"invalid choice: '(.*?)' \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """Takes whole options only; a mistake is a UserError and no page of usage."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            word = message.removeprefix(_UNKNOWN).split()[0]
            options = [option for action in self._actions for option in action.option_strings]
            close = get_close_matches(word.partition("=")[0], options, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "--help lists what there is"
            message = f"{word}: no such option; {hint}"
        if chosen := _INVALID.search(message):
            known = re.findall(r"[\w-]+", chosen[2])
            hint = did_you_mean(chosen[1], known, cutoff=0.5)
            option = message.removeprefix("argument ").partition(":")[0]
            message = f"{option}: unknown {chosen[1]!r}; {hint}known are: {', '.join(known)}"
        raise UserError(f"{self.prog.removeprefix('clipkit ')}: {message}")
