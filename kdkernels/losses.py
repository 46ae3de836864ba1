"""``distillation_loss``: its documentation and reduction. fused/checks.py checks the arguments, fused/engine.py runs the chunks."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from typing_extensions import Unpack

from . import divergences
from .backends import selection
from .backends.rows import STATS
from .backends.selection import traits
from .divergences import Divergence
from .fused import engine, ops
from .fused.checks import Options, device_of, prepare
from .sides import Side, Teacher

__all__ = ["DistillationLoss", "Plan", "TokenStats", "distillation_loss", "plan"]


@dataclass(frozen=True, eq=False)
class TokenStats:
    """Per token, detached, float32, of the leading shape; 0 for invalid tokens. At T = ``temperature`` except ``cross_entropy``.

    Attributes:
        divergence: D itself, without ``kd_weight``, T^2 or token weights, in nats.
        cross_entropy: of the labels at T = 1, in nats; NaN without labels.
        student_entropy: in nats.
        teacher_entropy: in nats.
        top1_agreement: 1.0 where both sides' most likely tokens are the same, else 0.0.
    """

    divergence: Tensor
    cross_entropy: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    top1_agreement: Tensor


@dataclass(frozen=True)
class Plan:
    """The plan of a call.

    Attributes:
        backend: its name.
        rows_per_chunk: valid rows in a chunk.
        num_chunks: number of chunks.
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


class LossOptions(TypedDict, total=False):
    """Every keyword of ``distillation_loss`` but ``return_stats``, for type checkers; what they mean is documented there."""

    divergence: Divergence | str
    temperature: float
    t_squared: bool
    labels: Tensor | None
    ignore_index: int
    kd_weight: float
    ce_weight: float
    token_weights: Tensor | None
    reduction: str
    num_items: int | Tensor | None
    memory_budget: int | None
    chunk_rows: int | None
    logits_dtype: torch.dtype | None
    backend: str


