"""The matrix products of a fused-linear loss, written into buffers, with float32 accumulation wherever the device has it.

CUDA's GEMM reads 16-bit operands and writes float32. The others have no such form: there, 16-bit operands of a float32 result
are widened block by block, so that no float32 copy of a whole head ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends.selection import traits

_BLOCK_BYTES = 16 << 20  # of a widened block of the head


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The head ``[V, D]`` in blocks of rows, in ``dtype``."""
    step = max(1, _BLOCK_BYTES // (weight.shape[1] * dtype.itemsize or 1))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(dtype)


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """``out[C, V] = hidden[C, D] @ weight[V, D].T``; out in the operands' dtype or wider."""
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif traits(weight.device).wide_products and out.dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for rows, block in _blocks(weight, out.dtype):
            torch.mm(wide, block.t(), out=out[:, rows])


def grad_hidden(dz: Tensor, weight: Tensor, scale: float | Tensor, out: Tensor | None = None) -> Tensor:
    """``dz[C, V] @ weight[V, D] * scale`` in dz's dtype, in float32 where a scale must be applied to 16 bits.

    Written to ``out`` and returned as such where one product makes the result in its dtype; else ``out`` is not touched.
    """
    unscaled = not isinstance(scale, Tensor) and scale == 1.0
    if dz.dtype == weight.dtype:
        if unscaled:
            return torch.mm(dz, weight, out=out if out is not None and out.dtype == dz.dtype else None)
        if traits(weight.device).wide_products:
            product: Tensor = torch.ops.aten.mm.dtype(dz, weight, torch.float32)
            return product.mul_(scale)
    wide = torch.zeros(dz.shape[0], weight.shape[1], dtype=torch.promote_types(dz.dtype, torch.float32), device=dz.device)
    for rows, block in _blocks(weight, wide.dtype):
        wide.addmm_(dz[:, rows].to(wide.dtype), block)
    return wide if unscaled else wide.mul_(scale)


def add_grad_weight(accumulator: Tensor, dz: Tensor, hidden: Tensor, first: bool) -> None:
    """``accumulator[V, D] (+)= dz[C, V].T @ hidden[C, D]``; the accumulator is at least as wide as dz, and is not read when ``first``."""
    beta = 0 if first else 1
    if dz.dtype == accumulator.dtype and first:
        torch.mm(dz.t(), hidden.to(dz.dtype), out=accumulator)
    elif dz.dtype == accumulator.dtype:
        accumulator.addmm_(dz.t(), hidden.to(dz.dtype), beta=beta)
    elif traits(dz.device).wide_products and accumulator.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(accumulator, dz.t(), hidden, torch.float32, beta=beta, out=accumulator)
    else:
        # Blocks small enough for the sum in float32 to find them in cache (adding 16 bits to 32 outright is not vectorised).
        # A sum over a chunk's rows need not fit into float16.
        step = max(1, _BLOCK_BYTES // 4 // (hidden.shape[1] * accumulator.element_size() or 1))
        dtype = accumulator.dtype if dz.dtype == torch.float16 else dz.dtype
        hidden = hidden.to(dtype)
        for start in range(0, dz.shape[1], step):
            rows = slice(start, start + step)
            part = torch.mm(dz[:, rows].t().to(dtype), hidden)
            if first:
                accumulator[rows].copy_(part)
            else:
                accumulator[rows].add_(part.to(accumulator.dtype))
