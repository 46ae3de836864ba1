"""Rows of training data from wherever they are kept, each with its place, so that an error can name it."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from .messages import Turn, read_turns
from .values import as_json, broken_text, is_date, object_of, place_of, read_json

__all__ = ["DataError", "Row", "RowSource", "places", "read_rows"]

SUFFIXES = (".jsonl", ".ndjson", ".parquet")


MOST_NAMED = 20


def places(wheres: Iterable[str], most: int = MOST_NAMED) -> str:
    """Rows by file and number, such as ``train.jsonl, rows 3, 17; held.jsonl, row 2``; the first ``most`` of them, then how many more."""
    rows: dict[str, list[str]] = {}
    every = list(wheres)
    for where in every[:most]:
        file, _, number = where.rpartition("row ")
        rows.setdefault(file, []).append(number)
    named = [f"{file}row{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}" for file, numbers in rows.items()]
    return "; ".join(named) + (f"; and {len(every) - most:,} more" if len(every) > most else "")


class DataError(ValueError):
    """Data that can't be trained on. The message names the file, the row and the field."""


class Row:
    """One row, and checked access to its fields."""

    def __init__(self, fields: Any, where: str) -> None:
        if not isinstance(fields, Mapping):
            raise DataError(f'{where}: an object is needed, such as {{"prompt": ..., "response": ...}}, not {type(fields).__name__}')
        self.fields: dict[str, Any] = as_json(fields)
        self.where = where
        self.date: datetime.date | None = None
        """What a chat template that writes the date writes; None for today."""

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def error(self, name: str, problem: str) -> DataError:
        return DataError(f"{self.where}, field {name!r}: {problem}. The row has: {', '.join(self.fields) or 'nothing'}")

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str) or not value:
            raise self.error(
                name, "text is needed, and " + ("there is none" if name not in self else f"it is {json.dumps(value, default=str)[:60]}")
            )
        return str(self.sound(name))

    def sound(self, name: str) -> Any:
        """The value of a field, once it is known that every text in it can be encoded, and that a column made no dates of text."""
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
        value = self.fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise self.error(name, f"a number >= 0 is needed, and it is {json.dumps(value, default=str)[:60]}")
        return float(value)

    def messages(self, name: str) -> list[Turn]:
        return read_turns(self.sound(name), partial(self.error, name))


RowSource = str | Path | Iterable[str | Path | Mapping[str, Any]]
"""A JSONL or Parquet file, a folder of them, a list of either, a ``datasets.Dataset``, or rows as dictionaries."""


def read_rows(source: RowSource) -> Iterator[Row]:
    """The rows of a source, in order.

    Raises:
        DataError: no such file, a format that isn't known, a line that is no JSON object, or no rows at all.
    """
    count = 0
    for where, fields in _numbered(source):
        count += 1
        yield Row(fields, where)
    if not count:
        raise DataError(f"{source if isinstance(source, (str, Path)) else 'the data'} holds no rows")


def _numbered(source: RowSource) -> Iterator[tuple[str, Any]]:
    parts = [source] if isinstance(source, (str, Path)) else source
    if not hasattr(parts, "__len__"):
        raise DataError(
            f"data of type {type(source).__name__} has no length: give a list, a datasets.Dataset or a file; streams are not supported"
        )
    for number, part in enumerate(parts, 1):
        if isinstance(part, (str, Path)):
            yield from _of_path(Path(part))
        else:
            yield f"row {number}", part


def _of_path(path: Path) -> Iterator[tuple[str, Any]]:
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"{path}: no such file" if not path.is_dir() else f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
    for file in files:
        if file.suffix == ".parquet":
            yield from _parquet(file)
        elif file.suffix in SUFFIXES:
            yield from _jsonl(file)
        else:
            raise DataError(f"{file}: the format is told by the name, which ends in none of {', '.join(SUFFIXES)}")


def _jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            try:
                fields = read_json(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON in UTF-8 ({error})") from None
            yield where, fields


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError(f"{path}: two columns have the name {max(names, key=names.count)!r}: leave one of the two out")
            decoders = {field.name: decoder for field in file.schema_arrow if (decoder := _decoder(field)) is not None}
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                where = f"{path}, row {number}"
                try:
                    row.update({name: decoder(row[name]) for name, decoder in decoders.items()})
                except ValueError as error:
                    raise DataError(f"{where}: a column of JSON or maps ({', '.join(decoders)}) can't be read ({error})") from None
                yield where, row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not Parquet ({error})") from None


Decoder = Callable[[Any], Any]
JSON_TYPE = b"arrow.json"


def _decoder(field: Any) -> Decoder | None:
    """Reads what a Parquet column holds as JSON text (``datasets`` writes mixed values so) and its maps, at any depth; None if neither."""
    import pyarrow

    kind = field.type
    named = (field.metadata or {}).get(b"ARROW:extension:name") == JSON_TYPE  # before pyarrow has a type for it
    if named or getattr(kind, "extension_name", "") == JSON_TYPE.decode():
        return _if_any(read_json)
    if pyarrow.types.is_map(kind):
        of_value = _decoder(kind.item_field) or (lambda value: value)
        return _if_any(lambda pairs: object_of([(name, of_value(value)) for name, value in pairs]))
    if pyarrow.types.is_struct(kind):
        parts = {part.name: decoder for part in kind if (decoder := _decoder(part)) is not None}
        if parts:
            return _if_any(lambda value: {name: parts[name](part) if name in parts else part for name, part in value.items()})
    elif hasattr(kind, "value_field"):  # of any list
        of_element = _decoder(kind.value_field)
        if of_element is not None:
            return _if_any(lambda value: [of_element(part) for part in value])
    return None


def _if_any(decode: Decoder) -> Decoder:
    return lambda value: None if value is None else decode(value)
