"""Errors that a user can correct, and the words for them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["UserError", "counted", "listed"]


class UserError(RuntimeError):
    """An error that the user can fix. A command prints it in one line, without a traceback."""


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as ``1 row`` or ``1,200 rows``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(places: Sequence[str], most: int = 20) -> str:
    """Return places of rows in one line, such as ``train.jsonl, rows 3, 5, 6``: the first ``most``, and how many more there are."""
    numbers: dict[str, list[str]] = {}
    for place in places[:most]:
        file, row, number = place.rpartition("row ")
        numbers.setdefault(file if row else place, []).extend([number] if row else [])
    parts = [f"{file}row{'s' * (len(rows) > 1)} {', '.join(rows)}" if rows else file for file, rows in numbers.items()]
    return "; ".join(parts) + (f" and {len(places) - most:,} more" if len(places) > most else "")
