"""``DataError``, and the formatting of row positions in messages."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["DataError", "places"]

MOST_NAMED = 20


class DataError(ValueError):
    """The data cannot be used. The message names the file, the row and the field."""


def places(wheres: Iterable[str], most: int = MOST_NAMED) -> str:
    """Return rows as text, such as ``train.jsonl, rows 3, 17; held.jsonl, row 2``: the first ``most``, then the number of others."""
    rows: dict[str, list[str]] = {}
    every = list(wheres)
    for where in every[:most]:
        file, _, number = where.rpartition("row ")
        rows.setdefault(file, []).append(number)
    named = [f"{file}row{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}" for file, numbers in rows.items()]
    return "; ".join(named) + (f"; and {len(every) - most:,} more" if len(every) > most else "")
