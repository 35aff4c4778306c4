"""One case in a process of its own: `python -m tests.hostile.alone CASE ROOT CHECKPOINT PICTURES`.

Every command is announced before it runs, and a hang ends the process: so that whoever started it
knows which one crashed or hung.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from pathlib import Path

from tests.conftest import TINY
from tests.hostile.crafted import CASES
from tests.hostile.running import meet, place_of

HANG = 180.0
"""Seconds after which a command has hung; the slowest of them trains for some."""


def main(name: str, root: Path, checkpoint: Path, pictures: Path) -> None:
    """Run the commands of a case and say how each ended."""
    place = place_of(root, checkpoint, pictures, TINY)
    # Heavy imports first: the bound on memory is on top of them.
    import clipkit.building
    import clipkit.suite.command
    import clipkit.tracking.command  # noqa: F401

    for words in CASES[name](place):
        print(json.dumps({"begins": words}), flush=True)
        faulthandler.dump_traceback_later(HANG, exit=True)
        ending = meet(place, words)
        faulthandler.cancel_dump_traceback_later()
        told = {"words": words, "code": ending.code, "said": ending.said[-1500:]}
        print(json.dumps(told | {"complaints": ending.complaints}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
