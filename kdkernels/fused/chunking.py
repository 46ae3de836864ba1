"""Choose how many rows of logits to hold at a time. Pure integer functions: no tensors, no devices, no side effects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DEFAULT_BUDGET = 1 << 30
"""Default bytes for the chunk buffers of one call on a CPU; the minimum on a GPU (see ``default_budget``)."""

ROW_MULTIPLE = 128
"""Matrix units work on tiles of 128 rows. A chunk whose size is not a multiple of 128 wastes part of its last tile."""


def useful_rows(enough_rows: int | None, cheap_bytes: int, bytes_per_row: int) -> int | None:
    """Return the number of rows above which a larger chunk is not faster; None if unknown.

    Args:
        enough_rows: number of rows above which the matrix products are not faster, and more rows only cost memory.
        cheap_bytes: buffers up to this size are always used, since fewer chunks mean fewer passes over the head's gradient accumulator.
    """
    return None if enough_rows is None else max(enough_rows, cheap_bytes // max(bytes_per_row, 1))


def default_budget(device_memory: int | None) -> int:
    """Return 1/32 of the GPU's memory, at least 1 GiB. ``device_memory`` is None for a device that is not a GPU.

    Every chunk reads and writes the whole accumulator of the head's gradient. With 1 GiB, a vocabulary of 128k takes eight chunks, and
    that traffic costs as much time as a fifth of a matrix product. With 1/32 of 141 GiB it takes two chunks.
    """
    return DEFAULT_BUDGET if device_memory is None else max(DEFAULT_BUDGET, device_memory // 32)


@dataclass(frozen=True)
class Chunks:
    """``num_rows`` rows split into ``count`` chunks of at most ``rows`` rows and of nearly equal size."""

    num_rows: int
    rows: int

    @property
    def count(self) -> int:
        return -(-self.num_rows // self.rows) if self.num_rows else 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((i, min(i + self.rows, self.num_rows)) for i in range(0, self.num_rows, self.rows))


def plan_chunks(
    num_rows: int,
    bytes_per_row: int,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    enough_rows: int | None = None,
) -> Chunks:
    """Return the largest even chunks within the budget. If more than one chunk is needed, their size is a multiple of 128.

    Args:
        num_rows: total number of rows, >= 0.
        bytes_per_row: bytes of one row in the chunk buffers; 0 if neither side needs a buffer.
        memory_budget: bytes for the buffers, default 1 GiB.
        chunk_rows: sets the rows per chunk directly; the budget is ignored.
        enough_rows: number of rows above which a chunk is not faster.

    Raises:
        ValueError: the budget is too small for one row; the message gives the minimum.
    """
    if chunk_rows is not None:
        return Chunks(num_rows, max(1, min(chunk_rows, num_rows)))
    budget = DEFAULT_BUDGET if memory_budget is None else memory_budget
    if budget < bytes_per_row:
        raise ValueError(f"memory_budget={budget} bytes is too small for one row of logits: the minimum here is {bytes_per_row} bytes")
    fits = budget // bytes_per_row if bytes_per_row else num_rows
    if enough_rows is not None:
        fits = min(fits, enough_rows)
    if fits >= num_rows:
        return Chunks(num_rows, max(1, num_rows))
    count = -(-num_rows // fits)
    even = -(-num_rows // count)
    rounded = -(-even // ROW_MULTIPLE) * ROW_MULTIPLE
    if rounded > fits:  # prefer one more chunk to a ragged size, unless the budget is below one tile
        rounded = fits // ROW_MULTIPLE * ROW_MULTIPLE or even
    return Chunks(num_rows, rounded)


def padded_vocab(vocab: int, itemsize: int) -> int:
    """Return the row stride, in elements, of a ``[rows, vocab]`` buffer whose rows are aligned to 64 bytes.

    GEMMs and vector loads need 16-byte alignment. Triton infers it only from a stride that is a multiple of 16 elements.
    """
    step = 64 // itemsize
    return -(-vocab // step) * step
