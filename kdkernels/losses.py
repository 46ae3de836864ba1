"""``distillation_loss``: documentation, validation, reduction. The arithmetic is in engine.py and the backends."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from . import autograd, dispatch, divergences, engine, reference
from .divergences import Divergence
from .engine import Inputs
from .problem import DTYPE_NAMES, STATS, Problem, Transform
from .sides import LMHead, Side

__all__ = ["DistillationLoss", "Plan", "TokenStats", "distillation_loss", "plan"]

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Per token, detached, float32, of the leading shape; 0 for invalid tokens. At T = ``temperature`` except ``cross_entropy``.

    Attributes:
        divergence: D itself, without ``kd_weight``, T^2 or token weights, in nats.
        cross_entropy: of the labels at T = 1, in nats; NaN without labels.
        student_entropy, teacher_entropy: in nats.
        top1_agreement: 1.0 where both sides' most likely tokens are the same, else 0.0.
    """

    divergence: Tensor
    cross_entropy: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor


@dataclass(frozen=True)
class Plan:
    """What a call would run.

    Attributes:
        backend: its name.
        rows_per_chunk, num_chunks: of the valid rows.
        buffer_bytes: size of the chunk buffers, which is all that is held of the logits.
        dense_bytes: what the same call would hold as ``[N, V]`` logits of the sides that have a head, in the dtype of their
            matrix products, and the student's logit gradient.
        saved_bytes: ``dense_bytes - buffer_bytes``, at least 0.
        not_chosen: for every other backend the reason.
    """

    backend: str
    rows_per_chunk: int
    num_chunks: int
    buffer_bytes: int
    dense_bytes: int
    saved_bytes: int
    not_chosen: dict[str, str]


