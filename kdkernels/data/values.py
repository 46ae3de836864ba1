"""Values of rows: the same whether they come from JSON text or from Arrow's columns, in which every object has every field."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["as_json", "broken_text", "is_date", "object_of", "place_of", "read_json"]

DATES = (datetime.date, datetime.time, datetime.timedelta)


def as_json(value: Any) -> Any:
    """``value`` without the fields of objects that are null, at every depth. Null elements of lists stay: no column adds any."""
    if isinstance(value, Mapping):
        return {str(name): as_json(part) for name, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [as_json(part) for part in value]
    return value


def read_json(text: str | bytes) -> Any:
    """The value of JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has an object with two values of one name.
    """
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def object_of(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """An object of names and values.

    Raises:
        ValueError: two values of one name. Some readers take the first, others the last.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has {twice!r} twice: leave one of the two out")
    return made


def is_date(value: Any) -> bool:
    """True for a date, time or duration, which a column can hold and JSON can't."""
    return isinstance(value, DATES)


def broken_text(value: Any) -> bool:
    """True for text with half of a surrogate pair, such as an emoji that was cut: no encoding has it, so no tokenizer takes it."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def place_of(value: Any, wrong: Callable[[Any], bool], name: str) -> tuple[str, Any] | None:
    """Path and value of the first leaf that is ``wrong``, such as ``messages[1].content``; None if all are right."""
    if isinstance(value, Mapping):
        parts = ((f".{key}", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        parts = ((f"[{number}]", part) for number, part in enumerate(value))
    else:
        return (name, value) if wrong(value) else None
    return next((place for step, part in parts if (place := place_of(part, wrong, name + step)) is not None), None)
