"""Judges mutations one after another, in a process of its own: `python -m tests.fuzz.worker`.

It says a number before it begins, and what came of it after, so that a crash or a hang has a name.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
from pathlib import Path

from tests.fuzz.judge import judge, pixels_of
from tests.fuzz.mutations import Victim, mutate
from tests.fuzz.seeds import FORMS, seeds

HANG = 60.0
"""Seconds after which a mutation has hung; the slowest takes a fraction of one."""

MEMORY = 3 * 2**30
"""Bytes that the process may take on top of what it has with its libraries loaded."""


def victims() -> list[Victim]:
    """Return the whole files, the formats in turn."""
    files = seeds()
    most = max(map(len, files.values()))
    return [
        Victim.of(
            form, files[form][place % len(files[form])], files[form][(place + 1) % len(files[form])]
        )
        for place in range(most)
        for form in FORMS
    ]


def main(seed: int, numbers: range) -> None:
    """Judge the mutations of these numbers."""
    all_victims = victims()
    whole = [pixels_of(victim.data) for victim in all_victims]
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    taken = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY,) * 2)
    for number in numbers:
        print(json.dumps({"begins": number}), flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        place = number % len(all_victims)
        victim = all_victims[place]
        kind, data = mutate(victim, number, seed)
        try:
            outcome, wrong = judge(data, whole[place]), ""
        except Exception as error:
            outcome, wrong = "WRONG", f"{type(error).__name__}: {error}"
        print(
            json.dumps(
                {"number": number, "form": victim.form, "kind": kind, "outcome": outcome}
                | ({"wrong": wrong} if wrong else {})
            ),
            flush=True,
        )


if __name__ == "__main__":
    seed, start, stop, step = map(int, sys.argv[1:])
    main(seed, range(start, stop, step))
