"""Training on a stream: what a data module hands over where it would open the rows of a split."""

from __future__ import annotations

from typing import Any

import lightning as L

from clipkit.data.samples import PairDataset
from clipkit.data.streaming.dataset import RowsInHand, StreamedPairs
from clipkit.data.streaming.loader import StreamLoader
from clipkit.data.streaming.state import StreamState
from clipkit.data.streaming.stream import Stream
from clipkit.errors import UserError
from clipkit.resume import BEGINNING, Position


class StreamTraining:
    """A stream, its loader, and where a run stands in it."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._start = BEGINNING
        self._state: StreamState | None = None
        self._loader: StreamLoader | None = None

    @property
    def negatives(self) -> bool:
        """Whether rows come with what is no caption of theirs."""
        return self._stream.negatives

    def refuse(self, trainer: L.Trainer | None) -> None:
        """Refuse a run whose length nobody knows, which a schedule has to.

        Raises:
            UserError: there is no trainer.max_steps.
        """
        if self._stream.options.steps_per_epoch is not None or trainer is None:
            return
        if trainer.max_steps == -1 and isinstance(trainer.limit_train_batches, float):
            raise UserError(
                "trainer.max_steps: nobody knows how long a pass through a stream is, and the "
                "schedule needs the length of the run; add --trainer.max_steps N, or "
                "--data.streaming.steps_per_epoch N for epochs of so many steps"
            )

    def loader(
        self, pairs: PairDataset, rows: RowsInHand, *, rank: int, world_size: int, batch_size: int,
        **options: Any,
    ) -> StreamLoader:  # fmt: skip
        """Return the batches of a rank.

        Args:
            pairs: makes samples of `rows`.
            rows: those that a worker has in hand.
            rank: whose batches are wanted.
            world_size: how many ranks there are.
            batch_size: pairs of a rank's batch.
            options: of the DataLoader.
        """
        self.close()
        self._loader = StreamLoader(
            StreamedPairs(pairs, rows),
            stream=self._stream,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            steps=self._stream.options.steps_per_epoch,
            start=self._start,
            state=self._state,
            **options,
        )
        return self._loader

    def state(self, at: Position) -> dict[str, Any] | None:
        """Return where the stream stands at a position, as plain numbers."""
        found = None if self._loader is None else self._loader.state(at)
        return None if found is None else found.packed()

    def go_on(self, start: Position, state: dict[str, Any] | None) -> None:
        """Begin at a position, with what `state` returned there."""
        self._start = start
        self._state = None if state is None else StreamState.unpacked(state)

    def deciding_order(self) -> dict[str, int]:
        """Return what has to be as it was for a run to go on within a pass."""
        options = self._stream.options
        return {
            "shards": len(self._stream.shards),
            "shuffle_window": options.shuffle_window,
            "window_megabytes": options.window_megabytes,
            "open_shards": options.open_shards,
            "steps_per_epoch": options.steps_per_epoch or 0,
            "max_validation_pairs": options.max_validation_pairs,
            "filters": 0 if self._stream.filters is None else self._stream.filters.digest,
        }

    def close(self) -> None:
        """End the thread that reads."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None
