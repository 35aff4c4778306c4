"""Captions to tokens: CLIP's byte-level BPE, or any `tokenizer.json`, behind one text contract.

CLIP (https://arxiv.org/abs/2103.00020) has 256 byte symbols, the same 256 ending a word, one symbol
per merge, then the start and the end token. Ids agree with open_clip's tokenizer over the same
merges, with these deliberate differences:

- A special token spelt out in a caption, in any case, is plain text; open_clip takes it for the
  token itself, hence an early end.
- Letters and digits newer than the Unicode tables inside `tokenizers` split as symbols; open_clip
  has the tables of `regex`.
- U+0345, a combining iota, is a symbol; open_clip's pattern, ignoring case, matches it nowhere and
  loses it.
"""

from __future__ import annotations

import contextlib
import hashlib
import html
import itertools
import json
import logging
import math
import os
import re
import string
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tokenizers
import torch
from torch import Tensor

from clipkit.errors import UserError
from clipkit.ranges import check_whole

log = logging.getLogger(__name__)

Cleaning = Literal["lower", "whitespace", "canonicalize", "none"]


@dataclass(frozen=True)
class TextContract:
    """What a text encoder must know of its tokens."""

    vocab_size: int
    context_length: int
    start_id: int | None
    end_id: int
    pad_id: int
    pad_to_context: bool
    clean: str

    def lengths(self, tokens: Tensor) -> Tensor:
        """Return how many ids of each row (B, L) stand before its padding, (B,) int64."""
        padding = (tokens == self.pad_id).flip(1).int().cumprod(dim=1).sum(dim=1)
        # Where the padding id is the end token's, one of the closing run is an end token.
        return tokens.shape[1] - padding + int(self.pad_id == self.end_id)


class TokenizedTexts(NamedTuple):
    """Padded ids, and which captions were cut to fit the context."""

    tokens: Tensor  # (B, L) int64
    truncated: Tensor  # (B,) bool


