"""``clipkit compare``: runs side by side, with what of their differences is no accident."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipkit.arguments import Parser

if TYPE_CHECKING:
    from clipkit.tracking.compare import Comparison
    from clipkit.tracking.mlflow_runs import Store
    from clipkit.tracking.runs import Run

EPILOG = """\
examples:
  clipkit compare emoji                                every run of an MLflow experiment
  clipkit compare emoji --baseline run_a --html report.html
  clipkit compare mine.json base.json --format latex   the paper's table
  clipkit compare runs/emoji/run_a run_b --diff        what differs in their configurations
"""


def run(arguments: Sequence[str]) -> int:
    """Run ``clipkit compare`` with the words after its name; returns the exit code."""
    options = _parser().parse_args([*arguments])

    from clipkit.tracking.mlflow_runs import Store

    with Store(options.tracking_uri) as store:
        return _run(options, store)


def _run(options: argparse.Namespace, store: Store) -> int:
    from clipkit.tracking import compare, sources

    runs = sources.collect(options.what, store)
    baseline = _baseline(options.baseline, runs, store)
    if options.diff:
        from clipkit.tracking.differences import two, write

        print(write(two(runs, baseline), options.format))
        return 0
    comparison = compare.compare(
        runs,
        title=", ".join(options.what),
        baseline=baseline,
        metrics=options.metric,
        how="best" if options.best_over_epochs else "chosen" if options.chosen else "last",
    )
    if options.html is not None:
        from clipkit.tracking.report import write_report

        write_report(comparison, Path(options.html))
    print(_formatted(comparison, options.format))
    if options.html is not None and options.format == "table":
        print(f"\nreport: {options.html}")
    return 0


def _formatted(comparison: Comparison, form: str) -> str:
    from clipkit.tracking import tables

    if form == "csv":
        return tables.as_csv(comparison)
    if form == "json":
        return tables.as_json(comparison)
    if form == "latex":
        from clipkit.tracking.latex import latex

        return latex(comparison)
    return tables.terminal(comparison)


def _baseline(what: str | None, runs: Sequence[Run], store: Store) -> list[Run]:
    """Return the runs that --baseline stands for: one of those shown, or any other."""
    from clipkit.errors import UserError
    from clipkit.tracking.sources import resolve

    if what is None:
        return []
    shown = [one for one in runs if what in (one.name, one.where, getattr(one, "id", None))]
    if shown:
        return shown
    try:
        return resolve(what, store)
    except UserError as error:
        raise UserError(str(error).replace("compare ", "--baseline ", 1)) from error


def _parser() -> Parser:
    parser = Parser(
        prog="clipkit compare",
        description="Runs side by side: what differs, what they scored with 95 % intervals, and "
        "which differences are no accident.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what",
        nargs="+",
        metavar="WHAT",
        help="an MLflow experiment's name, a run's name or id, a run folder, a result file; mixed "
        "freely",
    )
    parser.add_argument(
        "--baseline",
        metavar="WHAT",
        help="what the others are compared with; left out, the first",
    )
    parser.add_argument(
        "--metric",
        metavar="M",
        action="append",
        default=[],
        help="a metric, its last part or a pattern such as 'retrieval/*'; again for more; left "
        "out, the main ones of each task",
    )
    parser.add_argument(
        "--format",
        choices=("table", "csv", "json", "latex"),
        default="table",
        help="csv holds the runs, json the claims too",
    )
    parser.add_argument("--html", metavar="FILE", help="also write a report as one HTML file")
    value = parser.add_mutually_exclusive_group()
    value.add_argument(
        "--chosen",
        action="store_true",
        help="take the value at the checkpoint that each run chose, not its last evaluation",
    )
    value.add_argument(
        "--best-over-epochs",
        "--best_over_epochs",
        action="store_true",
        help="take the best value over all evaluations, which flatters; marked as such",
    )
    parser.add_argument(
        "--diff",
        action="store_true",
        help="of two runs, only what differs in configuration and environment",
    )
    parser.add_argument(
        "--tracking_uri",
        metavar="URI",
        help="of MLflow; left out, MLFLOW_TRACKING_URI, else sqlite:///mlflow.db",
    )
    return parser
