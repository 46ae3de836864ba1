"""Run one call chunk by chunk: multiply the valid rows, run the backend's row kernels, accumulate gradients. Independent of autograd.

Where each gradient is computed:

- student head, summed loss: forward computes the hidden and head gradients, unscaled; backward scales them (``scale``).
- student head, per-token loss: forward computes the hidden gradient, each row linear in its upstream gradient; for a trainable
  head, backward recomputes the chunks with the upstream gradients folded in (``recompute``).
- dense student, dense teacher: backward recomputes from the saved row state. This costs as many exponentials and bytes as writing
  the gradient in forward and scaling it later, but no ``[N, V]`` gradient is stored between the passes.
- dense student, teacher head: forward computes the logit gradient and backward scales it, so that the teacher is multiplied only
  once. Float16 may not hold the unscaled gradient, so there backward recomputes.

A quantity of one side (``Call.quantity``) takes the same path without a teacher. The gradient for several ids per row is not linear in
one upstream number per row: see ``one_side.from_ids``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.rows import FORWARD, STATE, STATS, Stage
from ..backends.selection import traits
from . import one_side, pages
from .call import Call, Tensors
from .work import Arrays, Gradients, Selected, Work, plan, select_rows

BLOCK_ELEMENTS = 1 << 21  # elements of a block that stays in cache


class Outputs(NamedTuple):
    """Results of a forward pass. Gradients that are not needed are empty."""

    loss: Tensor  # [] or, per token, [...], or [..., K]
    num_valid: Tensor  # [] int64: valid tokens
    stats: Tensor  # [5, ...] float32, or empty
    state: Tensor  # [len(STATE), N]; one side: [2 + K, N], entropy: [3, N]. Undefined beyond the valid rows; [0] if backward ignores it
    d_student: Tensor  # [..., Ds or V], unscaled; in the compute dtype for ids [..., K] (it is m) and for float16 hidden states
    d_weight: Tensor  # [>= V, Ds] float32 or float64, unscaled
    d_bias: Tensor  # [>= V]
    selected: Tensor  # [N] int64: flat indices of the valid rows; zeros if all rows are valid; [0] if backward ignores it
    num_selected: Tensor  # [] int64 on the host: a copy of num_valid


SAVED = ("state", "d_student", "d_weight", "d_bias", "selected", "num_selected")
"""Outputs that backward reads."""


def forward(call: Call, tensors: Tensors) -> Outputs:
    """Compute the loss, the statistics, and the gradients or row state that backward needs."""
    selected = select_rows(call, tensors)
    count = selected.count
    outputs = empty_outputs(call, tensors)
    outputs = outputs._replace(d_student=pages.recycled(outputs.d_student), d_weight=pages.recycled(outputs.d_weight))
    outputs.num_valid.fill_(count)
    outputs.num_selected.fill_(count)
    if selected.index is not None:
        outputs.d_student.zero_()
    if outputs.selected.numel():
        outputs.selected.zero_()
        if selected.index is not None:
            outputs.selected[:count] = selected.index
    dtype, device = call.compute_dtype, tensors.student.device
    num_ids = tensors.ids_per_row
    labels = selected.take(tensors.get("labels"), torch.int64, num_ids) if call.needs_ce or call.needs_ids else None
    arrays = Arrays(
        stages=FORWARD,
        state=torch.zeros(_state_rows(call), count, dtype=dtype, device=device),  # the backend writes only the rows it needs
        weight=selected.take(tensors.get("token_weights"), dtype),
        labels=labels,
        loss=torch.empty((count,) if num_ids is None else (count, num_ids), dtype=dtype, device=device),
        stats=torch.empty(len(STATS), count, dtype=torch.float32, device=device) if call.return_stats else None,
    )
    # With one upstream gradient per token, the head's gradient is not a multiple of one number.
    gradients = Gradients(
        outputs.d_student if call.wants_input and (call.student.is_head or not call.recomputes) else None,
        outputs.d_weight if call.wants_weight and not call.per_token else None,
        outputs.d_bias if call.wants_bias and not call.per_token else None,
    )
    _sweep(call, tensors, selected, arrays, gradients)
    _store(call, arrays, selected, outputs)
    return outputs


def _store(call: Call, arrays: Arrays, selected: Selected, outputs: Outputs) -> None:
    """Write the results of the valid rows into outputs with the leading shape."""
    state, loss = arrays.state, arrays.loss
    assert loss is not None
    if outputs.state.dim() == 2:
        outputs.state[: len(state), : selected.count] = state
        if loss.dim() == 2:
            outputs.state[len(state) :, : selected.count] = loss.t()
    if call.per_token:
        selected.scatter(loss, outputs.loss)
    else:
        outputs.loss.copy_(loss.sum())
    if arrays.stats is not None:
        for values, row in zip(arrays.stats, outputs.stats, strict=True):
            selected.scatter(values, row)


def backward(call: Call, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients by the student's hidden states or logits, weight and bias. Those that are not needed are empty.

    ``tensors`` also holds ``upstream`` and, as ``saved.*``, the ``SAVED`` results of forward.
    """
    if tensors["saved.state"].dim() != 2:  # no row state: forward computed the gradients, and the teacher was not saved
        return scale(tensors)
    index, count = tensors["saved.selected"], int(tensors["saved.num_selected"])
    selected = Selected(index[:count] if count < len(index) else None, count)
    if not call.student.is_head:
        return recompute(call, tensors, selected)
    # Forward saved the hidden gradient of each row.
    by_hidden = scale(tensors)[0] if tensors.ids_per_row is None else one_side.from_ids(call, tensors, selected)
    if not (call.wants_weight or call.wants_bias):
        return by_hidden, torch.empty_like(tensors["saved.d_weight"]), torch.empty_like(tensors["saved.d_bias"])
    _, by_weight, by_bias = recompute(call, tensors, selected)
    return by_hidden, by_weight, by_bias


