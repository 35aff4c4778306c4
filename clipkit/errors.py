"""The one exception for what a user wrote: the command line prints its sentence and exits with 2."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user wrote: one sentence with the key, the value and what is accepted."""