@overload
def distillation_loss(
    student: Side, teacher: Side, *, return_stats: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def distillation_loss(
    student: Side, teacher: Side, *, return_stats: Literal[True], **options: Any
) -> tuple[Tensor, TokenStats]: ...
def distillation_loss(
    student: Side,
    teacher: Side,
    *,
    divergence: Divergence | str = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Distillation loss between a student and a teacher over the vocabulary, without ever holding ``[N, V]`` logits.

    Per valid token ``kd_weight * T^2 * D(teacher, student; T) + ce_weight * CE(labels; T = 1)`` (Hinton et al. 2015,
    arXiv:1503.02531), times its weight. The gradient for the student's hidden states, head or logits, whichever require it, is
    exact; the teacher gets none.

    Args:
        student: ``LMHead(hidden [..., Ds], weight [V, Ds], ...)`` or logits ``[..., V]``.
        teacher: ``LMHead(hidden [..., Dt], weight [V, Dt], ...)`` or logits ``[..., V]``; same leading shape and vocabulary,
            any hidden size and dtype. Detached.
        divergence: a name (see ``kdkernels.divergences.REGISTRY``) or an instance such as ``JSD(beta=0.3)``.
        temperature: T > 0, divides both sides' logits in the divergence.
        t_squared: multiply the divergence and its gradient by T^2, so that its weight against cross-entropy does not depend on T.
        labels: ``[...]`` integers; position i holds the target of position i (nothing is shifted here).
        ignore_index: tokens with this label are invalid: dropped before any matrix product, loss 0, gradient 0.
        kd_weight, ce_weight: weights of the two terms, >= 0.
        token_weights: ``[...]`` floats >= 0, multiply each token's total; constants (no gradient).
        reduction: ``"mean"`` over ``num_items``, ``"sum"``, or ``"none"`` (the leading shape).
        num_items: denominator of ``"mean"``, int or 0-dim tensor; default: the number of valid tokens of this call. Pass the
            count of the whole batch when accumulating gradients or training on several ranks.
        memory_budget: bytes for the chunk buffers, default 1 GiB.
        chunk_rows: rows per chunk outright, instead of a budget.
        logits_dtype: storage of chunk logits. None is float32 (float64 for float64 inputs), from 16-bit operands too;
            ``torch.bfloat16`` halves buffers and traffic for bfloat16 heads, at the price of rounded logits.
        backend: ``"auto"`` takes the best that can run (see ``plan``); a name is honoured or raises.
        return_stats: also return a ``TokenStats``.

    Returns:
        The loss in float32 (float64 if a side is float64): 0-dim, or the leading shape with ``reduction="none"``; with
        ``return_stats`` a pair of it and the ``TokenStats``. Without a valid token it is 0.0, and backpropagates zeros.

    Raises:
        TypeError, ValueError: an argument that makes no sense; the message names it, what was given, and the way out.
        BackendUnavailable: ``backend`` names one that cannot run here.
    """
    problem, inputs = _prepare(
        student, teacher, divergence, temperature, t_squared, labels, ignore_index, kd_weight, ce_weight, token_weights,
        reduction, num_items, memory_budget, chunk_rows, logits_dtype, backend, return_stats,
    )  # fmt: skip
    if problem.backend == "reference":
        engine.check_and_select(problem, inputs)
        loss, count, stats = reference.distillation_rows(problem, student, teacher, inputs.labels, inputs.token_weights)
        if reduction != "none":
            loss = loss.sum()
    else:
        loss, count, stats = autograd.distillation_rows(problem, inputs)
    if reduction == "mean":
        loss = loss / _denominator(num_items, count)
    if stats is None:
        return loss
    return loss, TokenStats(**dict(zip(STATS, stats.unbind(0), strict=True)))


class DistillationLoss(nn.Module):
    """``distillation_loss`` as a module: keywords here, tensors in the call.

    >>> loss_fn = DistillationLoss(divergence="jsd", temperature=2.0)
    >>> loss = loss_fn(LMHead(h_s, w_s), LMHead(h_t, w_t), labels=labels)
    """

    def __init__(self, **options: Any) -> None:
        """Takes every keyword of ``distillation_loss`` that is not a tensor, and checks what can be checked without tensors."""
        super().__init__()
        unknown = set(options) - _MODULE_OPTIONS
        if unknown:
            raise TypeError(
                f"DistillationLoss got {', '.join(sorted(unknown))}; it takes {', '.join(sorted(_MODULE_OPTIONS))} "
                "(student, teacher, labels, token_weights and num_items belong in the call)"
            )
        if "divergence" in options:
            options["divergence"] = divergences.resolve(options["divergence"])
        _check_numbers(**{k: v for k, v in options.items() if k in ("temperature", "kd_weight", "ce_weight")})
        _check_choices(**{k: v for k, v in options.items() if k in ("reduction", "memory_budget", "chunk_rows")})
        self.options = options

    def forward(
        self,
        student: Side,
        teacher: Side,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Any:
        """The loss, or with ``return_stats`` a pair: see ``distillation_loss``."""
        return distillation_loss(
            student, teacher, labels=labels, token_weights=token_weights, num_items=num_items, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


_MODULE_OPTIONS = frozenset(
    "divergence temperature t_squared ignore_index kd_weight ce_weight reduction memory_budget chunk_rows logits_dtype backend "
    "return_stats".split()
)


def plan(
    student: Side,
    teacher: Side,
    *,
    divergence: Divergence | str = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    memory_budget: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Plan:
    """What ``distillation_loss`` would run with the same arguments, without running it.

    Tensors may be on the ``meta`` device, which plans as ``cpu``. With labels their valid tokens are counted (one synchronisation).

    Raises:
        The errors of ``distillation_loss``.
    """
    problem, inputs = _prepare(
        student, teacher, divergence, temperature, t_squared, labels, ignore_index, kd_weight, ce_weight, token_weights,
        reduction, num_items, memory_budget, chunk_rows, logits_dtype, backend, return_stats,
    )  # fmt: skip
    if inputs.student.device.type == "meta":
        num_rows = math.prod(inputs.student.shape[:-1])
    else:
        _, num_rows = engine.check_and_select(problem, inputs)
    is_head = (inputs.student_weight is not None, inputs.teacher_weight is not None)
    device_type = _device_type(inputs.student)
    not_chosen = dispatch.not_chosen(problem.backend, backend, device_type, _storages(problem, *is_head))
    sizes = [d.itemsize for d, head in zip((problem.student_dtype, problem.teacher_dtype), is_head, strict=True) if head]
    gradient = problem.student_dtype.itemsize if problem.wants_grad and is_head[0] else 0
    dense = num_rows * problem.vocab * (sum(sizes) + gradient)
    if problem.backend == "reference":
        return Plan("reference", num_rows, 1 if num_rows else 0, dense, dense, 0, not_chosen)
    bytes_per_row = engine.row_bytes(problem, inputs)
    chunks = engine.plan(problem, num_rows, bytes_per_row, device_type)
    held = min(chunks.rows, num_rows) * bytes_per_row
    return Plan(problem.backend, chunks.rows, chunks.count, held, dense, max(0, dense - held), not_chosen)


def _storages(problem: Problem, student_is_head: bool, teacher_is_head: bool) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the logits that a backend will read."""
    return (
        problem.storage(problem.student_dtype) if student_is_head else problem.student_dtype,
        problem.storage(problem.teacher_dtype) if teacher_is_head else problem.teacher_dtype,
    )


def _device_type(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "meta" else tensor.device.type


def _denominator(num_items: int | Tensor | None, count: Tensor) -> Tensor | int:
    """Of the mean; 1 instead of 0, so that a call without valid tokens gives 0 rather than NaN."""
    if num_items is None:
        return count.clamp(min=1)
    if isinstance(num_items, Tensor):
        items = num_items.detach().to(count.device)
        return torch.where(items == 0, torch.ones_like(items), items)
    return num_items or 1


def _prepare(
    student: Side,
    teacher: Side,
    divergence: Divergence | str,
    temperature: float,
    t_squared: bool,
    labels: Tensor | None,
    ignore_index: int,
    kd_weight: float,
    ce_weight: float,
    token_weights: Tensor | None,
    reduction: str,
    num_items: int | Tensor | None,
    memory_budget: int | None,
    chunk_rows: int | None,
    logits_dtype: torch.dtype | None,
    backend: str,
    return_stats: bool,
) -> tuple[Problem, Inputs]:
    """Checks every argument and turns it into what the engine takes."""
    resolved = divergences.resolve(divergence)
    _check_numbers(temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight)
    _check_choices(reduction=reduction, memory_budget=memory_budget, chunk_rows=chunk_rows)
    student_side, teacher_side = _check_side("student", student), _check_side("teacher", teacher)
    leading, device = student_side.leading, student_side.input.device
    if teacher_side.leading != leading:
        raise ValueError(
            f"teacher has leading shape {list(teacher_side.leading)}, student {list(leading)}: both sides need one row per token, "
            "so pass the same positions of the same batch"
        )
    if teacher_side.vocab != student_side.vocab:
        raise ValueError(
            f"the vocabularies differ: student {student_side.vocab}, teacher {teacher_side.vocab}. If one is padded, cut both to the real "
            "size with LMHead(..., vocab_size=...) or logits[..., :size]; different tokenizers cannot be compared column by column"
        )
    _check_per_token("labels", labels, leading, device)
    _check_per_token("token_weights", token_weights, leading, device)
    if teacher_side.input.device != device:
        raise ValueError(f"teacher is on {teacher_side.input.device}, student on {device}: move one with .to(device)")
    if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if token_weights is not None:
        if not token_weights.is_floating_point():
            raise TypeError(f"token_weights must be floating point, got {token_weights.dtype}: convert with .float()")
        if token_weights.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "token_weights require grad, but are constants here: detach them, or take reduction='none' and multiply by them"
            )
    if isinstance(ce_weight, (int, float)) and ce_weight != 0 and labels is None:
        raise ValueError(f"ce_weight={ce_weight} needs labels: pass labels=[...], or ce_weight=0")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor of shape {list(num_items.shape)}")
        num_items = num_items.reshape(())
    elif num_items is not None and num_items < 0:
        raise ValueError(f"num_items must not be negative, got {num_items}")
    _check_logits_dtype(logits_dtype, student_side, teacher_side)
    teacher_tensors = teacher_side.tensors
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in teacher_tensors):
        if not torch.compiler.is_compiling():
            warnings.warn(
                "the teacher requires grad: it is detached, no gradient reaches it (compute it under torch.no_grad() to save memory)",
                stacklevel=3,
            )
        teacher_tensors = [None if t is None else t.detach() for t in teacher_tensors]
    grad = torch.is_grad_enabled()
    wants = [grad and t is not None and t.requires_grad for t in student_side.tensors]
    problem = Problem(
        divergence=resolved,
        vocab=student_side.vocab,
        temperature=temperature,
        t_squared=bool(t_squared),
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ignore_index=int(ignore_index),
        student=student_side.transform,
        teacher=teacher_side.transform,
        student_dtype=student_side.dtype,
        teacher_dtype=teacher_side.dtype,
        logits_dtype=logits_dtype,
        per_token=reduction == "none",
        wants_input=wants[0],
        wants_weight=wants[1],
        wants_bias=wants[2],
        return_stats=bool(return_stats),
        has_labels=labels is not None,
        memory_budget=memory_budget,
        chunk_rows=chunk_rows,
    )
    chosen = dispatch.select(backend, _device_type(student_side.input), _storages(problem, student_side.is_head, teacher_side.is_head))
    inputs = Inputs(
        *student_side.tensors,
        *teacher_tensors,
        labels=None if labels is None else labels.detach(),
        token_weights=None if token_weights is None else token_weights.detach(),
    )  # type: ignore[misc]
    return replace(problem, backend=chosen), inputs


@dataclass(frozen=True)
class _Checked:
    """A side whose shapes and dtypes make sense."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    vocab: int
    dtype: torch.dtype
    transform: Transform

    @property
    def is_head(self) -> bool:
        return self.weight is not None

    @property
    def leading(self) -> torch.Size:
        return self.input.shape[:-1]

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.input, self.weight, self.bias]


def _check_side(name: str, side: Side) -> _Checked:
    if not isinstance(side, (LMHead, Tensor)):
        raise TypeError(f"{name} must be an LMHead or a tensor of logits [..., V], got {type(side).__name__}")
    x = side.hidden if isinstance(side, LMHead) else side
    what = f"{name}.hidden" if isinstance(side, LMHead) else name
    _check_floating(what, x)
    if x.dim() < 2:
        raise ValueError(f"{what} must have at least two dimensions [..., {'D' if what != name else 'V'}], got shape {list(x.shape)}: add one with [None]")
    if isinstance(side, Tensor):
        if x.shape[-1] == 0:
            raise ValueError(f"{name} has an empty vocabulary: shape {list(x.shape)}")
        return _Checked(x, None, None, x.shape[-1], x.dtype, Transform())
    weight, bias = side.weight, side.bias
    _check_floating(f"{name}.weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{name}.weight must be [V, D] with V > 0, got shape {list(weight.shape)}")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{name}.hidden has size {x.shape[-1]}, {name}.weight {list(weight.shape)} needs {weight.shape[1]}: the head is [V, D], "
            "as nn.Linear keeps it"
        )
    if bias is not None:
        _check_floating(f"{name}.bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name}.bias must be [{weight.shape[0]}] like the head's rows, got {list(bias.shape)}")
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}.{part} is on {tensor.device}, {name}.hidden on {x.device}: move one with .to(device)")
    vocab = weight.shape[0]
    if side.vocab_size is not None:
        size = side.vocab_size
        if isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or not 0 < size <= vocab:
            raise ValueError(f"{name}.vocab_size must be an int in [1, {vocab}] (the head's rows), got {size!r}")
        vocab = size
    if not math.isfinite(side.scale) or side.scale == 0:
        raise ValueError(f"{name}.scale must be finite and not 0, got {side.scale!r}")
    if side.softcap is not None and not (math.isfinite(side.softcap) and side.softcap > 0):
        raise ValueError(f"{name}.softcap must be finite and > 0, or None for no cap, got {side.softcap!r}")
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    elif weight.dtype != x.dtype:
        raise TypeError(
            f"{name}.hidden is {x.dtype}, {name}.weight {weight.dtype}: convert one with .to(dtype), or run under torch.autocast"
        )
    else:
        dtype = x.dtype
    softcap = None if side.softcap is None else float(side.softcap)
    return _Checked(x, weight, bias, vocab, dtype, Transform(float(side.scale), softcap))


def _check_floating(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPE_NAMES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}: convert with .float()")


def _check_per_token(name: str, tensor: Tensor | None, leading: torch.Size, device: torch.device) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != leading:
        raise ValueError(f"{name} must have the leading shape {list(leading)} of the student, got {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, student on {device}: move one with .to(device)")


def _check_numbers(temperature: float = 1.0, kd_weight: float = 1.0, ce_weight: float = 0.0) -> None:
    for name, value in (("temperature", temperature), ("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}" + (": pass .item()" if isinstance(value, Tensor) else ""))
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and > 0, got {temperature}; for hard targets use labels and ce_weight")
    for name, value in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {value}")


def _check_choices(reduction: str = "mean", memory_budget: int | None = None, chunk_rows: int | None = None) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    for name, value, unit in (("memory_budget", memory_budget, "bytes"), ("chunk_rows", chunk_rows, "rows")):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
            raise ValueError(f"{name} must be a positive int ({unit}) or None, got {value!r}")


def _check_logits_dtype(logits_dtype: torch.dtype | None, student: _Checked, teacher: _Checked) -> None:
    if logits_dtype is None:
        return
    heads = [side.dtype for side in (student, teacher) if side.is_head]
    wide = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    if logits_dtype not in (torch.float32, torch.bfloat16, torch.float64) or (
        logits_dtype != wide and heads and logits_dtype not in heads
    ):
        raise ValueError(
            f"logits_dtype={logits_dtype} fits neither head ({', '.join(map(str, heads)) or 'there is none'}): use None, {wide}, "
            "or torch.bfloat16 with bfloat16 heads (or under bfloat16 autocast)"
        )
