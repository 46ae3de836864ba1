"""Rows of training data from files, folders and the hub. Each row has its position for error messages."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..support.memory import available_bytes
from . import hub
from .errors import DataError, places
from .files import as_cells, files_of, rows_of, text_bytes
from .messages import WEIGHT, Turn, read_turns
from .values import as_json, broken_text, is_date, place_of

__all__ = ["DataError", "Row", "RowSource", "check_fits", "numbered_rows", "parts_of", "places", "read_rows"]

EXPANSION = 2
"""Bytes of memory for a byte of text, at least: two views of 32-bit tokens of four letters. Measured: 1.9 (long rows) to 9 (short ones)."""


class Row:
    """One row, and checked access to its fields.

    Args:
        cells: every value is text, including numbers and lists, as in a CSV file.
    """

    def __init__(self, fields: Any, where: str, cells: bool = False) -> None:
        if not isinstance(fields, Mapping):
            raise DataError(f'{where}: an object is needed, such as {{"prompt": ..., "response": ...}}, not {type(fields).__name__}')
        self.fields: dict[str, Any] = as_json(fields)
        self.where, self.cells = where, cells
        self.columns = list(self.fields)
        """Names of the fields in the data."""
        self.names: dict[str, str] = {}
        """Names in the data of renamed or converted fields."""
        self.date: datetime.date | None = None
        """Date for chat templates that write it; None for today."""

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def error(self, name: str, problem: str) -> DataError:
        """Return the error about a field, or a place in one such as ``messages[1].content``, with its name in the data."""
        own = re.sub(r"^\w+", lambda field: self.name(field[0]), name)
        return DataError(f"{self.where}, field {own!r}: {problem}. The row has: {', '.join(self.columns) or 'nothing'}")

    def name(self, field: str) -> str:
        """Return the name of a field in the data."""
        return self.names.get(field, field)

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or not value:
            raise self.error(
                name, "text is needed, and " + ("there is none" if name not in self else f"it is {json.dumps(value, default=str)[:60]}")
            )
        return str(self.sound(name))

    def sound(self, name: str) -> Any:
        """Return the value of a field after checking that all its text can be encoded, and that columns did not turn text into dates."""
        value = self.fields.get(name)
        if (dated := place_of(value, is_date, name)) is not None:
            place, date = dated
            raise self.error(
                place,
                f"it holds a {type(date).__name__} ({date}), which a column made of text: write the column as text again "
                "(arguments of tool calls as JSON text)",
            )
        if (broken := place_of(value, broken_text, name)) is not None:
            place, text = broken
            at = next(i for i, letter in enumerate(text) if broken_text(letter))
            raise self.error(
                place,
                f"character {at} of the text is half of a surrogate pair ({text[at]!a}), as of an emoji that was cut, which no tokenizer "
                "takes: remove it, or leave the row out",
            )
        return value

    def number(self, name: str, default: float) -> float:
        return self._checked_number(self.fields.get(name, default), name)

    def _checked_number(self, value: Any, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise self.error(name, f"a number >= 0 is needed, and it is {json.dumps(value, default=str)[:60]}")
        return float(value)

    def messages(self, name: str) -> list[Turn]:
        return read_turns(self.sound(name), partial(self.error, name))

    def weights(self, name: str) -> list[float]:
        """Return the weight of each message, which multiplies the loss of its turn."""
        return [
            self._checked_number(message.get(WEIGHT, 1.0), f"{name}[{number}].{WEIGHT}") for number, message in enumerate(self.fields[name])
        ]


RowSource = str | Path | Iterable["str | Path | Mapping[str, Any] | Row"]
"""A file, a folder, a data set of the hub, a list of these, a ``datasets.Dataset``, or rows as dictionaries."""


def read_rows(source: RowSource) -> Iterator[Row]:
    """Yield the rows of a source in order.

    Raises:
        DataError: the file or data set does not exist, has an unknown format or invalid content, or has no rows.
    """
    count = 0
    for row in _rows(source):
        count += 1
        yield row
    if not count:
        raise DataError(f"{source if isinstance(source, (str, Path)) else 'the data'} holds no rows")


def _rows(source: RowSource) -> Iterator[Row]:
    parts = [source] if isinstance(source, (str, Path)) else source
    if not hasattr(parts, "__len__"):
        raise DataError(
            f"data of type {type(source).__name__} has no length: give a list, a datasets.Dataset or a file, or name the files or the data "
            "set of the hub to `kdkernels train --streaming`"
        )
    if isinstance(parts, Mapping):
        raise DataError(f"data is a mapping of {', '.join(map(str, parts))}: give one of its parts, such as one split of a DatasetDict")
    for number, part in enumerate(parts, 1):
        if isinstance(part, (str, Path)):
            yield from _of_name(part)
        else:
            yield part if isinstance(part, Row) else Row(part, f"row {number}")


def parts_of(name: str | Path) -> list[str | Path]:
    """Return the files of a path; for a hub data set, its name."""
    return [name] if isinstance(name, str) and hub.is_hub_name(name) else list(files_of(Path(name)))


def check_fits(source: RowSource) -> None:
    """Check that the examples of the files in a source fit in memory.

    Raises:
        DataError: the examples do not fit, or a file does not exist.
    """
    names = [source] if isinstance(source, (str, Path)) else source if isinstance(source, (list, tuple)) else []
    files = [part for name in names if isinstance(name, (str, Path)) for part in parts_of(name) if isinstance(part, Path)]
    available = available_bytes() if files else None
    sizes = {file: text_bytes(file) for file in files} if available is not None else {}
    needed = EXPANSION * sum(sizes.values())
    if available is not None and needed > available:
        raise DataError(
            f"{max(sizes, key=lambda file: sizes[file])}: the examples of the data take at least {needed / 2**30:,.1f} GiB of memory, and "
            f"{available / 2**30:,.1f} GiB are free. Use `kdkernels train --streaming --max-steps N`, or give fewer rows"
        )


def numbered_rows(file: Path, after: int = 0) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file after row ``after``, each with its number."""
    cells = as_cells(file)
    return ((number, Row(fields, f"{file}, row {number}", cells)) for number, fields in rows_of(file, after))


def _of_name(name: str | Path) -> Iterator[Row]:
    """Yield the rows of a file, a folder or a hub data set."""
    for part in parts_of(name):
        if isinstance(part, str):
            yield from (Row(fields, f"{part}, row {number}") for number, fields in enumerate(hub.load(part), 1))
        else:
            yield from (row for _, row in numbered_rows(part))
