"""What a user can say of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from clipkit.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """How a data set is read that is not opened as a whole.

    Args:
        shuffle_window: Pairs that are shuffled among themselves; half as many stand between a pair
            and its place in the shards, on average.
        window_megabytes: What the pictures of a window may take in memory; a window of large ones
            holds fewer pairs. Each rank has two windows.
        open_shards: Shards that a window takes its rows from in turn.
        steps_per_epoch: Steps that make an epoch; the stream goes on where the last one ended. Left
            out, an epoch is one pass through the stream, whose length nobody knows in advance.
        max_validation_pairs: Pairs of a split that evaluation sees: the first ones.
    """

    shuffle_window: int = 4096
    window_megabytes: int = 256
    open_shards: int = 4
    steps_per_epoch: int | None = None
    max_validation_pairs: int = 1000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise UserError(f"data.streaming.{name}: {value} is not above 0")


def refuse_beside_streaming(options: Mapping[str, object]) -> None:
    """Refuse options of a data module, by their names, that a stream has no use for.

    Raises:
        UserError: one of them is given.
    """
    for name, given in options.items():
        if given:
            raise UserError(
                f"data.{name}: {given} needs a data set that is opened as a whole; leave it out, "
                "or leave out data.streaming"
            )