def recompute(call: Call, tensors: Tensors, selected: Selected) -> tuple[Tensor, Tensor, Tensor]:
    """Recompute gradients from the rows, in final dtypes and scale: (logits, weight, bias). Those that are not needed are empty."""
    student, dtype, num_ids = tensors.student, call.compute_dtype, tensors.ids_per_row
    factor = tensors["upstream"].to(dtype)
    if not call.per_token:
        factor = factor.expand(tensors.leading)
    token_weights = tensors.get("token_weights")
    if token_weights is not None:
        factor = factor * token_weights
    weight, bias = tensors.get("student.weight"), tensors.get("student.bias")
    d_weight = pages.recycled(_weight_accumulator(call, tensors, call.wants_weight))
    d_bias = _accumulator(bias, call.wants_bias, call, student)
    d_student = pages.recycled(student.new_empty(0 if call.student.is_head else student.shape))
    if selected.index is not None:
        d_student.zero_()
    stages, state = Stage.GRADIENT, tensors["saved.state"][: _state_rows(call), : selected.count]
    if call.divergence.slope_jumps:
        # The products may differ from forward's logits in the last bit, and slopes that jump would not match the saved sums: sum again. The
        # saved state is not modified.
        stages, state = Stage.SUMS | Stage.GRADIENT, state.clone()
    arrays = Arrays(
        stages=stages,
        state=state,
        weight=selected.take(factor, dtype, num_ids),
        labels=selected.take(tensors.get("labels"), torch.int64, num_ids) if call.needs_ce or call.needs_ids else None,
    )
    gradients = Gradients(
        None if call.student.is_head else d_student, d_weight if call.wants_weight else None, d_bias if call.wants_bias else None
    )
    _sweep(call, tensors, selected, arrays, gradients)
    return d_student, d_weight if weight is None else d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)


def _sweep(call: Call, tensors: Tensors, selected: Selected, arrays: Arrays, gradients: Gradients) -> None:
    """Loop over the chunks, in forward and in backward."""
    student = call.student.student_rows(call, tensors.of("student"), selected.index)
    sink = None
    if gradients.wanted:
        arrays.stages |= Stage.GRADIENT
        sink = student.sink(call, arrays, gradients)
    work: Work
    if call.is_distillation:
        work = call.teacher.work(call, tensors.of("teacher"), selected, student, arrays, sink)
    else:
        work = one_side.OneSided(call, student, arrays, sink)
    chunks = plan(call, selected.count, work.bytes_per_row, tensors.student.device)
    work.allocate(min(chunks.rows, selected.count))
    for start, stop in chunks:
        work.chunk(start, stop)
    if sink is not None:
        sink.finish()


