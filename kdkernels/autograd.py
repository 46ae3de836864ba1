"""The custom ops and their autograd: the only file that knows ``ctx``.

Two ops, so that torch.compile sees neither the chunk loop nor data-dependent shapes, and that a second derivative, which is
not implemented, raises instead of being silently wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import engine
from .engine import Inputs, Outputs
from .problem import Problem, decode

# The ops look at labels on the host: CUDA graph capture by the compiler has to split around them.
_TAGS = [tag for name in ("cudagraph_unsafe",) if (tag := getattr(torch.Tag, name, None)) is not None]


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Inside the ops every dtype is chosen by the problem: autocast must not change them again."""
    return torch.autocast(tensor.device.type, enabled=False)


@torch.library.custom_op("kdkernels::distill", mutates_args=(), tags=_TAGS)
def distill(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    numbers: Tensor,
    sizes: list[int],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (summed, or per token), number of valid tokens, statistics, and what backward needs: see ``engine.Outputs``.

    Args:
        numbers: float64 on the host, ``Problem.numbers``.
        sizes: ``Problem.sizes``.
        spec: everything else that is no tensor, as ``Problem.encode`` writes it.
    """
    problem = decode(spec, numbers.tolist(), sizes)
    inputs = Inputs(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, labels, token_weights)
    with _no_autocast(student):
        return _astuple(engine.forward(problem, inputs))


@distill.register_fake
def _(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    numbers: Tensor,
    sizes: list[int],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = decode(spec)
    inputs = Inputs(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, labels, token_weights)
    return _astuple(engine.empty_outputs(problem, inputs))


@torch.library.custom_op("kdkernels::distill_backward", mutates_args=(), tags=_TAGS)
def distill_backward(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    state: Tensor,
    d_student: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    upstream: Tensor,
    numbers: Tensor,
    sizes: list[int],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the student's tensors, empty where not wanted."""
    problem = decode(spec, numbers.tolist(), sizes)
    inputs = Inputs(student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, labels, token_weights)
    saved = Outputs(upstream, upstream, upstream, state, d_student, d_weight, d_bias)
    with _no_autocast(student):
        if state.dim() != 2:  # forward left no row state: it left the gradients themselves (and the teacher has not been kept)
            return engine.scale(problem, inputs, saved, upstream)
        by_input, by_weight, by_bias = engine.recompute(problem, inputs, state, upstream)
        if student_weight is not None:  # the hidden gradient was saved row by row
            by_input = engine.scale(problem, inputs, saved, upstream)[0]
        return by_input, by_weight, by_bias


@distill_backward.register_fake
def _(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    state: Tensor,
    d_student: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    upstream: Tensor,
    numbers: Tensor,
    sizes: list[int],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = decode(spec)

    def gradient(like: Tensor | None, wanted: bool) -> Tensor:
        return student.new_empty(0) if like is None else like.new_empty(like.shape if wanted else (0,))

    return (
        gradient(student, problem.wants_input),
        gradient(student_weight, problem.wants_weight),
        gradient(student_bias, problem.wants_bias),
    )


def _astuple(outputs: Outputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    o = outputs
    return o.loss, o.count, o.stats, o.state, o.d_student, o.d_weight, o.d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, numbers, sizes, spec = inputs
    _, count, *kept = output
    ctx.mark_non_differentiable(count, *kept)
    ctx.set_materialize_grads(False)
    ctx.sizes, ctx.spec = sizes, spec
    problem = decode(spec)
    recompute = engine.recomputes(problem, tensors[1] is not None, tensors[4] is not None)
    student, student_weight, student_bias, *others = tensors
    if not recompute:  # backward only scales: the teacher and the labels need not be kept alive
        others = [others[0][:0], None, None, None, None]
    # The head is kept for the shape and dtype of its gradient; it is a parameter, alive anyway.
    ctx.save_for_backward(student, student_weight, student_bias, *others, *kept[1:], numbers)


def _backward(ctx: Any, upstream: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    none = (None,) * 11
    if upstream is None:
        return none
    problem = decode(ctx.spec)
    *saved, numbers = ctx.saved_tensors
    grads = distill_backward(*saved, upstream, numbers, ctx.sizes, ctx.spec)
    wanted = (problem.wants_input, problem.wants_weight, problem.wants_bias)
    return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), *none[3:])


distill.register_autograd(_backward, setup_context=_setup_context)


def distillation_rows(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss (summed, or per token), number of valid tokens (0-dim int64), statistics ``[5, ...]`` or None. Differentiable once."""
    i = inputs
    one = torch.ones((), dtype=torch.float64, device="cpu")
    loss, count, stats, *_ = distill(
        i.student, i.student_weight, i.student_bias, i.teacher, i.teacher_weight, i.teacher_bias, i.labels, i.token_weights,
        # On the host, and a tensor: numbers given as such would be compiled in, and annealing them would recompile every step.
        torch.stack([one * x for x in problem.numbers]),
        problem.sizes,
        problem.encode(),
    )  # fmt: skip
    return loss, count, stats if problem.return_stats else None
