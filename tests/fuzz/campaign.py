"""Thousands of mutations in worker processes, and what came of them.

python -m tests.fuzz.campaign [--number 10000] [--seed 0] [--workers 2]

Exits with 1 where a process crashed, hung or disagreed with PIL; the line names the mutation, and
`--only NUMBER --save FILE` writes it down.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.mutations import mutate
from tests.fuzz.seeds import FORMS
from tests.fuzz.worker import victims


@dataclass
class Tally:
    """Outcomes by format and mutation, and what was wrong."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def run(
    number: int, *, seed: int = 0, workers: int = 2, module: str = "tests.fuzz.worker",
    forms: Sequence[str] = FORMS,
) -> Tally:  # fmt: skip
    """Judge so many mutations; every one is in the tally, whatever became of its process.

    Args:
        number: of mutations.
        seed: of them.
        workers: processes.
        module: what judges them.
        forms: the formats, which mutations take in turn.
    """
    tally = Tally()
    with ThreadPoolExecutor(workers) as pool:
        parts = [
            pool.submit(_run_part, module, forms, seed, number, start, workers)
            for start in range(workers)
        ]
        for part in parts:
            for found in part.result():
                tally.counts[found["form"], found["kind"], found["outcome"]] += 1
                if "wrong" in found:
                    tally.wrong.append(f"mutation {found['number']} of seed {seed}: {found}")
    return tally


def _run_part(
    module: str, forms: Sequence[str], seed: int, number: int, start: int, step: int
) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    while start < number:
        begun = None
        for line in _lines(module, seed, start, number, step):
            if "begins" in line:
                begun = line["begins"]
            else:
                found.append(line)
                start, begun = int(line["number"]) + step, None
        if begun is None:
            if start < number:
                raise RuntimeError(f"the worker ended before mutation {start}")
            break
        # The process crashed in the midst of it, or ended itself because that hung.
        form = forms[int(begun) % len(forms)]
        found.append(
            {
                "number": begun,
                "form": form,
                "kind": "?",
                "outcome": "CRASH",
                "wrong": "crash or hang",
            }
        )
        start = int(begun) + step
    return found


def _lines(module: str, seed: int, start: int, stop: int, step: int) -> Iterator[dict[str, str]]:
    command = [sys.executable, "-m", module, *map(str, (seed, start, stop, step))]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)


def table(tally: Tally, forms: Sequence[str] = FORMS) -> str:
    """Return how many files of each format ended how, and what of the damage went unnoticed."""
    outcomes = sorted({outcome for _, _, outcome in tally.counts})
    rows = [["", "files", *outcomes]]
    for form in forms:
        counts = [_count(tally, form=form, outcome=outcome) for outcome in outcomes]
        rows.append([form, str(sum(counts)), *map(str, counts)])
    kinds = sorted({kind for _, kind, _ in tally.counts})
    unnoticed = [["changed / changed or refused", *forms]]
    for kind in kinds:
        cells = []
        for form in forms:
            changed = _count(tally, form=form, kind=kind, outcome="changed")
            same = _count(tally, form=form, kind=kind, outcome="same")
            cells.append(f"{changed}/{_count(tally, form=form, kind=kind) - same}")
        unnoticed.append([kind, *cells])
    return "\n".join([*_aligned(rows), "", *_aligned(unnoticed)])


def _count(tally: Tally, **wanted: str) -> int:
    names = ("form", "kind", "outcome")
    return sum(
        count
        for key, count in tally.counts.items()
        if wanted.items() <= dict(zip(names, key, strict=True)).items()
    )


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int)
    parser.add_argument("--save")
    arguments = parser.parse_args()
    if arguments.only is not None:
        every = victims()
        kind, data = mutate(every[arguments.only % len(every)], arguments.only, arguments.seed)
        Path(arguments.save or "mutation").write_bytes(data)
        print(f"{kind}, {len(data)} bytes")
        return 0
    tally = run(arguments.number, seed=arguments.seed, workers=arguments.workers)
    print(table(tally))
    print("\n".join(tally.wrong) or f"{tally.total} mutations, none wrong")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
