"""Normalise values of rows, so that JSON text and Arrow columns (where every object has every field) give the same values."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["as_json", "broken_text", "is_date", "object_of", "place_of", "read_json"]

DATES = (datetime.date, datetime.time, datetime.timedelta)


def as_json(value: Any) -> Any:
    """Return ``value`` without null fields of objects, at every depth. Null elements of lists remain, because columns do not add them."""
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    return value


def read_json(text: str | bytes) -> Any:
    """Parse JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has an object with a repeated name.
    """
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def object_of(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Build an object from names and values.

    Raises:
        ValueError: a name is repeated. JSON readers disagree on which value counts.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {twice!r} twice: leave one of the two out")
    return made


def is_date(value: Any) -> bool:
    """Return True for a date, time or duration, which columns can contain but JSON cannot."""
    return isinstance(value, DATES)


def broken_text(value: Any) -> bool:
    """Return True for text with half of a surrogate pair (a cut emoji), which no tokenizer can encode."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def place_of(value: Any, wrong: Callable[[Any], bool], name: str) -> tuple[str, Any] | None:
    """Return path (such as ``messages[1].content``) and value of the first leaf for which ``wrong`` is true; else None."""
    if isinstance(value, Mapping):
        parts = ((f".{key}", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((f"[{number}]", part) for number, part in enumerate(value))
    else:
        return (name, value) if wrong(value) else None
    return next((place for step, part in parts if (place := place_of(part, wrong, name + step)) is not None), None)
