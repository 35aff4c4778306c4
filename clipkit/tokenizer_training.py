"""Train a vocabulary in CLIP's layout: 512 byte symbols, one per merge, start, end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from clipkit.errors import UserError
from clipkit.tokenizer import Cleaning, clean_text

START, END = "<start_of_text>", "<end_of_text>"
END_OF_WORD = "</w>"

# Contractions, runs of letters, single digits, runs of anything else. CLIP ignores case, and the
# long s (U+017F) folds to "s": spelt out, because engines differ in what else they fold.
CONTRACTIONS = "'[sS\u017f]" r"|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
SPLIT = CONTRACTIONS + r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def train_tokenizer(captions: Iterable[str], *, vocab_size: int, clean: Cleaning = "lower") -> str:
    """Return the definition of a byte-level BPE: equal captions give an equal text.

    `vocab_size` counts every id: the 512 bytes, the merges, the start and the end token. The
    vocabulary is smaller where the captions hold too few pairs that occur twice.

    Raises:
        UserError: the vocabulary cannot hold one merge.
    """
    num_fixed = 2 * 256 + 2
    if vocab_size <= num_fixed:
        raise UserError(
            f"vocab_size is {vocab_size}: "
            f"more than {num_fixed} are needed (bytes, start, end and at least one merge)"
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Given the end-of-word suffix, the library numbers the ending symbols in hash order and breaks
    # ties by those numbers: another vocabulary on every run. A second alphabet for the last byte of
    # a word, known beforehand, makes it the same one.
    inner = byte_alphabet()
    ending = [chr(0xE000 + byte) for byte in range(256)]  # a private use area of Unicode
    to_ending = dict(zip(inner, ending, strict=True))
    from_ending = {end: symbol + END_OF_WORD for symbol, end in to_ending.items()}

    splitter = tokenizers.Tokenizer.from_str(clip_definition([])).pre_tokenizer
    assert splitter is not None

    def words() -> Iterator[str]:
        for caption in captions:
            pieces = splitter.pre_tokenize_str(clean_text(caption, clean))
            yield " ".join(piece[:-1] + to_ending[piece[-1]] for piece, _ in pieces)

    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        initial_alphabet=inner + ending,
        show_progress=False,
    )
    trained.train_from_iterator(words(), trainer)

    merges: list[tuple[str, str]] = []
    known: set[str] = set()
    for left, right in json.loads(trained.to_str())["model"]["merges"]:
        # ("a", "bc") and ("ab", "c") can both be learnt. One merge is one id: the first stays.
        if left + right not in known:
            known.add(left + right)
            merges.append((left, right[:-1] + from_ending.get(right[-1], right[-1])))
    return clip_definition(merges)


def clip_definition(merges: Sequence[tuple[str, str]]) -> str:
    """Return the `tokenizer.json` text of CLIP's layout over merges, highest priority first."""
    symbols = byte_alphabet()
    symbols += [symbol + END_OF_WORD for symbol in symbols]
    symbols += [left + right for left, right in merges]
    start, end = len(symbols), len(symbols) + 1
    pieces = [
        {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Removed", "invert": True},
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
    ]
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": {
            "strategy": "BatchLongest",
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,  # as open_clip; towers pool at the first end token, so it is never read
            "pad_type_id": 0,
            "pad_token": symbols[0],
        },
        "added_tokens": [_special(START, start), _special(END, end)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pieces},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [END, end],
            "cls": [START, start],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": END_OF_WORD,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbol: id for id, symbol in enumerate(symbols)},
            "merges": [[left, right] for left, right in merges],
        },
    }
    return json.dumps(definition, ensure_ascii=False, separators=(",", ":"))


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for bytes, in CLIP's order: "!" comes first.

    The printable Latin-1 characters stand for themselves; the other bytes, in their order, take
    what follows U+00FF.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in printable + list(range(0x100, 0x100 + 256 - len(printable)))]


def _special(content: str, id: int) -> dict[str, object]:
    unstripped = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": id, "content": content, **unstripped, "special": True}
