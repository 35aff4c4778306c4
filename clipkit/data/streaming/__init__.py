"""Data sets that are read from their beginning on, not opened as a whole."""

from clipkit.data.streaming.options import Streaming

__all__ = ["Streaming"]
