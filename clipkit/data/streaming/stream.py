"""A stream of pairs to train on: shards, and how ranks read them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from clipkit.data.filters import RowFilters
from clipkit.data.streaming.dealing import Already, Share, deal
from clipkit.data.streaming.options import Streaming
from clipkit.data.streaming.reading import RankStream, rows_read
from clipkit.data.streaming.sampler import START, Place
from clipkit.data.streaming.shards import Shard
from clipkit.data.streaming.state import Pass, StreamState

log = logging.getLogger(__name__)


class Stream(NamedTuple):
    """What is read in every pass.

    Attributes:
        shards: all of them, in the order of their names.
        options: windows, open shards.
        seed: of the order.
        held_out: ids of pictures that are not trained.
        every_caption: whether each caption of a row makes a pair.
        negatives: whether rows come with what is no caption of theirs.
        filters: what a row has to be.
    """

    shards: Sequence[Shard]
    options: Streaming
    seed: int
    held_out: frozenset[int] = frozenset()
    every_caption: bool = False
    negatives: bool = False
    filters: RowFilters | None = None
    nothing: Already = Already()

    def of_rank(self, rank: int, world_size: int, present: Pass) -> RankStream:
        """What a rank reads in a pass."""
        return RankStream(
            self.shards,
            self.shares(rank, world_size, present),
            already=present.already,
            seed=(self.seed, present.number, rank),
            held_out=self.held_out,
            every_caption=self.every_caption,
            filters=self.filters,
            window_rows=self.options.shuffle_window,
            window_bytes=self.options.window_megabytes << 20,
            open_shards=self.options.open_shards,
        )

    def shares(self, rank: int, world_size: int, present: Pass) -> list[Share]:
        """The shares of a rank in a pass."""
        return deal(
            [shard.num_rows for shard in self.shards],
            seed=self.seed,
            number=present.number,
            rank=rank,
            world_size=world_size,
            already=present.already,
        )

    def go_on(
        self, state: StreamState | None, rank: int, world_size: int
    ) -> tuple[Pass, Place] | None:
        """The pass to go on with, and where in it; None without a state.

        With another number of ranks than before, what windows had read and not handed out is
        passed over: there is no one left to go on within them.
        """
        if state is None:
            return None
        present, places = state
        if len(places) == world_size:
            return present, places[rank]
        records = list(present.already.records)
        for before, place in enumerate(places):
            shares = self.shares(before, len(places), present)
            records += rows_read(shares, place.end if place.done else place.start)
        skipped = sum(place.size - place.done for place in places if place.done)
        if rank == 0:
            log.info(
                "data: the stream was read by %d ranks and goes on with %d: of this pass at most "
                "%d rows are skipped, and none comes again",
                len(places), world_size, skipped,
            )  # fmt: skip
        return Pass(present.number, Already(records)), START