def scale(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Return forward's gradients times the upstream gradient, in final dtypes. Not in place: backward may run more than once."""
    upstream = tensors["upstream"]
    return (
        _scaled(tensors["saved.d_student"], upstream.unsqueeze(-1) if upstream.dim() else upstream, tensors.student),
        _scaled(tensors["saved.d_weight"], upstream, tensors.get("student.weight")),
        _scaled(tensors["saved.d_bias"], upstream, tensors.get("student.bias")),
    )


def _scaled(gradient: Tensor, factor: Tensor, like: Tensor | None) -> Tensor:
    """Multiply in the wider dtype and write in the dtype of ``like``, without a float32 copy of the whole gradient."""
    dtype = gradient.dtype if like is None else like.dtype
    out = pages.recycled(torch.empty_like(gradient, dtype=dtype))
    if not gradient.numel():
        return out
    if not traits(gradient.device).host_memory or dtype == gradient.dtype or factor.dim():
        return torch.mul(gradient, factor, out=out)
    # Torch does not vectorise CPU loops that multiply and convert. In blocks that stay in cache, these are two vectorised loops.
    step = max(1, BLOCK_ELEMENTS * gradient.shape[0] // gradient.numel())
    for start in range(0, gradient.shape[0], step):
        out[start : start + step].copy_(gradient[start : start + step] * factor)
    return out


def empty_outputs(call: Call, tensors: Tensors) -> Outputs:
    """Return uninitialised outputs with the right shapes and dtypes. The custom op's fake implementation uses them as well."""
    student, leading, dtype = tensors.student, tensors.leading, call.compute_dtype
    new, is_head = student.new_empty, call.student.is_head
    num_rows = math.prod(leading)
    saves_input = call.wants_input and (is_head or not call.recomputes)
    num_ids = tensors.ids_per_row
    ids = () if num_ids is None else (num_ids,)
    saves_state = call.recomputes or (saves_input and num_ids is not None)
    # The gradient may fit in float16 only after backward multiplies it by the upstream gradient (1 / N, or a gradient scaler's).
    wide = num_ids is not None or (is_head and student.dtype == torch.float16)
    return Outputs(
        loss=new((*leading, *ids) if call.per_token else (), dtype=dtype),
        num_valid=new((), dtype=torch.int64),
        stats=new((len(STATS), *leading) if call.return_stats else (0,), dtype=torch.float32),
        state=new((_state_rows(call) + sum(ids), num_rows) if saves_state else (0,), dtype=dtype),
        d_student=new(student.shape if saves_input else (0,), dtype=dtype if wide else student.dtype),
        d_weight=_weight_accumulator(call, tensors, call.wants_weight and not call.per_token),
        d_bias=_accumulator(tensors.get("student.bias"), call.wants_bias and not call.per_token, call, student),
        selected=new(num_rows if saves_state and call.has_labels else 0, dtype=torch.int64),
        num_selected=new((), dtype=torch.int64, device="cpu"),
    )


def row_bytes(call: Call, tensors: Tensors) -> int:
    """Return the bytes of one row in the chunk buffers of both sides."""
    student = call.student.student_rows(call, tensors.of("student"), None)
    teacher = call.teacher.teacher_rows(call, tensors.of("teacher"), None) if call.is_distillation else None
    return student.bytes_per_row + (0 if teacher is None else teacher.bytes_per_row)


def _state_rows(call: Call) -> int:
    """Return the number of rows of the state: with a teacher ``STATE``, else the log-sum-exp in two parts and, if needed, the entropy."""
    return len(STATE) if call.is_distillation else 3 if call.quantity == "entropy" else 2


def _weight_accumulator(call: Call, tensors: Tensors, wanted: bool) -> Tensor:
    """Allocate the head's gradient: in the compute dtype, or in bfloat16 for a bfloat16 head if there is only one chunk.

    The one product then sums in float32 and rounds once, as in eager mode, and backward moves a third fewer bytes. Both of its operands
    must be bfloat16, which depends on the device (``dz_dtype``).
    """
    weight = tensors.get("student.weight")
    out = _accumulator(weight, wanted, call, tensors.student)
    if not wanted or weight is None or not weight.dtype == call.student.dtype == torch.bfloat16:
        return out
    single = plan(call, math.prod(tensors.leading), row_bytes(call, tensors), weight.device).count <= 1
    student = call.student.student_rows(call, tensors.of("student"), None)
    return weight.new_empty(weight.shape) if single and student.dz_dtype == weight.dtype else out


def _accumulator(parameter: Tensor | None, wanted: bool, call: Call, like: Tensor) -> Tensor:
    """Allocate an uninitialised accumulator with the parameter's shape, in the compute dtype; empty if not wanted."""
    return like.new_empty(parameter.shape if parameter is not None and wanted else (0,), dtype=call.compute_dtype)


__all__ = ["SAVED", "Outputs", "backward", "empty_outputs", "forward", "plan", "recompute", "row_bytes", "scale", "select_rows"]
