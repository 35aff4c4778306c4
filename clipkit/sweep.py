"""`clipkit sweep`: every combination of some options, a process of `clipkit fit` each."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from clipkit import safe_yaml
from clipkit.arguments import Parser
from clipkit.building import configuration_of
from clipkit.errors import UserError
from clipkit.tracking.run_record import read_status

log = logging.getLogger(__name__)

FIT = [sys.executable, "-m", "clipkit.cli", "fit"]
EXAMPLE = (
    "example: clipkit sweep -c base -c emoji --data.dataset DIR "
    "--over model.loss=InfoNCELoss,SigLIPLoss --over model.optimizer.lr=1e-3,2e-3 --seeds 3"
)


class Run(NamedTuple):
    """One place of the grid: what is typed after `clipkit fit`, and what comes of it."""

    words: list[str]
    configuration: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where the run is kept, but for a number where the name is taken."""
        experiment, name = self.configuration["experiment"], self.configuration["run_name"]
        return Path("runs", str(experiment), str(name))


class Outcome(NamedTuple):
    """How the process of a run ended."""

    run: Run
    code: int
    seconds: float
    log: Path


def run(words: Sequence[str]) -> int:
    """Run the command; returns 0 when every run of the grid is finished, else 1."""
    parser = Parser(
        prog="clipkit sweep",
        description="Train every combination of some options, one process a run, one device in "
        "turn. Whatever else is typed goes to `clipkit fit`. A run that is finished is not run "
        "again; one that fails does not end the rest.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--over", action="append", default=[], metavar="KEY=V1,V2", help="may be given repeatedly"
    )
    parser.add_argument("--seeds", type=int, default=1, help="seeds 0 to N - 1 of each combination")
    parser.add_argument("--group", help="tag that the runs share; left out, the experiment's name")
    parser.add_argument(
        "--print", action="store_true", help="print the commands, for a job array, and run nothing"
    )
    options, fit = parser.parse_known_args(list(words))
    if any(word.partition("=")[0] == "--seed_everything" for word in fit):
        raise UserError("--seed_everything: a sweep has seeds of its own; say how many by --seeds")
    grid = combinations(options.over, options.seeds)
    runs = [_planned([*fit, *chosen], options.group) for chosen in grid]
    finished = [one for one in runs if is_finished(one)]
    open_runs = [one for one in runs if one not in finished]
    if options.print:
        print("\n".join(shlex.join(["clipkit", "fit", *one.words]) for one in open_runs))
        return 0
    already = f", {len(finished)} of them finished already" if finished else ""
    log.info("sweep: %d runs%s", len(runs), already)
    failed = [outcome for outcome in _train(open_runs) if outcome.code != 0]
    experiment = runs[0].configuration["experiment"]
    if failed:
        log.info("\n%d of %d runs failed:", len(failed), len(runs))
        for outcome in failed:
            log.info("  %s  %s", outcome.log, _last_line(outcome.log))
        log.info("the same command runs them again, and only them")
    if finished or len(failed) < len(open_runs):
        log.info("\nnext  clipkit compare %s", experiment)
    return 1 if failed else 0


def combinations(over: Sequence[str], seeds: int) -> list[list[str]]:
    """Return the options of each place of the grid, in the order they were given.

    >>> combinations(["model.embed_dim=8,16"], 1)[1]
    ['--model.embed_dim=16', '--seed_everything=0']
    """
    if seeds < 1:
        raise UserError(f"--seeds: {seeds} is less than 1")
    axes = [*map(_axis, over), [f"--seed_everything={seed}" for seed in range(seeds)]]
    keys = [axis[0].partition("=")[0] for axis in axes]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"--over: {twice[0].lstrip('-')} is given twice")
    return [list(chosen) for chosen in product(*axes)]


def is_finished(run: Run) -> bool:
    """Whether a run of exactly this configuration has come to its end."""
    folders = [run.folder, *sorted(run.folder.parent.glob(f"{run.folder.name}-*"))]
    return any(
        read_status(folder).get("status") == "finished" and _same(folder, run) for folder in folders
    )


def _axis(text: str) -> list[str]:
    key, separator, values = text.partition("=")
    listed = list(_split(values))
    if not separator or not key or not all(listed):
        raise UserError(f"--over {text}: write it as --over KEY=VALUE1,VALUE2")
    return [f"--{key.lstrip('-')}={value}" for value in listed]


def _split(values: str) -> Iterator[str]:
    """Yield what commas separate, but for those inside brackets."""
    depth, start = 0, 0
    for place, letter in enumerate(values):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            yield values[start:place].strip()
            start = place + 1
    yield values[start:].strip()


def _planned(words: list[str], group: str | None) -> Run:
    configuration = configuration_of(words)
    group = group or configuration["experiment"]
    return Run([*words, f"--group={group}"], configuration)


def _same(folder: Path, run: Run) -> bool:
    try:
        kept = safe_yaml.load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return bool(_unnamed(kept) == _unnamed(run.configuration))


def _unnamed(configuration: Any) -> Any:
    if not isinstance(configuration, dict):
        return configuration
    # As the file gives it back: tuples have become lists.
    plain = yaml.safe_load(yaml.safe_dump(configuration))
    return {key: value for key, value in plain.items() if key != "run_name"}


def _train(runs: Sequence[Run]) -> list[Outcome]:
    """Keep every device busy with one process until all runs are done."""
    devices = _devices()
    waiting, busy, ended = list(runs), dict[str, _Process](), list[Outcome]()
    try:
        while waiting or busy:
            for device in [device for device in devices if device not in busy][: len(waiting)]:
                busy[device] = _Process(waiting.pop(0), device)
            for device, process in list(busy.items()):
                if (outcome := process.ended()) is not None:
                    del busy[device]
                    ended.append(outcome)
                    _say(outcome, len(ended), len(runs))
            time.sleep(0.2)
    finally:
        for process in busy.values():
            process.stop()
    return ended


class _Process:
    """A `clipkit fit` on one device, writing to a log beside the runs."""

    def __init__(self, run: Run, device: str) -> None:
        self.run = run
        self.log = run.folder.parent / "sweep" / f"{run.folder.name}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._began = time.monotonic()
        environment = {**os.environ} | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
        with self.log.open("w", encoding="utf-8") as output:
            self._process = subprocess.Popen(
                [*FIT, *run.words], stdout=output, stderr=subprocess.STDOUT, env=environment
            )

    def ended(self) -> Outcome | None:
        code = self._process.poll()
        seconds = time.monotonic() - self._began
        return None if code is None else Outcome(self.run, code, seconds, self.log)

    def stop(self) -> None:
        """Wait for a process that Ctrl-C has reached too: it saves where it stands."""
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _devices() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES may be for one process each; one '' without a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [device.strip() for device in given.split(",") if device.strip()] or [""]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())] or [""]


def _say(outcome: Outcome, number: int, total: int) -> None:
    minutes, seconds = divmod(round(outcome.seconds), 60)
    how = "finished" if outcome.code == 0 else f"failed, see {outcome.log}"
    name = outcome.run.folder.name
    log.info("%d/%d  %d:%02d  %s  %s", number, total, minutes, seconds, name, how)
    for line in dict.fromkeys(_lines(outcome.log)):
        if line.startswith("warning:"):
            log.info("     %s", line)


def _last_line(file: Path) -> str:
    lines = _lines(file)
    return lines[-1] if lines else ""


def _lines(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
