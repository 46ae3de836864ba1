"""Read numbered rows from files: JSONL, JSON, CSV, Parquet, plain text, and folders saved by ``datasets``."""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from .errors import DataError
from .values import object_of, read_json

__all__ = ["SUFFIXES", "as_cells", "files_of", "is_list", "rows_of", "text_bytes"]

Numbered = Iterator[tuple[int, Any]]
"""Rows with their numbers, from 1."""
BLOCK = 64 << 20
"""Block size of a CSV file in bytes. A row must fit in a block."""
FACTS = ("manifest.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files in a data folder that describe it and do not contain rows."""
WHITE = re.compile(r"[ \t\r\n]*")
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files that ``datasets`` writes into the folder of a saved data set, and into that of several splits."""


def files_of(path: Path) -> list[Path]:
    """Return the data files in a folder, sorted by name. A file or a saved data set returns itself.

    Raises:
        DataError: the path does not exist, or the folder has no data files, several splits, or plain text next to other rows.
    """
    if path.is_file() or (path / SAVED).is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file")
    if (path / SAVED_SPLITS).is_file():
        splits = sorted(str(folder) for folder in path.iterdir() if folder.is_dir())
        raise DataError(f"{path}: the folder has several splits: choose one of {', '.join(splits)}")
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES and f.is_file() and f.name not in FACTS)
    if not files:
        raise DataError(f"{path}: the folder has no {', '.join(SUFFIXES)} file")
    texts = [file for file in files if file.suffix == ".txt"]
    if texts and len(texts) < len(files):
        other = next(file for file in files if file not in texts)
        raise DataError(
            f"{path}: the folder holds {texts[0].name}, whose lines would be rows of text, beside {other.name}: name the files that you "
            "mean"
        )
    return files


def rows_of(path: Path, after: int = 0) -> Numbered:
    """Return the rows of one file. The suffix selects the reader.

    Args:
        after: number of a row. Only later rows are returned; earlier rows are skipped as cheaply as the format allows.

    Raises:
        DataError: the suffix is unknown, or the content does not have its format.
    """
    if path.is_dir():
        yield from _saved(path, after)
    elif path.suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown file extension; expected one of {', '.join(SUFFIXES)}")
    else:
        yield from SUFFIXES[path.suffix](path, after)


def text_bytes(path: Path) -> int:
    """Return the uncompressed size of a file's rows in bytes.

    Raises:
        DataError: the content does not have the file's format.
    """
    if path.is_dir():
        return sum(file.stat().st_size for file in path.glob("*.arrow"))
    if path.suffix != ".parquet":
        return path.stat().st_size
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return sum(file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not Parquet ({error})") from None


def as_cells(path: Path) -> bool:
    """Return True for a format in which every value is text, including numbers and lists."""
    return path.suffix in (".csv", ".tsv")


def _saved(folder: Path, after: int) -> Numbered:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{folder} was saved by datasets, which is not installed: pip install datasets") from None
    dataset = datasets.load_from_disk(str(folder))
    if after < len(dataset):
        yield from enumerate(dataset.skip(after), after + 1)


def _jsonl(path: Path, after: int) -> Numbered:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number <= after or not line.strip():
                continue
            try:
                fields = read_json(line)
            except ValueError as error:
                raise DataError(f"{path}, row {number}: not JSON in UTF-8 ({error})") from None
            yield number, fields


def is_list(path: Path) -> bool:
    """Return True for a JSON file that contains one list of rows."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _json(path: Path, after: int) -> Numbered:
    """Yield rows from a list of objects, parsed one by one, or from a file with one object per line."""
    if not is_list(path):
        yield from _jsonl(path, after)
        return
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not JSON in UTF-8 ({error})") from None
    decoder = json.JSONDecoder(object_pairs_hook=object_of)
    number, at = 0, _skipped(text, text.index("[") + 1)
    more = text[at : at + 1] != "]"
    while more:
        number += 1
        try:
            value, at = decoder.raw_decode(text, at)
            at = _skipped(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise ValueError(f"a comma or the end of the list is missing at character {at}")
        except (ValueError, RecursionError) as error:
            reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise DataError(f"{path}, row {number}: not JSON ({reason})") from None
        if number > after:
            yield number, value
        more = text[at] == ","
        at = _skipped(text, at + 1) if more else at
    if text[at + 1 :].strip():
        raise DataError(f"{path}: text follows the list of rows; expected one list of objects, or an object on each line")


def _skipped(text: str, at: int) -> int:
    """Return the position of the first non-whitespace character from ``at`` on."""
    match = WHITE.match(text, at)
    return at if match is None else match.end()


def _csv(path: Path, after: int) -> Numbered:
    """Yield rows of a table with a header. Every cell is text; empty cells are missing."""
    import pyarrow
    from pyarrow import csv

    parse = csv.ParseOptions(delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True)
    read = csv.ReadOptions(block_size=BLOCK)
    try:
        names = csv.open_csv(path, read, parse).schema.names
        _check_names(path, names)
        text = csv.ConvertOptions(
            column_types=dict.fromkeys(names, pyarrow.string()), null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=True
        )
        yield from _of_batches(csv.open_csv(path, read, parse, text), 0, after)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not CSV in UTF-8 with a header ({str(error).splitlines()[0][:200]})") from None


def _of_batches(batches: Iterable[Any], before: int, after: int) -> Numbered:
    """Yield rows of Arrow batches. The first batch starts after row ``before``."""
    for batch in batches:
        skipped = min(max(after - before, 0), batch.num_rows)
        yield from enumerate(batch.slice(skipped).to_pylist(), before + skipped + 1)
        before += batch.num_rows


def _text(path: Path, after: int) -> Numbered:
    """Yield a row of ``text`` for each line that is not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number <= after:
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, row {number}: not text in UTF-8 ({error})") from None
            if text.strip():
                yield number, {"text": text}


def _check_names(path: Path, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two columns have the name {max(names, key=names.count)!r}: leave one of the two out")


def _parquet(path: Path, after: int) -> Numbered:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            decoders = {field.name: decoder for field in file.schema_arrow if (decoder := _decoder(field)) is not None}
            ends = list(accumulate(file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)))
            first = bisect(ends, after)
            batches = file.iter_batches(1024, row_groups=range(first, len(ends)))
            for number, row in _of_batches(batches, ends[first - 1] if first else 0, after):
                try:
                    row.update({name: decoder(row[name]) for name, decoder in decoders.items()})
                except ValueError as error:
                    raise DataError(
                        f"{path}, row {number}: a column of JSON or maps ({', '.join(decoders)}) can't be read ({error})"
                    ) from None
                yield number, row
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not Parquet ({error})") from None


SUFFIXES: dict[str, Callable[[Path, int], Numbered]] = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet, ".txt": _text,
}  # fmt: skip
"""Readers by file extension."""

Decoder = Callable[[Any], Any]
JSON_TYPE = b"arrow.json"


def _decoder(field: Any) -> Decoder | None:
    """Return a decoder for JSON text (``datasets`` writes mixed values this way) and maps in a Parquet column, at any depth; else None."""
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
