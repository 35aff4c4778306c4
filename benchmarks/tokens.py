"""Captions to tokens: clipkit's tokenizer against open_clip's, over the same vocabulary.

python -m benchmarks.tokens [--data ../shared/data] [--rounds 20]

Real captions, in one call, with one thread. Cold is the first pass of a tokenizer just made: all
words are new to it. Warm is the mean of ten passes more (one from a file is too short for a clock):
open_clip keeps the merges of each word in a dictionary, the library under clipkit in a cache of its
own. `clipkit` pads to the longest caption, as in training, `clipkit, padded` to 77 as open_clip
does. `clipkit, cached` takes the ids from the file of `data.cache_tokens`, opened anew each round,
by what samples name captions by; making it is opening and checking that file, and its first pass
reads the file's pages for the first time. How long the file takes to be built is told apart.
"""

from __future__ import annotations

import gzip
import itertools
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import add_data, parser, ratio, record, seconds_of, shown, spread, table
from clipkit.data.cached_tokens import CachedCaption, cached_tokens, read_cached
from clipkit.data.layouts import open_layout
from clipkit.data.rows import Rows
from clipkit.tokenizer import Tokenizer
from clipkit.tokenizer_training import clip_definition

GOALS = {"cold": {"clipkit": 2.5}, "warm": {"clipkit, cached": 100}}
PASSES = {"cold": 1, "warm": 10}
NUM_MERGES = 48_894

Encoder = Callable[[Sequence[str]], Tensor]


def captions_of(data: Path) -> list[str]:
    """Return the captions of coco_mini, so that the five of a picture do not stand together."""
    lines = (data / "coco_mini/test/metadata.jsonl").read_text("utf-8").splitlines()
    columns = zip(*(json.loads(line)["captions"] for line in lines), strict=True)
    return [str(caption) for column in columns for caption in column]


@lru_cache
def definition() -> str:
    """Return CLIP's own vocabulary in our layout."""
    from open_clip.tokenizer import default_bpe

    with gzip.open(default_bpe(), "rt", encoding="utf-8") as file:
        lines = itertools.islice(file, 1, 1 + NUM_MERGES)
        return clip_definition([(left, right) for left, right in map(str.split, lines)])


def clip_tokenizer(*, pad_to_context: bool = False) -> Tokenizer:
    """Return a tokenizer of ours that gives open_clip's ids."""
    return Tokenizer(definition=definition(), pad_to_context=pad_to_context)


def peer_tokenizer() -> Encoder:
    """Return open_clip's."""
    from open_clip.tokenizer import SimpleTokenizer

    made: Encoder = SimpleTokenizer()
    return made


def from_file(data: Path, folder: Path) -> Encoder:
    """Return what gives the ids of all captions, in their order, from the file that holds them."""
    tokenizer = clip_tokenizer()
    kept = cached_tokens(_rows(data), tokenizer, folder, split="test")
    columns = zip(*(kept.captions(row) for row in range(len(_rows(data)))), strict=True)
    named = [CachedCaption(kept, number) for column in columns for number in column]

    def encode(captions: Sequence[str]) -> Tensor:
        chosen = named * (len(captions) // len(named))
        return read_cached(chosen, tokenizer.contract).tokens

    return encode


@lru_cache
def _rows(data: Path) -> Rows:
    return open_layout(str(data / "coco_mini")).split("test")


def makers(data: Path, folder: Path) -> dict[str, Callable[[], Encoder]]:
    """Return what makes each contender."""
    return {
        "open_clip": peer_tokenizer,
        "clipkit": clip_tokenizer,
        "clipkit, padded": partial(clip_tokenizer, pad_to_context=True),
        "clipkit, cached": partial(from_file, data, folder),
    }


def check(captions: Sequence[str], cached: Encoder) -> None:
    """Refuse to compare what does not give the same ids."""
    expected = peer_tokenizer()(captions)
    assert torch.equal(clip_tokenizer(pad_to_context=True)(captions), expected)
    trimmed = clip_tokenizer()(captions)
    assert torch.equal(trimmed, expected[:, : trimmed.shape[1]])
    assert not expected[:, trimmed.shape[1] :].any()
    assert torch.equal(cached(captions), trimmed)


def passes(
    contenders: dict[str, Callable[[], Encoder]], captions: Sequence[str], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of the first and of a later pass of new tokenizers, for each round."""
    seconds: dict[str, dict[str, list[float]]] = {
        state: {name: [] for name in contenders} for state in ("making", "cold", "warm")
    }
    made: list[Encoder] = []
    for number in range(rounds):
        for name in list(contenders) if number % 2 == 0 else reversed(contenders):
            made.clear()
            make = partial(_make, contenders[name], made)
            seconds["making"][name].append(seconds_of(make, "cpu"))
            for state, count in PASSES.items():
                taken = seconds_of(partial(_repeat, made[0], captions, count), "cpu")
                seconds[state][name].append(taken / count)
    return seconds


def _repeat(encode: Encoder, captions: Sequence[str], count: int) -> None:
    for _ in range(count):
        encode(captions)


def _make(maker: Callable[[], Encoder], made: list[Encoder]) -> None:
    made.append(maker())


def main() -> None:
    """Measure, compare with what it must show, and write one dated file."""
    options_of = parser(__doc__, rounds=20, threads=1)
    add_data(options_of)
    options_of.add_argument("--repeats", type=int, default=1, help="of the list of captions")
    options = options_of.parse_args()
    torch.set_num_threads(options.threads)
    captions = captions_of(options.data) * options.repeats
    with tempfile.TemporaryDirectory() as folder:
        contenders = makers(options.data, Path(folder))
        building = seconds_of(contenders["clipkit, cached"], "cpu")
        check(captions, contenders["clipkit, cached"]())
        seconds = passes(contenders, captions, options.rounds)
    result: dict[str, Any] = {
        "captions": len(captions),
        "words": len(set(" ".join(captions).lower().split())),
        "ids": "identical",
        "seconds_to_make_one": {name: spread(v) for name, v in seconds["making"].items()},
        "seconds_to_build_the_file": round(building, 4),
        "must_show": GOALS,
    }
    rows = [("pass", "contender", "captions/s", "times as fast")]
    for state in PASSES:
        rates = {n: spread([len(captions) / s for s in v]) for n, v in seconds[state].items()}
        fast = {name: ratio(seconds[state]["open_clip"], v) for name, v in seconds[state].items()}
        result[state] = {"captions_per_second": rates, "times_as_fast": fast}
        rows += [(state, name, shown(rates[name]), shown(fast[name])) for name in contenders]
    path = record("tokens", options, result)
    table(rows)
    print(path)


if __name__ == "__main__":
    main()
