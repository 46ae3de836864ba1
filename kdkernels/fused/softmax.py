"""Softmax and log-softmax of a logits tensor: chunk loop, custom ops and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import selection
from . import chunking, ops, pages
from .call import Call, Tensors, flatten, restore
from .ops import Gradient, Kernel, define, refuse_forward_mode
from .work import Rows


def write(call: Call, x: Tensor, dy: Tensor | None, out: Tensor) -> None:
    """Write ``softmax(x / T)`` or its logarithm to ``out``. With ``dy``, x is that result and ``out`` receives the gradient by the logits.

    All tensors are ``[..., V]``. ``out`` has unit stride in its last dimension and one stride between rows, and may be x or dy. Inputs
    with other strides are copied chunk by chunk.
    """
    if not out.numel():
        return
    sources = [Rows(t, None) for t in (x, dy) if t is not None]
    copied = sum(not s.sliceable for s in sources) * call.vocab * x.element_size()
    target = out.view(-1, call.vocab)
    backend, logarithm = selection.load(call.backend), call.quantity == "log_softmax"
    for start, stop in chunking.plan_chunks(len(target), copied, call.memory_budget, call.chunk_rows):
        first, *more = [s.take(start, stop) for s in sources]
        if more:
            backend.softmax_gradient_rows(first, more[0], target[start:stop], call.temperature, logarithm)
        else:
            backend.softmax_rows(first, target[start:stop], call.temperature, logarithm)


def _new_softmax(x: Tensor, dy: Tensor | None, *flat: Any) -> Tensor:
    out = pages.recycled(torch.empty(x.shape, dtype=x.dtype, device=x.device))
    write(restore([x], *flat)[0], x, dy, out)
    return out


def _softmax_into(out: Tensor, logits: Tensor | None, *flat: Any) -> None:
    x = out if logits is None else logits
    write(restore([x], *flat)[0], x, None, out)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)


class _Softmax(torch.autograd.Function):
    """Autograd of softmax. The gradient needs only the result."""

    @staticmethod
    def forward(ctx: Any, op: Kernel, numbers: Tensor, sizes: Sequence[int], text: str, logits: Tensor) -> Tensor:
        ctx.sizes, ctx.text = sizes, text
        output: Tensor = op([logits], numbers, sizes, text)
        ctx.save_for_backward(output, numbers)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        output, numbers = ctx.saved_tensors
        return None, None, None, None, softmax_backward(output, upstream, numbers, ctx.sizes, ctx.text)


def _empty(logits: Tensor, *flat: Any) -> Tensor:
    return logits.new_empty(logits.shape)


softmax = define("softmax", "Tensor logits", "Tensor", lambda x, *flat: _new_softmax(x, None, *flat), _empty, _Softmax)
softmax_backward = define("softmax_backward", "Tensor y, Tensor dy", "Tensor", _new_softmax, _empty, Gradient)
softmax_out = define("softmax_out", "Tensor(a!) out, Tensor? logits", "()", _softmax_into, lambda *flat: None)
"""``softmax`` into ``out``. Without ``logits``, ``out`` holds the logits and is overwritten."""


def run(call: Call, logits: Tensor, out: Tensor | None) -> Tensor:
    """Return ``softmax(logits / T)`` or its logarithm. A result in ``out``, which may be the logits, has no gradient."""

    def fused(call: Call, tensors: Tensors) -> tuple[Tensor]:
        _, *flat = flatten(call, tensors)
        if out is None:
            refuse_forward_mode(call, logits)
            return (softmax(logits, *flat),)
        softmax_out(out, None if out is logits else logits.detach(), *flat)
        return (out,)

    (result,) = ops.run(call, Tensors({"student.input": logits}), fused)
    return result if out is None or result is out else out.copy_(result)
