"""The custom ops and their autograd: the only file that knows ``ctx``.

An op and its gradient are two ops, so that torch.compile sees neither the chunk loop nor data-dependent shapes. The gradient's own
derivative is not implemented, and says so (``_no_second_derivative``).
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import engine, heads, pages
from .engine import Outputs
from .problem import Problem, decode
from .sources import Inputs

# The ops look at labels on the host: CUDA graph capture by the compiler has to split around them.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Inside the ops every dtype is chosen by the problem: autocast must not change them again."""
    return torch.autocast(tensor.device.type, enabled=False)


@torch.library.custom_op("kdkernels::distill", mutates_args=(), tags=_TAGS)
def distill(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_ids: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    members: list[Tensor],
    numbers: Tensor,
    sizes: list[int],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss (summed, or per token) or other quantity, number of valid tokens, statistics, and what backward needs: see ``engine.Outputs``.

    Args:
        numbers: float64 on the host, ``Problem.numbers``.
        sizes: ``Problem.sizes``.
        spec: everything else that is no tensor, as ``Problem.encode`` writes it.
    """
    problem = decode(spec, numbers.tolist(), sizes)
    inputs = Inputs(
        student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, labels, token_weights, teacher_ids, members
    )
    with _no_autocast(student):
        return _astuple(engine.forward(problem, inputs))


@distill.register_fake
def _(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_ids: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    members: list[Tensor],
    numbers: Tensor,
    sizes: list[int],
    spec: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    problem = decode(spec, sizes=sizes)  # the chunks decide on a dtype
    inputs = Inputs(
        student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, labels, token_weights, teacher_ids, members
    )
    return _astuple(engine.empty_outputs(problem, inputs))


@torch.library.custom_op("kdkernels::distill_backward", mutates_args=(), tags=_TAGS)
def distill_backward(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_ids: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    members: list[Tensor],
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
    inputs = Inputs(
        student, student_weight, student_bias, teacher, teacher_weight, teacher_bias, labels, token_weights, teacher_ids, members
    )
    saved = Outputs(upstream, upstream, upstream, state, d_student, d_weight, d_bias)
    with _no_autocast(student):
        return engine.backward(problem, inputs, saved, upstream)


@distill_backward.register_fake
def _(
    student: Tensor,
    student_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_ids: Tensor | None,
    labels: Tensor | None,
    token_weights: Tensor | None,
    members: list[Tensor],
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
    *tensors, members, numbers, sizes, spec = inputs
    _, count, *kept = output
    ctx.mark_non_differentiable(count, *kept)
    ctx.set_materialize_grads(False)
    ctx.sizes, ctx.spec, ctx.num_members = sizes, spec, len(members)
    student, student_weight, student_bias, *others = tensors
    others += members
    if kept[1].dim() != 2:  # no row state, so backward only scales: the teachers and the labels need not be kept alive
        others = [None] * len(others)
    # The head is kept for the shape and dtype of its gradient; it is a parameter, alive anyway.
    ctx.save_for_backward(student, student_weight, student_bias, *others, *kept[1:], numbers)


def _backward(ctx: Any, upstream: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    none = (None,) * 6, [None] * ctx.num_members, (None,) * 3
    if upstream is None:
        return (None, None, None, *none[0], none[1], *none[2])
    problem = decode(ctx.spec)
    *saved, state, d_student, d_weight, d_bias, numbers = ctx.saved_tensors
    tensors, members = saved[:9], [m for m in saved[9:] if m is not None]
    grads = distill_backward(*tensors, members, state, d_student, d_weight, d_bias, upstream, numbers, ctx.sizes, ctx.spec)
    wanted = (problem.wants_input, problem.wants_weight, problem.wants_bias)
    return (*(g if w else None for g, w in zip(grads, wanted, strict=True)), *none[0], none[1], *none[2])


distill.register_autograd(_backward, setup_context=_setup_context)


_FUNCTIONS = {"distillation": "distillation_loss", "logprobs": "token_logprobs"}  # the others are called like their quantity


def _no_second_derivative(function: str) -> NoReturn:
    raise RuntimeError(
        f"kdkernels.{function} has no second derivative: take its gradient without create_graph=True, or use "
        'backend="reference", which is plain torch and can be differentiated any number of times (and holds all logits)'
    )


class _NoTangent(torch.autograd.Function):
    """Raises where forward-mode AD carries a tangent of its argument, at any level of torch.func: custom ops would drop it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, message: str) -> Tensor:
        return tensor.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[1]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise RuntimeError(ctx.message)


