"""Numbers that a constructor takes: what is out of range ends in a sentence, not in a library."""

from __future__ import annotations

from collections.abc import Sequence

from clipkit.errors import UserError

MOST = 2**20
"""The widest and deepest that a part is: products of such numbers are still sizes to torch."""


def check_whole(key: str, value: int, *, least: int = 1, most: int = MOST) -> None:
    """Refuse a whole number that lies elsewhere.

    Raises:
        UserError: it names the key, the value and what is accepted.
    """
    if not least <= value <= most:
        raise UserError(
            f"{key}: {value} is not accepted, whole numbers from {least} to {most:,} are"
        )


def check_number(key: str, value: float, *, least: float, most: float) -> None:
    """Refuse a number that lies elsewhere, and what is none.

    Raises:
        UserError: it names the key, the value and what is accepted.
    """
    if not least <= value <= most:
        raise UserError(f"{key}: {value} is not accepted, numbers from {least:g} to {most:g} are")


def check_ratio(key: str, value: float) -> None:
    """Refuse what is no part of a whole, or all of it.

    Raises:
        UserError: it names the key and the value.
    """
    if not 0.0 <= value < 1.0:
        raise UserError(f"{key}: {value} is not a ratio, accepted are 0 to below 1")


def check_choice(key: str, value: object, accepted: Sequence[str]) -> None:
    """Refuse a word that is none of those accepted.

    Raises:
        UserError: it names the key, the value and what is accepted.
    """
    if value not in accepted:
        raise UserError(f"{key}: {value} is not accepted, {' or '.join(accepted)} are")
