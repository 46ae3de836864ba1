"""The backend "native": row kernels in C++ for the CPU, see csrc/cpu."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import Product, _extension
from .rows import HeadBatch, RowBatch, Stage

if TYPE_CHECKING:
    from ..fused.call import Call

DEVICE_TYPES = ("cpu",)


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return the reason why the backend cannot run on this device, or None."""
    if device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device.type}"
    return _extension.missing()


def state_scales(call: Call) -> tuple[float, float]:
    """Return 1 for both sides: states hold logits."""
    return 1.0, 1.0


def rows(call: Call, batch: RowBatch, stages: Stage) -> None:
    """Run a batch on ``torch.get_num_threads()`` threads, without the GIL."""
    _extension._C.cpu_rows(_extension.row_arguments(call, batch, stages, "cpu"), torch.get_num_threads())


def head_rows(call: Call, batch: HeadBatch, stages: Stage) -> None:
    """Run a batch of one side on ``torch.get_num_threads()`` threads, without the GIL."""
    _extension._C.cpu_head_rows(_extension.head_arguments(call, batch, stages, "cpu"), torch.get_num_threads())


def softmax_rows(x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """Write ``softmax(x / T)`` or its logarithm to ``out``."""
    _extension._C.cpu_softmax_rows(_extension.softmax_arguments(x, None, out, temperature, logarithm, "cpu"), torch.get_num_threads())


def softmax_gradient_rows(y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """Write the gradient by x to ``out``, from the softmax's result y and its gradient dy."""
    _extension._C.cpu_softmax_rows(_extension.softmax_arguments(y, dy, out, temperature, logarithm, "cpu"), torch.get_num_threads())


def product_of(weight: Tensor, dtype: torch.dtype, result: torch.dtype) -> Product | None:
    """Return ``product`` for a bfloat16 head and a float32 result if the processor supports it, else None."""
    if weight.shape[1] % 2 or weight.stride(1) != 1 or (dtype, result) != (torch.bfloat16, torch.float32):
        return None
    return product if _extension.missing() is None and _extension._C.cpu_has_product() else None


def product(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """Compute ``out[C, V] = hidden[C, D] @ weight[V, D].T``, D even: exact products of bfloat16 operands, summed in float32."""
    (count, depth), vocab = hidden.shape, weight.shape[0]
    _extension._C.cpu_product(
        _extension.address_of("hidden", hidden, (count, depth), torch.bfloat16, "cpu"),
        _extension.address_of("weight", weight, (vocab, depth), torch.bfloat16, "cpu"),
        _extension.address_of("out", out, (count, vocab), torch.float32, "cpu"),
        count, vocab, depth, hidden.stride(0), weight.stride(0), out.stride(0), torch.get_num_threads(),
    )  # fmt: skip