def refuse_tangents(message: str, *tensors: Tensor | None) -> None:
    """Raise ``RuntimeError(message)`` if forward-mode AD differentiates by one of the tensors."""
    if forward_ad._current_level < 0:  # no dual level is open: the usual case, at no cost
        return
    for tensor in tensors:
        if tensor is not None:
            _NoTangent.apply(tensor, message)  # type: ignore[no-untyped-call]


def _refuse_forward_mode(quantity: str, *tensors: Tensor | None) -> None:
    refuse_tangents(
        f"kdkernels.{_FUNCTIONS.get(quantity, quantity)} has no forward-mode derivative (jvp, jacfwd, hessian): use reverse mode "
        '(backward, grad, jacrev), or backend="reference", which is plain torch (and holds all logits)',
        *tensors,
    )


def _setup_distill_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    quantity = decode(inputs[-1]).quantity
    ctx.function = _FUNCTIONS.get(quantity, quantity)


distill_backward.register_autograd(lambda ctx, *upstream: _no_second_derivative(ctx.function), setup_context=_setup_distill_backward)


def distillation_rows(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss (summed, or per token), number of valid tokens (0-dim int64), statistics ``[5, ...]`` or None. Differentiable once."""
    i = inputs
    _refuse_forward_mode(problem.quantity, i.student, i.student_weight, i.student_bias)
    loss, count, stats, *_ = distill(
        i.student, i.student_weight, i.student_bias, i.teacher, i.teacher_weight, i.teacher_bias, i.teacher_ids, i.labels,
        i.token_weights, list(i.members), _on_host(*problem.numbers), problem.sizes, problem.encode(),
    )  # fmt: skip
    return loss, count, stats if problem.return_stats else None


def _on_host(*values: float) -> Tensor:
    """A tensor: numbers given as such would be compiled in, and annealing them would recompile every step."""
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * value for value in values])


# ---- ids: nothing to differentiate


@torch.library.custom_op("kdkernels::topk_logprobs", mutates_args=(), tags=_TAGS)
def topk_op(
    side: Tensor, weight: Tensor | None, bias: Tensor | None, numbers: Tensor, sizes: list[int], spec: str, k: int
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the k most likely tokens."""
    with _no_autocast(side):
        return heads.topk(decode(spec, numbers.tolist(), sizes), _one_side(side, weight, bias), k)


@topk_op.register_fake
def _(
    side: Tensor, weight: Tensor | None, bias: Tensor | None, numbers: Tensor, sizes: list[int], spec: str, k: int
) -> tuple[Tensor, Tensor]:
    shape = (*side.shape[:-1], k)
    return side.new_empty(shape, dtype=torch.int32), side.new_empty(shape, dtype=decode(spec).compute_dtype)


@torch.library.custom_op("kdkernels::sample", mutates_args=(), tags=_TAGS)
def sample_op(
    side: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor, numbers: Tensor, sizes: list[int], spec: str, num_samples: int
) -> Tensor:
    """Ids of draws; ``seed`` is [] int64 on the side's device."""
    with _no_autocast(side):
        return heads.sample(decode(spec, numbers.tolist(), sizes), _one_side(side, weight, bias), seed, num_samples)


@sample_op.register_fake
def _(
    side: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor, numbers: Tensor, sizes: list[int], spec: str, num_samples: int
) -> Tensor:
    return side.new_empty((*side.shape[:-1], num_samples), dtype=torch.int32)


def _one_side(side: Tensor, weight: Tensor | None, bias: Tensor | None) -> Inputs:
    return Inputs(side, weight, bias, None, None, None, None, None)


def topk(problem: Problem, inputs: Inputs, k: int) -> tuple[Tensor, Tensor]:
    """Ids ``[..., k]`` int32 and log-probabilities of the most likely tokens; no gradient."""
    ids, logprobs = topk_op(*_detached(inputs), _on_host(*problem.numbers), problem.sizes, problem.encode(), k)
    return ids, logprobs


def sample(problem: Problem, inputs: Inputs, seed: Tensor, num_samples: int) -> Tensor:
    """Ids ``[..., num_samples]`` int32 of draws; no gradient."""
    ids: Tensor = sample_op(*_detached(inputs), seed, _on_host(*problem.numbers), problem.sizes, problem.encode(), num_samples)
    return ids


def _detached(inputs: Inputs) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in (inputs.student, inputs.student_weight, inputs.student_bias)]


