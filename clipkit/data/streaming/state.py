"""Where all ranks stand in a pass through a stream, as a checkpoint holds it."""

from __future__ import annotations

from typing import Any, NamedTuple

from clipkit.data.streaming.dealing import Already, Read
from clipkit.data.streaming.reading import Cursor
from clipkit.data.streaming.sampler import Place


class Pass(NamedTuple):
    """A pass through a stream: its number, and what of it was read by another number of ranks."""

    number: int
    already: Already


class StreamState(NamedTuple):
    """A pass, and the place of each rank in it."""

    present: Pass
    places: list[Place]

    def packed(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        return {
            "pass": self.present.number,
            "read": [list(read) for read in self.present.already.records],
            "places": [
                [_packed(place.start), _packed(place.end), place.size, place.done]
                for place in self.places
            ],
        }

    @classmethod
    def unpacked(cls, state: dict[str, Any]) -> StreamState:
        """What `packed` made."""
        already = Already(Read(*map(int, read)) for read in state["read"])
        places = [
            Place(_unpacked(start), _unpacked(end), int(size), int(done))
            for start, end, size, done in state["places"]
        ]
        return cls(Pass(int(state["pass"]), already), places)


def _packed(cursor: Cursor) -> list[Any]:
    return [cursor.window, cursor.begun, [list(share) for share in cursor.open]]


def _unpacked(cursor: list[Any]) -> Cursor:
    window, begun, shares = cursor
    return Cursor(int(window), int(begun), tuple((int(p), int(row)) for p, row in shares))
