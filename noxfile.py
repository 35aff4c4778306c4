"""Jobs: `nox` runs the checks; `nox -s NAME` one of them.

All jobs share the virtual environment that nox itself is installed in (the README's `.venv`): a
second copy of torch would cost six gigabytes.
"""

from __future__ import annotations

import os
import sys

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]

SCRIPTS = os.path.dirname(sys.executable)


def install(session: nox.Session, *packages: str) -> None:
    """Install into the shared environment, as plain resolution finds it."""
    session.run(sys.executable, "-m", "pip", "install", "--quiet", *packages, external=True)


def run(session: nox.Session, script: str, *arguments: str) -> None:
    """Run a script of the shared environment."""
    session.run(os.path.join(SCRIPTS, script), *arguments, external=True)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train the quickstart: drawn shapes from scratch, then a zero-shot table."""
    install(session, "-e", ".")
    run(session, "clipkit", "fit", "-c", "base", "-c", "quickstart", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests."""
    install(session, "-e", ".[test,huggingface,peers]")
    # Two processes of one thread each: threads of both would wait for one another.
    session.env["OMP_NUM_THREADS"] = "1"
    run(session, "pytest", "-n", "2", "--dist", "loadfile", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Run the harnesses that take minutes: whole recipes on real data, trains as well."""
    install(session, "-e", ".[test,huggingface,peers]")
    run(session, "pytest", "-m", "slow", *session.posargs)
    if not session.posargs:
        # Forty minutes; what was run before is kept in the folder trains-as-well.
        words = ("-m", "benchmarks.trains_as_well", "--minutes", "4", "--seeds", "5")
        session.run(sys.executable, *words, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    install(session, "ruff>=0.9")
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, strictly, on the package."""
    install(session, "-e", ".", "mypy>=1.15", "types-PyYAML")
    run(session, "mypy")


@nox.session
def bench(session: nox.Session) -> None:
    """Ask every question of speed; writes benchmarks/results/ and ends with one table."""
    install(session, "-e", ".[peers]")
    session.run(sys.executable, "-m", "benchmarks.all", *session.posargs, external=True)


@nox.session
def recipes(session: nox.Session) -> None:
    """Run the recipes and write their figures to benchmarks/results/."""
    install(session, "-e", ".[peers]")
    session.run(sys.executable, "-m", "benchmarks.recipes", *session.posargs, external=True)


@nox.session
def anchors(session: nox.Session) -> None:
    """Measure published values again; needs the hub."""
    install(session, "-e", ".[huggingface,peers]")
    session.run(sys.executable, "-m", "benchmarks.anchors", *session.posargs, external=True)