class Tokenizer:
    """A tokenizer and its text contract: captions in, padded int64 ids (B, L) out.

    Special tokens spelt out in a caption are plain text. The same definition gives the same ids,
    also after pickling.

    Args:
        path: `english` (the vocabulary shipped with clipkit), a `tokenizer.json`, a folder that
            holds one, or a hub id.
        context_length: the longest row; a longer caption is cut, its end token kept.
        clean: `lower` as CLIP (repair mojibake and HTML entities, collapse white space,
            lower-case), `whitespace` the same with its case (for cased vocabularies),
            `canonicalize` as SigLIP (punctuation removed too), or `none`.
        fallback: a second path, used and announced where a hub id cannot be read.
        pad_to_context: pad every batch to the context, for towers that attend to their padding.
        definition: the JSON text of the tokenizer, as `carried` gives it; `path` is then its name.

    Raises:
        UserError: there is no usable tokenizer at `path`, or it ends a text with no token.
    """

    def __init__(
        self,
        path: str = "english",
        *,
        context_length: int = 77,
        clean: Cleaning = "lower",
        fallback: str | None = None,
        pad_to_context: bool = False,
        definition: str | None = None,
    ) -> None:
        if clean not in ("lower", "whitespace", "canonicalize", "none"):
            raise UserError(
                f"model.tokenizer.clean is {clean!r}: "
                "lower, whitespace, canonicalize and none are accepted"
            )
        if definition is None:
            path, definition = _find(path, fallback)
        else:
            definition = _complete(definition, path)
        self.name = path
        self.definition = definition
        self._clean: Cleaning = clean
        self._tokenizer = _build(definition, self.name)
        prefix, self._suffix = _special_ids(self._tokenizer, self.name)
        if prefix and prefix[0] == self._suffix[0]:
            raise UserError(
                f"model.tokenizer.path is {path!r}: its start and end token are the same id "
                f"{prefix[0]}, so the end of a caption cannot be found"
            )
        shortest = len(prefix) + 1 + len(self._suffix)
        if context_length < shortest:
            raise UserError(
                f"model.tokenizer.context_length is {context_length}: "
                f"{self.name} needs at least {shortest}, for its special tokens and one more"
            )
        check_whole("model.tokenizer.context_length", context_length)
        self.contract = TextContract(
            vocab_size=max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
            context_length=context_length,
            start_id=prefix[0] if prefix else None,
            end_id=self._suffix[0],
            pad_id=json.loads(definition)["padding"]["pad_id"],
            pad_to_context=pad_to_context,
            clean=clean,
        )

    @property
    def digest(self) -> str:
        """The sha256 of the definition: equal digests give equal ids for equal contracts."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return self.contract.vocab_size

    @property
    def context_length(self) -> int:
        """The longest row of ids."""
        return self.contract.context_length

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return ids (B, L), L the longest of the batch or the context."""
        return self.encode(texts).tokens

    def encode(self, texts: Sequence[str]) -> TokenizedTexts:
        """Return ids (B, L) and which captions (B,) were cut; a cut caption keeps its end token.

        Raises:
            UserError: the tokenizer's own rules fail on a text.
        """
        if isinstance(texts, str):  # a sequence of letters otherwise
            texts = [texts]
        context, pad = self.contract.context_length, self.contract.pad_id
        with _one_line_failures(self.name, "a caption"):
            encodings = self._tokenizer.encode_batch_fast(
                [clean_text(text, self._clean) for text in texts]
            )
        rows = [encoding.ids for encoding in encodings]
        truncated = [len(row) > context for row in rows]
        kept = context - len(self._suffix)
        rows = [
            row[:kept] + self._suffix if cut else row
            for row, cut in zip(rows, truncated, strict=True)
        ]
        longest = max(map(len, rows), default=0)
        length = context if self.contract.pad_to_context else longest
        padded = [row + [pad] * (length - len(row)) for row in rows]
        # Four times as fast as torch.tensor on lists.
        tokens = np.array(padded, dtype=np.int64).reshape(len(rows), length)
        return TokenizedTexts(torch.from_numpy(tokens), torch.tensor(truncated, dtype=torch.bool))

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Return the text of one row of ids up to its end token; cleaning is not undone."""
        row = [int(token) for token in ids]
        if self.contract.end_id in row:
            row = row[: row.index(self.contract.end_id)]
        text = self._tokenizer.decode(row, skip_special_tokens=True)
        # Byte-level decoding knows no end-of-word suffix (huggingface/tokenizers#872).
        end_of_word = getattr(self._tokenizer.model, "end_of_word_suffix", None)
        return text.replace(end_of_word, " ").rstrip(" ") if end_of_word else text

    def carried(self) -> dict[str, object]:
        """Return the constructor arguments that rebuild this tokenizer with all files gone."""
        return {"path": self.name, "definition": self.definition}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Rebuilt, not pickled: the library forgets `encode_special_tokens` on the way.
        self._tokenizer = _build(self.definition, self.name)


def clean_text(text: str, how: Cleaning) -> str:
    """Return the caption as the vocabulary sees it; see `Tokenizer` for the four ways."""
    if how == "none":
        # A lone surrogate is no text to the library; ftfy replaces it in the other ways.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    # In printable ASCII the repair changes nothing but entities, and costs more than all the rest.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if how == "canonicalize":
        text = text.replace("_", " ").translate(_NO_PUNCTUATION)
        return " ".join(text.lower().split())
    text = " ".join(text.split())
    return text if how == "whitespace" else text.lower()


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PAD_TOKENS = ("[PAD]", "<pad>", "<|pad|>", "<|padding|>")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def _find(path: str, fallback: str | None) -> tuple[str, str]:
    """Return the name and the definition of the tokenizer at `path`, or else at `fallback`."""
    if path == "english":
        text = resources.files("clipkit").joinpath("assets/english.json").read_text("utf-8")
        return path, text.strip()
    file = Path(os.path.expanduser(path))
    if path and os.path.exists(file):
        folder = file if file.is_dir() else file.parent
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"model.tokenizer.path is {path!r}: the folder has no tokenizer.json")
        return path, _complete(_read(file, path), path, lambda name: folder / name)
    if not _HUB_ID.fullmatch(path) or path.endswith(".json"):
        raise UserError(
            f"model.tokenizer.path is {path!r}: no such file or folder, and no hub id "
            "(english, a tokenizer.json, a folder that holds one and a hub id are accepted)"
        )
    try:
        text = _read(_from_hub(path, "tokenizer.json"), path)
        return path, _complete(text, path, lambda name: _from_hub(path, name))
    except _HubError as error:
        problem = f"model.tokenizer.path is {path!r}: no such file or folder, and {error}"
        if fallback is None:
            raise UserError(problem) from error
        log.info("tokenizer: %s stands in for %s, since %s", fallback, path, error)
        return _find(fallback, None)


class _HubError(Exception):
    """Why the hub gave no file, as the end of a sentence."""


def _from_hub(repo: str, name: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    with contextlib.suppress(LocalEntryNotFoundError, ValueError):
        return Path(huggingface_hub.hf_hub_download(repo, name, local_files_only=True))
    try:
        # Without network the download tries for half a minute; asking about the file fails at once.
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, name))
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except RepositoryNotFoundError as error:
        raise _HubError("the hub has no such id, or shows it to its members only") from error
    except Exception as error:  # the HTTP client, and so its errors, differ between versions
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise _HubError(f"the hub has no {name} under that id") from error
        raise _HubError(
            f"the hub cannot be asked for that id, nor is it in the cache ({type(error).__name__})"
        ) from error


def _read(file: Path, path: str) -> str:
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.tokenizer.path is {path!r}: {file} cannot be read") from error


def _complete(text: str, path: str, beside: Callable[[str], Path] | None = None) -> str:
    """Return the definition with its padding token, so that it needs no file beside it."""
    tokenizer = _build(text, path)
    definition = json.loads(text)
    if isinstance(definition.get("padding"), dict):
        return text
    candidates = itertools.chain(_pad_tokens(beside) if beside else (), _PAD_TOKENS)
    known = (tokenizer.token_to_id(token) for token in candidates)
    # Without any, pad with the end token, as CLIP's on the hub.
    end_id = _special_ids(tokenizer, path)[1][0]
    pad_id = next((id for id in known if id is not None), end_id)
    definition["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": pad_id,
        "pad_type_id": 0,
        "pad_token": tokenizer.id_to_token(pad_id),
    }
    return json.dumps(definition, ensure_ascii=False, separators=(",", ":"))


def _pad_tokens(beside: Callable[[str], Path]) -> Iterator[str]:
    """Yield what the files beside a tokenizer.json call its padding."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        # They are optional, and may hold anything.
        with contextlib.suppress(OSError, ValueError, RecursionError, _HubError):
            found = json.loads(beside(name).read_text("utf-8"))
            token = found.get("pad_token") if isinstance(found, dict) else None
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                yield token


