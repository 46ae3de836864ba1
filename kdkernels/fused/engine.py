"""One call, chunk by chunk: multiply the valid rows, hand them to a backend, accumulate gradients. Knows no autograd.

Where the gradients come from:

- student head, summed loss: hidden and head gradients in the forward pass, unscaled; backward scales them (``scale``).
- student head, per-token loss: the hidden gradient in the forward pass, row by row linear in its upstream gradient; a trainable
  head recomputes the chunks in backward, with the upstream gradients folded in (``recompute``).
- dense student, dense teacher: ``recompute``, from the saved row state. It takes the same number of exponentials and bytes as
  writing the gradient in forward and scaling it later, but no ``[N, V]`` is held in between.
- dense student, teacher head: the logit gradient in the forward pass, scaled in backward; the teacher is multiplied once only. In
  float16, which may not hold it before it is scaled, ``recompute`` again.

A quantity of one side alone (``Problem.quantity``) goes the same way, without a teacher. Log-probabilities of several ids a row
are not linear in one upstream number: of their hidden gradient ``sum_k g_k f_k W[id_k] - (sum_k g_k) m``, f the slope from the
head's products to the logits over T, the forward pass leaves ``m = (q f) @ W``, and backward adds the rest (``heads.from_ids``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import selection
from ..backends.rows import FORWARD, STATE, STATS, RowBatch, Stage
from . import gemm, heads, pages, sparse
from .problem import Problem
from .sources import (
    BLOCK_ELEMENTS,
    EnsembleRows,
    Inputs,
    Rows,
    SideRows,
    both_sides,
    check_and_select,
    has_own_product,
    plan,
    row_bytes,
    select,
)


@dataclass
class Outputs:
    """What a forward pass leaves. Gradients that nobody wants are empty."""

    loss: Tensor  # [] or, per token, [...], or [..., K]
    count: Tensor  # [] int64: valid tokens
    stats: Tensor  # [5, ...] float32, or empty
    state: Tensor  # [7, N]; of one side [2 + K, N] or (entropy) [3, N]; undefined beyond the valid rows. [0] if backward will not read it
    d_student: Tensor  # [..., Ds or V], unscaled; m, and what is for float16 hidden states, in the compute dtype
    d_weight: Tensor  # [>= V, Ds] float32 or float64, unscaled
    d_bias: Tensor  # [>= V]


def recomputes(problem: Problem, student_is_head: bool, teacher_is_head: bool) -> bool:
    """Whether backward goes over the rows again instead of scaling what forward left."""
    if student_is_head:
        return problem.per_token and (problem.wants_weight or problem.wants_bias)
    return problem.wants_input and (not teacher_is_head or problem.student_dtype == torch.float16)


def forward(problem: Problem, inputs: Inputs) -> Outputs:
    """Loss, statistics, and the gradients or the row state that backward will need."""
    index, count = check_and_select(problem, inputs)
    outputs = empty_outputs(problem, inputs)
    outputs.d_student, outputs.d_weight = pages.recycled(outputs.d_student), pages.recycled(outputs.d_weight)
    outputs.count.fill_(count)
    if index is not None:
        outputs.d_student.zero_()
    student, teacher = both_sides(problem, inputs, index)
    dtype, device = problem.compute_dtype, inputs.student.device
    recompute = recomputes(problem, student.is_head, _teacher_is_head(problem, inputs))
    many = inputs.ids_per_row
    loss = torch.empty((count,) if many is None else (count, many), dtype=dtype, device=device)
    stats = torch.empty(len(STATS), count, dtype=torch.float32, device=device) if problem.return_stats else None
    state = torch.empty(_state_rows(problem), count, dtype=dtype, device=device)
    _over_chunks(
        problem, inputs, student, teacher, index, count, state=state, stages=FORWARD, loss=loss, stats=stats,
        weight=select(inputs.token_weights, index, dtype),
        d_student=outputs.d_student if problem.wants_input and (student.is_head or not recompute) else None,
        # A head's gradient is not linear in one upstream number when there is one per token.
        d_weight=outputs.d_weight if problem.wants_weight and not problem.per_token else None,
        d_bias=outputs.d_bias if problem.wants_bias and not problem.per_token else None,
    )  # fmt: skip
    if outputs.state.dim() == 2:
        outputs.state[: len(state), :count] = state
        if many is not None:
            outputs.state[len(state) :, :count] = loss.t()
    if problem.per_token:
        _scatter(outputs.loss, loss, index)
    else:
        outputs.loss.copy_(loss.sum())
    if stats is not None:
        for row, values in zip(outputs.stats, stats, strict=True):
            _scatter(row, values, index)
    return outputs


def backward(problem: Problem, inputs: Inputs, saved: Outputs, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the student's tensors, (hidden or logits, weight, bias), empty if not wanted. Of ``saved`` only what is kept for it."""
    if saved.state.dim() != 2:  # forward left no row state: it left the gradients themselves (and the teacher has not been kept)
        return scale(problem, inputs, saved, upstream)
    if inputs.student_weight is None:
        return recompute(problem, inputs, saved.state, upstream)
    # The hidden gradient was saved row by row.
    by_hidden = (
        scale(problem, inputs, saved, upstream)[0]
        if inputs.ids_per_row is None
        else heads.from_ids(problem, inputs, saved.state, saved.d_student, upstream)
    )
    if not (problem.wants_weight or problem.wants_bias):
        return by_hidden, torch.empty_like(saved.d_weight), torch.empty_like(saved.d_bias)
    _, by_weight, by_bias = recompute(problem, inputs, saved.state, upstream)
    return by_hidden, by_weight, by_bias


