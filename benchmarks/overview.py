"""The table of benchmarks/README.md: a line a question, with its latest figures and picture.

python -m benchmarks.overview --write
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.questions import CPU, GPU, OTHERS, Question, latest, read
from benchmarks.scaling import filled, markdown

PAGE = Path(__file__).parent / "README.md"


def lines(questions: Sequence[Question]) -> Iterator[Sequence[str]]:
    """Yield question, command, figure, what must be shown, verdict."""
    yield "question", "`python -m benchmarks.`...", "latest", "must show", "", "file"
    for question in questions:
        device = " --device cuda" if question.device == "cuda" else ""
        command = f"`{question.command}{device}`"
        path = latest(question)
        if path is None:
            yield question.asks, command, "not measured yet", "", "", ""
            continue
        found = read(question, path)
        file = f"[{path.stem[:10]}](results/{path.name})"
        for place, one in enumerate([f for f in found if f.goal is not None] or found[:1]):
            first = (question.asks, command) if place == 0 else ("", "")
            figure = f"{one.what}: {one.shown}"
            yield *first, figure, one.must_show, one.verdict, file if place == 0 else ""


def pictures() -> str:
    """Return the pictures there are, each with its question."""
    shown = []
    for question in (*CPU, *OTHERS, *GPU):
        path = latest(question)
        picture = None if path is None else path.with_suffix(".svg")
        if picture is not None and picture.is_file():
            shown.append(f"**{question.asks[0].upper()}{question.asks[1:]}**\n\n"
                         f"![{question.asks}](results/{picture.name})")  # fmt: skip
    return "\n\n".join(shown)


def blocks() -> dict[str, str]:
    """Return what stands between the marks of the page."""
    return {
        "cpu": markdown(lines((*CPU, *OTHERS))),
        "gpu": markdown(lines(GPU)),
        "pictures": pictures(),
    }


def write() -> None:
    """Bring the page up to date."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8")


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into benchmarks/README.md")
    if parser.parse_args().write:
        write()
        print(PAGE)
        return
    for text in blocks().values():
        print(f"{text}\n")


if __name__ == "__main__":
    main()
