"""The tokens of every caption of a split, made once and kept in a file.

It takes at most 2 bytes a token (4 where the vocabulary exceeds 65,536), 21 bytes a caption and 8 a
row: about 55 MB for a million captions of 15 tokens. Loader processes share its pages.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import pad

from clipkit.data.array_file import ArrayFile, ArrayWriter, open_or_build
from clipkit.data.captions import EncodedCaptions, encode_captions
from clipkit.tokenizer import TextContract, Tokenizer

if TYPE_CHECKING:
    from clipkit.data.rows import Rows

log = logging.getLogger(__name__)

_FORMAT = 1  # to be raised whenever the same captions would give another file
_BLOCK = 4096  # rows


class CachedTokens:
    """The tokens of every caption of some rows, in a mapped file; captions are numbered.

    Args:
        file: as `cached_tokens` builds it.
    """

    def __init__(self, file: ArrayFile) -> None:
        self._file = file

    def captions(self, row: int) -> range:
        """Return the numbers of a row's captions."""
        starts = self._file["starts"]
        return range(int(starts[row]), int(starts[row + 1]))

    def characters(self, number: int) -> int:
        """Return how long the text of a caption is."""
        return int(self._file["characters"][number])

    def encode(self, numbers: Sequence[int], contract: TextContract) -> EncodedCaptions:
        """Return what `encode_captions` gives for the captions of these numbers.

        Args:
            numbers: of the captions.
            contract: of the tokenizer that the file was built with.
        """
        chosen = np.array(numbers, np.int64)
        ids, offsets = self._file["ids"], self._file["offsets"]
        starts = offsets[chosen]
        lengths = offsets[chosen + 1] - starts
        longest = contract.context_length if contract.pad_to_context else lengths.max(initial=0)
        columns = np.arange(longest)
        # Beyond a caption's end stands the next one, beyond the last nothing: hence "clip".
        tokens = ids.take(starts[:, None] + columns, mode="clip").astype(np.int64)
        np.copyto(tokens, contract.pad_id, where=columns >= lengths[:, None])
        return EncodedCaptions(
            torch.from_numpy(tokens),
            torch.from_numpy(self._file["truncated"][chosen]),
            torch.from_numpy(self._file["caption_ids"][chosen]),
            torch.from_numpy(lengths),
        )


class CachedCaption(NamedTuple):
    """A caption of a file, to be read with the others of its batch."""

    file: CachedTokens
    number: int


def read_cached(captions: Sequence[CachedCaption], contract: TextContract) -> EncodedCaptions:
    """Return what `encode_captions` gives for the same captions; a file is gone through once."""
    files, numbers = zip(*captions, strict=True)
    if files.count(files[0]) == len(files):
        only: CachedTokens = files[0]
        return only.encode(numbers, contract)
    places: dict[int, list[int]] = {}
    for place, file in enumerate(files):
        places.setdefault(id(file), []).append(place)
    found = [
        captions[group[0]].file.encode([numbers[place] for place in group], contract)
        for group in places.values()
    ]
    longest = max(part.tokens.shape[1] for part in found)
    found = [
        part._replace(
            tokens=pad(part.tokens, (0, longest - part.tokens.shape[1]), value=contract.pad_id)
        )
        for part in found
    ]
    order = torch.tensor([place for group in places.values() for place in group]).argsort()
    return EncodedCaptions(*(torch.cat(column)[order] for column in zip(*found, strict=True)))


def cached_tokens(rows: Rows, tokenizer: Tokenizer, folder: Path, *, split: str) -> CachedTokens:
    """Open the file of a split's tokens, building it where it is not there.

    Its name is a digest of the captions themselves, of the tokenizer, its cleaning and its context.

    Raises:
        UserError: the folder cannot be written.
    """
    path = folder / f"tokens-{_key(rows, tokenizer)}.clipkit"
    file, built = open_or_build(path, lambda writer: _write(writer, rows, tokenizer, split))
    num_captions, done = len(file["truncated"]), "now in" if built else "read from"
    log.info(f"data: tokens of {split}, {num_captions:,} captions: {done} {file.describe()}")
    return CachedTokens(file)


def _key(rows: Rows, tokenizer: Tokenizer) -> str:
    contract = tokenizer.contract
    versions = [metadata.version(name) for name in ("tokenizers", "ftfy")]
    settings = (_FORMAT, tokenizer.digest, contract.clean, contract.context_length, versions)
    digest = blake2b(repr(settings).encode(), digest_size=8)
    for block in _blocks(rows):
        digest.update(repr(block).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _blocks(rows: Rows) -> Iterator[list[list[str]]]:
    """The captions of every row, so many rows at a time that memory stays small."""
    for start in range(0, len(rows), _BLOCK):
        some = np.arange(start, min(start + _BLOCK, len(rows)))
        yield list(rows.select(some).all_captions())


def _write(writer: ArrayWriter, rows: Rows, tokenizer: Tokenizer, split: str) -> None:
    from tqdm import tqdm

    kind = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    columns: dict[str, list[np.ndarray[Any, Any]]] = {
        name: [] for name in ("counts", "lengths", "caption_ids", "characters", "truncated")
    }
    with tqdm(
        desc=f"tokens of {split}", total=len(rows), unit="row", delay=3, leave=False, disable=None
    ) as bar:
        for block in _blocks(rows):
            texts = [text for captions in block for text in captions]
            encoded = encode_captions(tokenizer, texts)
            there = torch.arange(encoded.tokens.shape[1]) < encoded.lengths[:, None]
            writer.append("ids", encoded.tokens[there].numpy().astype(kind))
            columns["counts"].append(np.array([len(captions) for captions in block], "<i8"))
            columns["lengths"].append(encoded.lengths.numpy().astype("<i8"))
            columns["caption_ids"].append(encoded.ids.numpy().astype("<i8"))
            columns["characters"].append(np.array(list(map(len, texts)), "<i4"))
            columns["truncated"].append(encoded.truncated.numpy())
            bar.update(len(block))
    whole = {name: np.concatenate(blocks) for name, blocks in columns.items()}
    writer.append("starts", _running_total(whole["counts"]))
    writer.append("offsets", _running_total(whole["lengths"]))
    for name in ("caption_ids", "characters", "truncated"):
        writer.append(name, whole[name])


def _running_total(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