def recompute(problem: Problem, inputs: Inputs, state: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that need the rows again, in their final dtypes and scale: (logits, weight, bias), empty if not wanted.

    Args:
        state: as forward left it.
        upstream: gradient by the loss, of its shape.
    """
    index, count = check_and_select(problem, inputs, check=False)
    student, teacher = both_sides(problem, inputs, index)
    stages, state = Stage.GRADIENT, state[: _state_rows(problem), :count]
    if problem.divergence.slope_jumps:
        # The products need not give forward's logits to the last bit, where a slope may jump: sum again. What was saved stays as it is.
        stages, state = Stage.SUMS | Stage.GRADIENT, state.clone()
    dtype = problem.compute_dtype
    weight = upstream.to(dtype)
    if not problem.per_token:
        weight = weight.expand(inputs.student.shape[:-1])
    if inputs.token_weights is not None:
        weight = weight * inputs.token_weights
    d_weight = pages.recycled(_weight_accumulator(problem, inputs, problem.wants_weight))
    d_bias = _accumulator(inputs.student_bias, problem.wants_bias, problem, inputs.student)
    d_student = pages.recycled(inputs.student.new_empty(0 if student.is_head else inputs.student.shape))
    if index is not None:
        d_student.zero_()
    _over_chunks(
        problem, inputs, student, teacher, index, count,
        state=state, stages=stages, loss=None, stats=None,
        weight=select(weight, index, dtype, inputs.ids_per_row),
        d_student=None if student.is_head else d_student,
        d_weight=d_weight if problem.wants_weight else None,
        d_bias=d_bias if problem.wants_bias else None,
    )  # fmt: skip
    if inputs.student_weight is not None:
        d_weight = d_weight.to(inputs.student_weight.dtype)
    if inputs.student_bias is not None:
        d_bias = d_bias.to(inputs.student_bias.dtype)
    return d_student, d_weight, d_bias


def scale(problem: Problem, inputs: Inputs, saved: Outputs, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients that forward left, times the upstream gradient, in their final dtypes; out of place, so that it can be done again."""
    per_row = upstream.unsqueeze(-1) if problem.per_token else upstream
    return (
        _scaled(saved.d_student, per_row, inputs.student),
        _scaled(saved.d_weight, upstream, inputs.student_weight),
        _scaled(saved.d_bias, upstream, inputs.student_bias),
    )


def _scaled(gradient: Tensor, factor: Tensor, like: Tensor | None) -> Tensor:
    """Multiplied in the wider dtype while it is written in that of ``like``: no float32 copy of the whole in between."""
    dtype = gradient.dtype if like is None else like.dtype
    out = pages.recycled(torch.empty_like(gradient, dtype=dtype))
    if not gradient.numel():
        return out
    if gradient.is_cuda or dtype == gradient.dtype or factor.dim():
        return torch.mul(gradient, factor, out=out)
    # On a CPU torch's loops that change the dtype on the way are not vectorised: block by block, in cache, it is two that are.
    step = max(1, BLOCK_ELEMENTS * gradient.shape[0] // gradient.numel())
    for start in range(0, gradient.shape[0], step):
        out[start : start + step].copy_(gradient[start : start + step] * factor)
    return out


def empty_outputs(problem: Problem, inputs: Inputs) -> Outputs:
    """Outputs of the right shapes and dtypes, undefined; also what the custom op tells the compiler."""
    student, weight, bias = inputs.student, inputs.student_weight, inputs.student_bias
    leading = student.shape[:-1]
    dtype = problem.compute_dtype
    is_head, teacher_is_head = weight is not None, _teacher_is_head(problem, inputs)
    again = recomputes(problem, is_head, teacher_is_head)
    new = student.new_empty
    rows = math.prod(leading)
    keeps_input = problem.wants_input and (is_head or not again)
    many = inputs.ids_per_row
    of_row = () if many is None else (many,)
    keeps_state = again or (keeps_input and many is not None)
    return Outputs(
        loss=new((*leading, *of_row) if problem.per_token else (), dtype=dtype),
        count=new((), dtype=torch.int64),
        stats=new((len(STATS), *leading) if problem.return_stats else (0,), dtype=torch.float32),
        state=new((_state_rows(problem) + sum(of_row), rows) if keeps_state else (0,), dtype=dtype),
        # In float16 only backward's upstream gradient may take it to where it fits, as 1 / N or a gradient scaler does.
        d_student=new(
            student.shape if keeps_input else (0,),
            dtype=dtype if many is not None or (is_head and student.dtype == torch.float16) else student.dtype,
        ),
        d_weight=_weight_accumulator(problem, inputs, problem.wants_weight and not problem.per_token),
        d_bias=_accumulator(bias, problem.wants_bias and not problem.per_token, problem, student),
    )


def _teacher_is_head(problem: Problem, inputs: Inputs) -> bool:
    """Whether it takes matrix products to have the teacher's logits."""
    return inputs.teacher_weight is not None or any(member.has_weight for member in problem.members)


def _state_rows(problem: Problem) -> int:
    return len(STATE) if problem.quantity == "distillation" else 3 if problem.quantity == "entropy" else 2


def _weight_accumulator(problem: Problem, inputs: Inputs, wanted: bool) -> Tensor:
    """Memory for the head's gradient: in the compute dtype, which sums the chunks; in bfloat16 where one product makes all of it.

    That product sums in float32 and rounds once, as eager's does, and backward then moves a third less. A CPU's GEMM does so only where
    its operands are bfloat16.
    """
    out, weight = _accumulator(inputs.student_weight, wanted, problem, inputs.student), inputs.student_weight
    if not wanted or weight is None or not weight.dtype == problem.student_dtype == torch.bfloat16:
        return out
    num_rows = math.prod(inputs.student.shape[:-1])
    single = plan(problem, num_rows, row_bytes(problem, inputs), weight.device).count <= 1
    narrow = weight.is_cuda or problem.storage(weight.dtype) == weight.dtype or has_own_product(problem, weight, weight.dtype)
    return weight.new_empty(weight.shape) if single and narrow else out


def _accumulator(parameter: Tensor | None, wanted: bool, problem: Problem, like: Tensor) -> Tensor:
    """Undefined, of the parameter's shape in the compute dtype; empty if not wanted."""
    return like.new_empty(parameter.shape if parameter is not None and wanted else (0,), dtype=problem.compute_dtype)


def _scatter(out: Tensor, values: Tensor, index: Tensor | None) -> None:
    """Writes the selected rows' values, ``[n]`` or ``[n, K]``, into the leading shape; 0 elsewhere."""
    flat = out.view(-1) if values.dim() == 1 else out.view(-1, values.shape[1])
    if index is None:
        flat.copy_(values)
    else:
        flat.zero_()
        flat.index_copy_(0, index, values)


def _over_chunks(
    problem: Problem,
    inputs: Inputs,
    student: SideRows,
    teacher: SideRows | EnsembleRows | None,
    index: Tensor | None,
    count: int,
    *,
    state: Tensor,
    stages: Stage,
    loss: Tensor | None,
    stats: Tensor | None,
    weight: Tensor | None,
    d_student: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """The loop over chunks of both passes. Gradients that are None are not computed."""
    wants_grad = any(g is not None for g in (d_student, d_weight, d_bias))
    if wants_grad:
        stages |= Stage.GRADIENT
    device = inputs.student.device
    sides: list[SideRows | EnsembleRows] = [student] if teacher is None else [student, teacher]
    chunks = plan(problem, count, sum(side.bytes_per_row for side in sides), device)
    for side, name in zip(sides, ("student logits", "teacher logits")):  # noqa: B905  (there may be no teacher)
        side.allocate(min(chunks.rows, count), name)
    backend = selection.load(problem.backend)
    sparse_targets = None
    if inputs.teacher_ids is not None and inputs.teacher is not None:
        sparse_targets = Rows(inputs.teacher, index), Rows(inputs.teacher_ids, index)
    labels = select(inputs.labels, index, torch.int64, inputs.ids_per_row) if problem.needs_ce or problem.needs_ids else None
    gradient = None if d_student is None else Rows(d_student, index)
    dz_scale, unit = 1.0, None
    if student.is_head and student.over_logits(0).dtype == torch.float16:
        dz_scale = problem.dz_scale
        weight, unit = _in_units(weight)
    restore: float | Tensor = 1.0 / dz_scale if unit is None else unit / dz_scale
    vocab = slice(0, problem.vocab)
    for accumulator in (d_weight, d_bias):
        if accumulator is not None:
            accumulator[0 if count == 0 else problem.vocab :].zero_()
    for start, stop in chunks:
        r = slice(start, stop)
        student_logits = student.logits(start, stop)
        dz = None
        if wants_grad and student.is_head:
            dz = student.over_logits(stop - start)
        elif wants_grad and gradient is not None:
            dz = gradient.take(start, stop) if gradient.sliceable else torch.empty_like(student_logits)
        loss_part, weight_part, labels_part = (None if t is None else t[r] for t in (loss, weight, labels))
        if sparse_targets is not None:
            known = sparse.SparseBatch(
                student_logits, student.bias,
                sparse_targets[0].take(start, stop).to(state.dtype), sparse_targets[1].take(start, stop).to(torch.int64),
                labels_part, weight_part, state[:, r], loss_part, None if stats is None else stats[:, r], dz, dz_scale,
            )  # fmt: skip
            sparse.rows(backend, problem, known, stages)
        elif teacher is None:
            heads.rows(
                backend, problem, student_logits, student.bias, stages,
                weight=weight_part, loss=loss_part, labels=labels_part, state=state[:, r], dz=dz, dz_scale=dz_scale,
            )  # fmt: skip
        else:
            batch = RowBatch(
                student=student_logits, teacher=teacher.logits(start, stop),
                student_bias=student.bias, teacher_bias=teacher.bias,
                labels=labels_part, weight=weight_part, state=state[:, r], loss=loss_part,
                stats=None if stats is None else stats[:, r],
                dz=dz, dz_scale=dz_scale,
            )  # fmt: skip
            backend.rows(problem, batch, stages)
        if dz is None:
            continue
        if student.weight is None:
            if gradient is not None and not gradient.sliceable:
                gradient.put(start, stop, dz)
            continue
        if gradient is not None:
            into = gradient.take(start, stop) if gradient.sliceable else None
            product = gemm.grad_hidden(dz, student.weight, restore, into)
            if product is not into:
                gradient.put(start, stop, product)
        if d_weight is not None:
            gemm.add_grad_weight(d_weight[vocab], dz, student.hidden(start, stop), first=start == 0)
        if d_bias is not None:
            total = dz.sum(0, dtype=d_bias.dtype)
            if start == 0:
                d_bias[vocab] = total
            else:
                d_bias[vocab] += total
    if unit is not None and loss is not None:
        loss.mul_(unit)
    if unit is not None or dz_scale != 1.0:
        for accumulator in (d_weight, d_bias):
            if accumulator is not None:
                accumulator.mul_(restore)


def _in_units(weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Row weights over a power of two that takes the largest to between 1/2 and 1, and that number, [] on their device.

    What has to fit into float16 is made with these; float32 numbers are then multiplied back. The host does not wait for it.
    """
    if weight is None or not weight.numel():
        return weight, None
    largest = weight.abs().amax()
    usable = torch.isfinite(largest) & (largest > 0)
    unit = torch.where(usable, torch.frexp(largest).exponent, 0).clamp(-100, 100).to(weight.dtype).exp2()
    return weight / unit, unit


__all__ = [
    "Inputs",
    "Outputs",
    "backward",
    "check_and_select",
    "empty_outputs",
    "forward",
    "plan",
    "recompute",
    "recomputes",
    "row_bytes",
    "scale",
]
