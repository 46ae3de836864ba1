"""Shards on disk. One row is one example, with the values of all its tokens in binary columns, which are read and written without copies.

topk, sampled
    Parquet: ``key`` (32 bytes), ``count`` (int32, tokens), then little-endian arrays as bytes: ``ids`` int32 ``[count, k]``, and
    ``logprobs`` float16 or float32 ``[count, k]`` with ``log_mass`` float32 ``[count]``, or ``counts`` uint16 ``[count, k]``.
text
    Parquet: training rows unchanged, one column per field.
hidden
    safetensors: ``keys`` uint8 ``[rows, 32]``, ``counts`` int64 ``[rows]``, ``hidden`` ``[tokens, D]`` in the teacher's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["Array", "HiddenShard", "ParquetShard", "columns_of", "suffix", "write_hidden", "write_parquet", "write_text"]

Array = npt.NDArray[Any]
KEY_BYTES = 32
GROUP_BYTES = 1 << 20
"""Size of a Parquet row group before compression. Reading one example at random reads one group: about a millisecond."""


def columns_of(kind: str, k: int, dtype: str | None) -> dict[str, tuple[str, int]]:
    """Return the dtype and the values per token of each binary column."""
    if kind == "topk":
        mass: dict[str, tuple[str, int]] = {"log_mass": ("<f4", 1)} if dtype == "float16" else {}
        return {"ids": ("<i4", k), "logprobs": (np.dtype(dtype).newbyteorder("<").str, k), **mass}
    return {"ids": ("<i4", k), "counts": ("<u2", k)}


def suffix(kind: str) -> str:
    """Return the file name extension of a kind's shards."""
    return "safetensors" if kind == "hidden" else "parquet"


def write_parquet(path: Path, keys: Sequence[bytes], counts: Sequence[int], columns: dict[str, Array]) -> None:
    """Write a shard of ``topk`` or ``sampled``. ``columns``: C-contiguous arrays ``[tokens, ...]``."""
    import pyarrow as pa

    lengths = np.asarray(counts, np.int64)
    ends = np.cumsum(lengths)
    arrays: dict[str, Any] = {
        "key": pa.array(list(keys), pa.binary(KEY_BYTES)),
        "count": pa.array(lengths.astype(np.int32)),
    }
    token_bytes = 0
    for name, values in columns.items():
        width = values.itemsize * int(np.prod(values.shape[1:]))
        token_bytes += width
        offsets = np.concatenate([[0], ends * width]).astype(np.int64)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(values))]
        arrays[name] = pa.Array.from_buffers(pa.large_binary(), len(lengths), buffers)
    _write_table(path, pa.table(arrays), _groups(ends, token_bytes))


def write_text(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a shard of ``text``.

    Raises:
        ValueError: a field has values of different types.
    """
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"a field of the data has values of different types, but a column can only have one: {error}") from None
    _write_table(path, table, [(0, len(rows))])


def _groups(ends: Array, unit: int) -> list[tuple[int, int]]:
    """Return the bounds of row groups of at least ``GROUP_BYTES``. ``ends``: running token count of the rows; ``unit``: bytes per token."""
    bounds, start = [], 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + GROUP_BYTES // unit)) + 1
        bounds.append((start, min(stop, len(ends))))
        start = bounds[-1][1]
    return bounds


def _write_table(path: Path, table: Any, groups: list[tuple[int, int]]) -> None:
    import pyarrow.parquet as pq

    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False, "store_schema": False}
    with pq.ParquetWriter(path, table.schema, **options) as writer:
        for start, stop in groups:
            writer.write_table(table.slice(start, stop - start), row_group_size=stop - start)


def write_hidden(path: Path, keys: Sequence[bytes], counts: Sequence[int], hidden: Tensor) -> None:
    """Write a shard of ``hidden``. ``hidden``: ``[tokens, D]``."""
    from safetensors.torch import save_file

    table = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, KEY_BYTES)
    save_file({"keys": table, "counts": torch.tensor(counts, dtype=torch.int64), "hidden": hidden.contiguous()}, path)


class ParquetShard:
    """One shard, opened for reading its rows in any order. Decodes a row group at a time."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path, memory_map=True)

    def index(self) -> tuple[Array, Array, Array, Array]:
        """Return for each row its key ``[rows, 32]`` uint8, token count, row group, and first token within the group."""
        table = self._file.read(columns=["key", "count"])
        keys = np.frombuffer(b"".join(table["key"].to_pylist()), np.uint8).reshape(-1, KEY_BYTES)
        counts = table["count"].to_numpy().astype(np.int64)
        rows = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        groups = np.repeat(np.arange(len(rows)), rows)
        before = np.cumsum(counts) - counts
        firsts = before[np.cumsum([0, *rows[:-1]])] if rows else before
        return keys, counts, groups, before - firsts[groups] if rows else before

    def group(self, number: int, columns: dict[str, tuple[str, int]]) -> dict[str, Array]:
        """Return an array ``[tokens, values]`` for each column of one row group."""
        table = self._file.read_row_group(number, columns=list(columns))
        return {name: _values(table[name], *form) for name, form in columns.items()}


def read_text_shard(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a text shard, without the None that Parquet stores for absent fields."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return [{name: value for name, value in row.items() if value is not None} for row in file.read().to_pylist()]


def _values(column: Any, dtype: str, width: int) -> Array:
    parts = []
    for chunk in column.chunks:
        size = 8 if str(chunk.type).startswith("large") else 4
        _, offsets, data = chunk.buffers()
        ends = np.frombuffer(offsets, f"<i{size}")[chunk.offset : chunk.offset + len(chunk) + 1]
        parts.append(np.frombuffer(data, np.uint8)[int(ends[0]) : int(ends[-1])] if data is not None else np.empty(0, np.uint8))
    data = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return data.view(dtype).reshape(-1, width)


class HiddenShard:
    """One shard of hidden states, memory-mapped."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file: Any = safe_open(path, framework="pt")
        self._hidden = self._file.get_slice("hidden")  # type: ignore[no-untyped-call]

    def index(self) -> tuple[Array, Array, Array, Array]:
        """Return the same as ``ParquetShard.index``; the whole shard is one group."""
        keys, counts = self._file.get_tensor("keys").numpy(), self._file.get_tensor("counts").numpy()
        return keys, counts, np.zeros(len(counts), np.int64), np.cumsum(counts) - counts

    def read(self, first: int, count: int) -> Tensor:
        """Return hidden states ``[count, D]``."""
        rows: Tensor = self._hidden[first : first + count]
        return rows
