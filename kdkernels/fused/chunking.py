"""How many rows of logits to hold at a time. Pure integers: no tensor, no device, no side effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

DEFAULT_BUDGET = 1 << 30
"""Bytes for the chunk buffers of one call by default, on a CPU; on a GPU the least (``default_budget``)."""

ROW_MULTIPLE = 128
"""Matrix units work on tiles of 128 rows: a chunk that is no multiple of it wastes part of its last tile."""


def useful_rows(enough_rows: int | None, cheap_bytes: int, bytes_per_row: int) -> int | None:
    """Rows beyond which a larger chunk gains nothing; None: not known.

    Args:
        enough_rows: beyond these the matrix products get no faster, and more rows would only take memory.
        cheap_bytes: buffers up to this size are used in any case: each chunk less is a pass less over the head's gradient accumulator.
    """
    return None if enough_rows is None else max(enough_rows, cheap_bytes // max(bytes_per_row, 1))


def default_budget(device_memory: int | None) -> int:
    """Return 1/32 of the GPU's memory, at least 1 GiB. ``device_memory`` is None where the device is not a GPU.

    Every chunk reads and writes the whole accumulator of the head's gradient. At 1 GiB, eight chunks of a vocabulary of 128k spend as much
    time on that as on a fifth of a product; at 1/32 of 141 GiB it is two.
    """
    return DEFAULT_BUDGET if device_memory is None else max(DEFAULT_BUDGET, device_memory // 32)


@dataclass(frozen=True)
class Chunks:
    """``num_rows`` rows in ``count`` chunks of at most ``rows`` rows, all of nearly the same size."""

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
    """The largest even chunks within the budget, in multiples of 128 where more than one chunk is needed.

    Args:
        num_rows: rows there are, >= 0.
        bytes_per_row: what one row takes in the chunk buffers; 0 if no side needs a buffer.
        memory_budget: bytes for the buffers, default 1 GiB.
        chunk_rows: sets the rows per chunk directly; the budget is ignored.
        enough_rows: rows beyond which nothing gets faster.

    Raises:
        ValueError: the budget does not hold one row; the message says how much does.
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
    if rounded > fits:  # one chunk more rather than a ragged size, unless the budget is below one tile
        rounded = fits // ROW_MULTIPLE * ROW_MULTIPLE or even
    return Chunks(num_rows, rounded)


def padded_vocab(vocab: int, itemsize: int) -> int:
    """Leading dimension of a ``[rows, vocab]`` buffer whose rows start at multiples of 64 bytes.

    GEMMs and vector loads need 16 bytes; Triton also needs a multiple of 16 elements to know that a row has them.
    """
    step = 64 // itemsize
    return -(-vocab // step) * step
