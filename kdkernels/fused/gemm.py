"""The matrix products of a fused-linear loss, written into buffers, with float32 accumulation where the device supports it.

CUDA's GEMM reads 16-bit operands and writes float32. Other devices cannot: there, 16-bit operands of a float32 result are widened
block by block, so that a float32 copy of the whole head never exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends.selection import traits

_BLOCK_BYTES = 16 << 20  # bytes of a widened block of the head


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield the head ``[V, D]`` in blocks of rows, converted to ``dtype``."""
    step = max(1, _BLOCK_BYTES // (weight.shape[1] * dtype.itemsize or 1))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(dtype)


def logits(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute ``out[C, V] = hidden[C, D] @ weight[V, D].T``. ``out`` has the operands' dtype or a wider one."""
    if out.dtype == weight.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif traits(weight.device).wide_products and out.dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for rows, block in _blocks(weight, out.dtype):
            torch.mm(wide, block.t(), out=out[:, rows])


def grad_hidden(dz: Tensor, weight: Tensor, scale: float | Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``dz[C, V] @ weight[V, D] * scale`` in the dtype of dz, or in float32 if a scale applies to 16-bit values.

    The result is in ``out`` if a single product can write it in that dtype. Otherwise ``out`` is unchanged.
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
    """Compute ``accumulator[V, D] += dz[C, V].T @ hidden[C, D]``, or ``=`` if ``first``. The accumulator is at least as wide as dz."""
    beta = 0 if first else 1
    if dz.dtype == accumulator.dtype and first:
        torch.mm(dz.t(), hidden.to(dz.dtype), out=accumulator)
    elif dz.dtype == accumulator.dtype:
        accumulator.addmm_(dz.t(), hidden.to(dz.dtype), beta=beta)
    elif traits(dz.device).wide_products and accumulator.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(accumulator, dz.t(), hidden, torch.float32, beta=beta, out=accumulator)
    else:
        # The blocks stay in cache until they are added in float32 (torch does not vectorise adding 16-bit to 32-bit values).
        # Not in float16: it may overflow in a sum over a chunk's rows.
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
