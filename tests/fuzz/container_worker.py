"""Judges mutated containers one after another, in a process of its own."""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
from pathlib import Path

from tests.fuzz.containers import judge, mutate, with_pictures
from tests.fuzz.worker import HANG, MEMORY


def main(seed: int, numbers: range) -> None:
    """Judge the mutations of these numbers."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    with with_pictures() as folder:
        for number in numbers:
            print(json.dumps({"begins": number}), flush=True)
            faulthandler.dump_traceback_later(HANG, exit=True)
            form, kind, data = mutate(number, seed)
            found = {"number": number, "form": form, "kind": kind}
            try:
                found["outcome"] = judge(form, data, Path(folder))
            except Exception as error:
                found |= {"outcome": "WRONG", "wrong": f"{type(error).__name__}: {error}"}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    seed, start, stop, step = map(int, sys.argv[1:])
    main(seed, range(start, stop, step))