@overload
def distillation_loss(
    student: Side, teacher: Teacher, *, return_stats: Literal[False] = False, **options: Unpack[LossOptions]
) -> Tensor: ...
@overload
def distillation_loss(
    student: Side, teacher: Teacher, *, return_stats: Literal[True], **options: Unpack[LossOptions]
) -> tuple[Tensor, TokenStats]: ...
def distillation_loss(
    student: Side,
    teacher: Teacher,
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
            any hidden size and dtype. Or what was kept of one: ``TopK`` (forward KL; reverse KL and JSD where its ``tail`` defines them)
            or ``Sampled`` (forward KL, less the teacher's entropy, which draws do not tell). Or an ``Ensemble``. Detached.
        divergence: a name (see ``kdkernels.divergences.REGISTRY``) or an instance such as ``JSD(beta=0.3)``.
        temperature: T > 0, divides both sides' logits in the divergence. Below 2^-100 it is taken as 2^-100, which gives the limit.
        t_squared: multiply the divergence and its gradient by T^2, so that its weight against cross-entropy does not depend on T.
        labels: ``[...]`` integers; position i holds the target of position i (nothing is shifted here).
        ignore_index: tokens with this label are invalid: dropped before any matrix product, loss 0, gradient 0.
        kd_weight: weight of the divergence, >= 0.
        ce_weight: weight of the cross-entropy, >= 0; above 0 it needs ``labels``.
        token_weights: ``[...]`` floats >= 0, multiply each token's total; constants (no gradient).
        reduction: ``"mean"`` over ``num_items``, ``"sum"``, or ``"none"`` (the leading shape).
        num_items: denominator of ``"mean"``, int or 0-dim tensor; default: the number of valid tokens of this call. Pass the
            count of the whole batch when accumulating gradients or training on several ranks. A tensor on a GPU is not checked: 0
            gives infinity or NaN.
        memory_budget: bytes for the chunk buffers. Default: 1 GiB; on a GPU 1/32 of its memory, if that is more.
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
    options = Options(
        divergence, temperature, t_squared, ignore_index, kd_weight, ce_weight, reduction, memory_budget, chunk_rows, logits_dtype, backend,
        return_stats,
    )  # fmt: skip
    check_num_items(num_items)
    call, tensors = prepare(student, teacher, options, labels, token_weights)
    loss, count, *more = ops.run(call, tensors)
    if reduction == "mean":
        loss = loss / mean_denominator(num_items, count, loss.dtype)
    if not return_stats:
        return loss
    return loss, TokenStats(**dict(zip(STATS, more[0].unbind(0), strict=True)))


class DistillationLoss(nn.Module):
    """``distillation_loss`` as a module: keywords here, tensors in the call.

    >>> loss_fn = DistillationLoss(divergence="jsd", temperature=2.0)
    >>> loss = loss_fn(LMHead(h_s, w_s), LMHead(h_t, w_t), labels=labels)
    """

    def __init__(self, **options: Any) -> None:
        """Take every keyword of ``distillation_loss`` that is not a tensor, and check what can be checked without tensors."""
        super().__init__()
        unknown = set(options) - _MODULE_OPTIONS
        if unknown:
            raise TypeError(
                f"DistillationLoss got {', '.join(sorted(unknown))}; it takes {', '.join(sorted(_MODULE_OPTIONS))} "
                "(student, teacher, labels, token_weights and num_items belong in the call)"
            )
        if "divergence" in options:
            options["divergence"] = divergences.resolve(options["divergence"])
        checked = Options(**options)
        checked.check()
        selection.check_name(checked.backend)
        self.options = options

    def forward(
        self,
        student: Side,
        teacher: Teacher,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        num_items: int | Tensor | None = None,
    ) -> Any:
        """The loss, or with ``return_stats`` a pair: see ``distillation_loss``."""
        return distillation_loss(student, teacher, labels=labels, token_weights=token_weights, num_items=num_items, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


_MODULE_OPTIONS = {f.name for f in fields(Options)}
_TENSOR_OPTIONS = ("labels", "token_weights", "num_items")


def plan(student: Side, teacher: Teacher, *, return_stats: bool = False, **options: Unpack[LossOptions]) -> Plan:
    """Plan what ``distillation_loss`` would run with the same arguments, without running it.

    Tensors may be on the ``meta`` device, which plans as ``cpu``. With labels their valid tokens are counted (one synchronisation).

    Raises:
        TypeError, ValueError, BackendUnavailable: as ``distillation_loss`` would.
    """
    if unknown := set(options) - _MODULE_OPTIONS - {*_TENSOR_OPTIONS}:
        raise TypeError(f"plan got {', '.join(sorted(unknown))}; it takes {', '.join(sorted({*_MODULE_OPTIONS, *_TENSOR_OPTIONS}))}")
    arguments: dict[str, Any] = dict(options)
    labels, token_weights, num_items = (arguments.pop(name, None) for name in _TENSOR_OPTIONS)
    chosen = Options(**arguments, return_stats=return_stats)
    check_num_items(num_items)
    call, tensors = prepare(student, teacher, chosen, labels, token_weights)
    device = device_of(tensors.student.device)
    num_rows = tensors.num_rows if tensors.student.is_meta else engine.select_rows(call, tensors).count
    not_chosen = selection.not_chosen(call.backend, chosen.backend, device, call.storages, call.kernels)
    sizes = [dtype.itemsize for form in (call.student, call.teacher) for dtype in form.heads]
    gradient = call.student.dtype.itemsize if call.wants_grad and call.student.is_head else 0
    dense = num_rows * call.vocab * (sum(sizes) + gradient)
    if call.backend == "reference":
        return Plan("reference", num_rows, 1 if num_rows else 0, dense, dense, 0, not_chosen)
    bytes_per_row = engine.row_bytes(call, tensors)
    chunks = engine.plan(call, num_rows, bytes_per_row, device)
    held = min(chunks.rows, num_rows) * bytes_per_row
    return Plan(call.backend, chunks.rows, chunks.count, held, dense, max(0, dense - held), not_chosen)


def mean_denominator(num_items: float | Tensor | None, count: Tensor, dtype: torch.dtype) -> Tensor | float:
    """The denominator of the mean. It is 1 for a call without valid tokens and 0 items, which then gives 0 instead of NaN.

    Raises:
        ValueError: 0 items, but valid tokens. A 0 that the host cannot read without waiting gives infinity or NaN instead.
    """
    if num_items is None:
        return count.clamp(min=1)
    if isinstance(num_items, Tensor) and not traits(num_items.device).asynchronous and has_value(num_items):
        num_items = num_items.item()
    if not isinstance(num_items, Tensor):
        if num_items != 0:
            return num_items
        if has_value(count) and (valid := int(count)):
            raise ValueError(f"num_items is 0, but {valid} tokens are valid: pass the number of valid tokens of the whole batch")
    items = torch.as_tensor(num_items, dtype=dtype, device=count.device).detach().reshape(())
    return torch.where((items == 0) & (count == 0), torch.ones_like(items), items)


def check_num_items(num_items: Any) -> None:
    """A number, or a tensor of one, finite and >= 0. The value of a tensor is read only if that needs no wait."""
    if num_items is None:
        return
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor of shape {list(num_items.shape)}")
        if num_items.dtype == torch.bool or num_items.is_complex():
            raise TypeError(f"num_items must be a real number, got a tensor of {num_items.dtype}")
        if traits(num_items.device).asynchronous or not has_value(num_items):
            return
        num_items = num_items.item()
    is_number = isinstance(num_items, (numbers.Real, torch.SymFloat, torch.SymInt)) and not isinstance(num_items, bool)
    if not is_number:
        raise TypeError(f"num_items must be a number or a tensor of one, got {type(num_items).__name__}")
    if not 0 <= num_items < math.inf:
        raise ValueError(f"num_items must be finite and >= 0, got {num_items}")


def has_value(tensor: Tensor) -> bool:
    """Return whether the host can read the numbers of ``tensor``: not in torch.compile, of a fake tensor, or inside torch.func."""
    wrapped = not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tensor)
    return not (wrapped or torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta)