MOST_GROWTH = 1000
"""How many times as long a tokenizer may make a text before it cuts it into tokens."""

LEAST_USED = 16
"""One in so many ids has a token at least; the text encoder has a row for each id."""


def _build(definition: str, name: str) -> tokenizers.Tokenizer:
    # Data workers fork: threads started before that would be lost, and the library would say so.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
        read = json.loads(definition)
        growth = math.prod(_growths(read))
        endless = [regex for regex in _regexes(read) if _repeats_repetitions(regex)]
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"model.tokenizer.path is {name!r}: its text is no tokenizer.json "
            f"({textwrap.shorten(str(error), 200, placeholder=' ...')})"
        ) from error
    if growth > MOST_GROWTH:
        raise UserError(
            f"model.tokenizer.path is {name!r}: refused, its replacements could make a text "
            f"{growth:,} times as long, at most {MOST_GROWTH:,} is accepted"
        )
    if endless:
        raise UserError(
            f"model.tokenizer.path is {name!r}: refused, its pattern {endless[0][:60]!r} repeats "
            "what is itself repeated, and so may take for ever on a text"
        )
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    if max(ids, default=0) > LEAST_USED * len(ids):
        raise UserError(
            f"model.tokenizer.path is {name!r}: refused, its ids reach {max(ids):,} and it has "
            f"{len(ids):,} tokens"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _growths(part: object) -> Iterator[int]:
    """Yield how many times as long each replacement in a definition could make a text."""
    if isinstance(part, list):
        for inner in part:
            yield from _growths(inner)
    elif isinstance(part, dict):
        content = part.get("content")
        if part.get("type") == "Replace" and isinstance(content, str):
            yield max(1, len(content.encode()))
        for key in ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers"):
            yield from _growths(part.get(key))


def _regexes(part: object) -> Iterator[str]:
    """Yield every pattern that a definition searches texts with."""
    if isinstance(part, list):
        for inner in part:
            yield from _regexes(inner)
    elif isinstance(part, dict):
        for key, inner in part.items():
            if key == "Regex" and isinstance(inner, str):
                yield inner
            elif key != "vocab":
                yield from _regexes(inner)


_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|[(]|[)]|[*+]|\{\d*,|.", re.DOTALL)
_REPETITION = re.compile(r"[*+]|\{\d*,")


def _repeats_repetitions(regex: str) -> bool:
    """Whether a repeated group holds a repetition, as (a+)+: time may double with every letter."""
    pieces = _PIECE.findall(regex)
    holds = [False]  # for each group that is open, whether a repetition was seen in it
    for place, piece in enumerate(pieces):
        if piece == "(":
            holds.append(False)
        elif piece == ")" and len(holds) > 1:
            inner = holds.pop()
            following = pieces[place + 1] if place + 1 < len(pieces) else ""
            if inner and _REPETITION.fullmatch(following):
                return True
            holds[-1] |= inner
        elif _REPETITION.fullmatch(piece):
            holds[-1] = True
    return False


@contextlib.contextmanager
def _one_line_failures(name: str, what: str) -> Iterator[None]:
    """What the library raises while it works; what panics in it is no Exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise UserError(
            f"model.tokenizer.path is {name!r}: this tokenizer fails on {what} ({reason})"
        ) from error


def _special_ids(tokenizer: tokenizers.Tokenizer, name: str) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts before and after a text."""
    with _one_line_failures(name, "plain text"):  # one without a token for what it does not know
        encoding = tokenizer.encode("a photo")
    mask, ids = encoding.special_tokens_mask, encoding.ids
    num_before = mask.index(0) if 0 in mask else len(mask) // 2
    num_after = mask[::-1].index(0) if 0 in mask else len(mask) - num_before
    if not num_after:
        raise UserError(
            f"model.tokenizer.path is {name!r}: this tokenizer ends a text with no end token, "
            "and the text encoder needs one to pool at"
        )
    return ids[:num_before], ids[len(ids) - num_after :]
