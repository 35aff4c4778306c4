"""A vocabulary from a data set's own captions: what `clipkit tokenizer` does."""

from __future__ import annotations

from pathlib import Path

from clipkit.data.layouts import open_layout
from clipkit.errors import UserError
from clipkit.tokenizer import Tokenizer
from clipkit.tokenizer_training import train_tokenizer


def train_vocabulary(
    dataset: str, *, output: str, vocab_size: int, caption_column: str | None, split: str
) -> str:
    """Train on every caption of a split, write the file, and return a line that says so."""
    rows = open_layout(dataset, caption_column=caption_column).split(split)
    captions = [text for texts in rows.all_captions() for text in texts]
    definition = train_tokenizer(captions, vocab_size=vocab_size)
    try:
        Path(output).write_text(definition, "utf-8")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from error
    tokenizer = Tokenizer(output)
    too_long = sum(
        int(tokenizer.encode(captions[start : start + 1024]).truncated.sum())
        for start in range(0, len(captions), 1024)
    )
    return (
        f"{output}: {tokenizer.vocab_size:,} ids from {len(captions):,} captions, "
        f"{too_long:,} of them longer than {tokenizer.context_length} tokens"
    )
