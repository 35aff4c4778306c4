"""The ``clipkit`` command: Lightning's verbs and ours, each imported only when it is called."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence

from clipkit.errors import UserError, did_you_mean
from clipkit.own_code import look_in_current_folder

HELP = """\
usage: clipkit COMMAND [OPTIONS]

  fit        train a model and evaluate it every epoch
             clipkit fit -c base -c quickstart
             clipkit fit -c base -c pairs --data.dataset ~/my_pictures
  validate   evaluate a checkpoint, which is all it needs
             clipkit validate --ckpt_path runs/quickstart/quickstart/checkpoints/last.ckpt
  test       the same on the test split and the sets kept for the end
  check      two minutes before a long run: its gradients on all ranks, speed and memory
             clipkit check -c base -c pairs --data.dataset ~/my_pictures --trainer.devices 2
  benchmark  score any model on a suite of data sets, with error bars
             clipkit benchmark runs/quickstart/quickstart/checkpoints/last.ckpt
             clipkit benchmark open_clip:ViT-B-32/openai --suite retrieval --output base.json
  compare    runs side by side: what differs, what they scored, what is significant
             clipkit compare emoji --html report.html
  sync       send to MLflow what it has not of a run, from the run's folder
             clipkit sync runs/emoji/run_a
  sweep      train every combination of some options
             clipkit sweep -c base -c emoji --over model.loss=InfoNCELoss,SigLIPLoss --seeds 3
  tokenizer  train a vocabulary on the captions of a data set
             clipkit tokenizer ~/my_pictures --output vocabulary.json
  recipes    list the recipes that -c finds by name

Every command has --help. Everywhere: --debug shows the traceback of an error,
--trust MODULE admits your own module to what a checkpoint may name.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 on success, 2 on a user's mistake."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    words, debug = _take_flag(words, "--debug")
    try:
        words, trust = _take_values(words, "--trust")
        _speak()
        return _run(words, trust)
    except UserError as error:
        if debug:
            raise
        if not error.silent:
            print(f"clipkit: {error.sentence}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        # Whoever is impatient presses twice; the way out shall not be interrupted.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("clipkit: interrupted", file=sys.stderr)
        return 130


def _run(words: list[str], trust: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        import clipkit

        print(clipkit.__version__)
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        if words[0].startswith("-"):
            raise UserError(f"{words[0]}: the command comes first, as in clipkit fit -c base")
        hint = did_you_mean(words[0], COMMANDS)
        raise UserError(f"{words[0]}: no such command; {hint}there are {', '.join(COMMANDS)}")
    look_in_current_folder()
    return command(words, trust)


def _lightning(words: list[str], trust: list[str]) -> int:
    from clipkit.building import run

    return run(words, trust=trust)


def _check(words: list[str], trust: list[str]) -> int:
    from clipkit.check import HELP

    if "--help" in words or "-h" in words:
        print(HELP, end="")
        return 0

    from clipkit.check.command import run

    return run(words[1:], trust=trust)


def _sweep(words: list[str], trust: list[str]) -> int:
    from clipkit.sweep import run

    return run([*words[1:], *(f"--trust={module}" for module in trust)])


def _compare(words: list[str], trust: list[str]) -> int:
    from clipkit.tracking.command import run

    return run(words[1:])


def _sync(words: list[str], trust: list[str]) -> int:
    from clipkit.tracking.sync import run

    return run(words[1:])


def _benchmark(words: list[str], trust: list[str]) -> int:
    from clipkit.suite.command import run

    return run(words[1:], trust=trust)


def _speak() -> None:
    """Print what clipkit has to say, on the first rank only, and as it says it."""
    import logging

    class Handler(logging.StreamHandler):  # type: ignore[type-arg]
        def emit(self, record: logging.LogRecord) -> None:
            bar = sys.modules.get("tqdm")
            if bar is None or not sys.stdout.isatty():
                super().emit(record)
            else:  # above the progress bar, not through it
                bar.tqdm.write(self.format(record), file=sys.stdout)

    handler = Handler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("clipkit")
    logger.handlers = [handler]
    logger.propagate = False
    first = all(os.environ.get(name, "0") == "0" for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    logger.setLevel(logging.INFO if first else logging.WARNING)


def _tokenizer(words: list[str], trust: list[str]) -> int:
    from clipkit.arguments import Parser

    parser = Parser(
        prog="clipkit tokenizer",
        description="Train a vocabulary in CLIP's layout on the captions of a data set.",
        epilog="example: clipkit tokenizer ~/my_pictures --vocab_size 8192 --output words.json; "
        "then clipkit fit ... --model.tokenizer.path words.json",
    )
    parser.add_argument("dataset", help="anything that data.dataset takes")
    parser.add_argument("--output", default="tokenizer.json", help="file to write")
    parser.add_argument("--vocab_size", type=int, default=16_384, help="ids in all")
    parser.add_argument("--caption_column", help="found by its name where left out")
    parser.add_argument("--split", default="train")
    options = parser.parse_args(words[1:])

    from clipkit.data.vocabulary import train_vocabulary

    print(
        train_vocabulary(
            options.dataset,
            output=options.output,
            vocab_size=options.vocab_size,
            caption_column=options.caption_column,
            split=options.split,
        )
    )
    return 0


def _recipes(words: list[str], trust: list[str]) -> int:
    from clipkit import recipes

    if len(words) > 1:
        print("usage: clipkit recipes\n\nList the recipes that `clipkit fit -c NAME` finds.")
        return 0 if words[1] in ("-h", "--help") else 2
    names = recipes.names()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {recipes.summary(recipes.find(name))}")
    return 0


def _take_flag(words: list[str], flag: str) -> tuple[list[str], bool]:
    return [word for word in words if word != flag], flag in words


def _take_values(words: list[str], option: str) -> tuple[list[str], list[str]]:
    """Take ``option VALUE`` and ``option=VALUE`` out of the words."""
    left, values = [], []
    remaining = iter(words)
    for word in remaining:
        if word == option:
            value = next(remaining, None)
            if value is None:
                raise UserError(f"{option}: needs the name of a module, as in {option} my_code")
            values.append(value)
        elif word.startswith(f"{option}="):
            values.append(word.partition("=")[2])
        else:
            left.append(word)
    return left, values


COMMANDS: dict[str, Callable[[list[str], list[str]], int]] = {
    "fit": _lightning,
    "validate": _lightning,
    "test": _lightning,
    "check": _check,
    "benchmark": _benchmark,
    "compare": _compare,
    "sync": _sync,
    "sweep": _sweep,
    "tokenizer": _tokenizer,
    "recipes": _recipes,
}


if __name__ == "__main__":
    sys.exit(main())