# ---- softmax of given logits


@torch.library.custom_op("kdkernels::softmax", mutates_args=(), tags=_TAGS)
def softmax_op(logits: Tensor, numbers: Tensor, logarithm: bool, memory_budget: int | None, chunk_rows: int | None, backend: str) -> Tensor:
    """``softmax(logits / T)`` or its logarithm, in the dtype of the logits; ``numbers`` is [1] float64 on the host: T."""
    out = pages.recycled(torch.empty(logits.shape, dtype=logits.dtype, device=logits.device))
    heads.softmax(logits, None, out, numbers.item(), logarithm, memory_budget, chunk_rows, backend)
    return out


@softmax_op.register_fake
def _(logits: Tensor, numbers: Tensor, logarithm: bool, memory_budget: int | None, chunk_rows: int | None, backend: str) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("kdkernels::softmax_backward", mutates_args=(), tags=_TAGS)
def softmax_backward(
    y: Tensor, dy: Tensor, numbers: Tensor, logarithm: bool, memory_budget: int | None, chunk_rows: int | None, backend: str
) -> Tensor:
    """The gradient by the logits."""
    out = pages.recycled(torch.empty(y.shape, dtype=y.dtype, device=y.device))
    heads.softmax(y, dy, out, numbers.item(), logarithm, memory_budget, chunk_rows, backend)
    return out


@softmax_backward.register_fake
def _(y: Tensor, dy: Tensor, numbers: Tensor, logarithm: bool, memory_budget: int | None, chunk_rows: int | None, backend: str) -> Tensor:
    return y.new_empty(y.shape)


def _softmax_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, numbers, *ctx.options = inputs
    ctx.save_for_backward(output, numbers)


def _softmax_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    output, numbers = ctx.saved_tensors
    return softmax_backward(output, upstream, numbers, *ctx.options), None, None, None, None, None


def _setup_softmax_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.function = "log_softmax" if inputs[3] else "softmax"


softmax_op.register_autograd(_softmax_backward, setup_context=_softmax_setup)
softmax_backward.register_autograd(lambda ctx, *upstream: _no_second_derivative(ctx.function), setup_context=_setup_softmax_backward)


@torch.library.custom_op("kdkernels::softmax_out", mutates_args=("out",), tags=_TAGS)
def softmax_out(
    logits: Tensor | None, out: Tensor, numbers: Tensor, logarithm: bool, memory_budget: int | None, chunk_rows: int | None, backend: str
) -> None:
    """The same into ``out``, which without logits holds them."""
    heads.softmax(out if logits is None else logits, None, out, numbers.item(), logarithm, memory_budget, chunk_rows, backend)


@softmax_out.register_fake
def _(
    logits: Tensor | None, out: Tensor, numbers: Tensor, logarithm: bool, memory_budget: int | None, chunk_rows: int | None, backend: str
) -> None:
    return None


def softmax(
    logits: Tensor,
    out: Tensor | None,
    temperature: float,
    logarithm: bool,
    memory_budget: int | None,
    chunk_rows: int | None,
    backend: str,
) -> Tensor:
    """``softmax(logits / T)`` or its logarithm; into ``out``, which may be the logits, without a gradient."""
    options = (_on_host(temperature), logarithm, memory_budget, chunk_rows, backend)
    if out is None:
        _refuse_forward_mode("log_softmax" if logarithm else "softmax", logits)
        result: Tensor = softmax_op(logits, *options)
        return result
    softmax_out(None if out is logits else logits.detach(), out, *options)
    return out
