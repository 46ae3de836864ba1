"""A model of the time of a fused linear loss on an H200, from instruction counts, bytes and FLOP. It has not been measured.

A matrix product takes max(arithmetic, memory traffic), the row kernel max(memory traffic, instruction issue). The constants are
assumptions. Latency is not modelled; kernels usually reach 70-90 % of such bounds.
"""

from __future__ import annotations

from dataclasses import dataclass

BANDWIDTH = 4.3e12  # bytes a second, copied
MATRIX_RATE = 790e12  # FLOP a second in bfloat16
LANES = 128 * 132 * 1.755e9  # lanes of instructions issued a second, at the clock under load
ISSUE_SHARE = 0.85  # the share of it that a row kernel reaches
BUDGET = 4 << 30  # bytes of chunk buffers
ASSUMPTIONS = (
    "Modelled, not measured: an H200 that copies 4.3 TB/s, multiplies 790 TFLOP/s and issues 128 lanes per multiprocessor at 1.755 GHz, "
    "of which the row kernel reaches 85 %; a budget of 4 GiB; every second read of a row comes from memory. The lower time hides the "
    "traffic of the head's gradient accumulator behind its product, the higher one does not; the ratio is of their mean."
)


@dataclass(frozen=True)
class Shape:
    """Tokens, vocabulary, hidden sizes of student and teacher."""

    tokens: int
    vocab: int
    student: int
    teacher: int


SHAPES = (Shape(8192, 128256, 2048, 4096), Shape(16384, 151936, 2048, 4096))

LOGIT_BYTES = {"float32": 4, "bfloat16": 2}


def pair_bytes(kernel: str, dtype: str, sweeps: int) -> int:
    """Return the bytes a row kernel moves per column pair: both logits in each sweep that reads memory, and a 2-byte gradient."""
    reads = 1 if kernel == "cuda one_read" else sweeps
    return 2 * LOGIT_BYTES[dtype] * reads + 2


def chunk_rows(shape: Shape, logit_bytes: int) -> int:
    """Return the rows per chunk within the budget, a multiple of 128."""
    fits = min(BUDGET // (2 * shape.vocab * logit_bytes), 8192)
    if fits >= shape.tokens:
        return shape.tokens
    even = -(-shape.tokens // -(-shape.tokens // fits))
    rounded = -(-even // 128) * 128
    return rounded if rounded <= fits else fits // 128 * 128


def product_ms(m: int, n: int, k: int, out_bytes: int = 2, accumulated_bytes: int = 0) -> float:
    """Return the time of an ``[m, k] @ [k, n]`` product of bfloat16 operands."""
    traffic = 2 * (m * k + n * k) + m * n * (out_bytes + accumulated_bytes)
    return max(2 * m * n * k / MATRIX_RATE, traffic / BANDWIDTH) * 1e3


def floor_ms(shape: Shape) -> float:
    """Return the time of the four matrix products alone, in one chunk."""
    n, v, ds, dt = shape.tokens, shape.vocab, shape.student, shape.teacher
    return product_ms(n, v, ds) + product_ms(n, v, dt) + product_ms(n, ds, v) + product_ms(v, ds, n)


def loss_ms(shape: Shape, kernel: str, dtype: str, instructions: float, sweeps: int) -> tuple[float, float]:
    """Return the time of forward and backward of the loss, with the accumulator's traffic hidden behind its product, and exposed."""
    n, v, ds, dt = shape.tokens, shape.vocab, shape.student, shape.teacher
    logit = LOGIT_BYTES[dtype]
    rows = chunk_rows(shape, logit)
    chunks = -(-n // rows)
    used = n / (chunks * rows)  # the last chunk may be smaller
    products = chunks * used * (product_ms(rows, v, ds, logit) + product_ms(rows, v, dt, logit) + product_ms(rows, ds, v))
    hidden = chunks * used * product_ms(v, ds, rows, 4, 4)
    exposed = (chunks * used * 2 * rows * v * ds / MATRIX_RATE + (2 * chunks - 1) * v * ds * 4 / BANDWIDTH) * 1e3
    pairs = n * v
    row_kernel = max(pairs * pair_bytes(kernel, dtype, sweeps) / BANDWIDTH, pairs * instructions / (LANES * ISSUE_SHARE)) * 1e3
    backward = (v * ds * 6 + n * ds * 8) / BANDWIDTH * 1e3
    other_parts = products + row_kernel + backward
    return other_parts + hidden, other_parts + exposed
