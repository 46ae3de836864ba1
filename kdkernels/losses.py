"""``distillation_loss``: documentation and reduction. fused/checks.py checks the arguments, fused/engine.py runs the chunks."""

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
    """Statistics per token: detached float32 tensors with the leading shape, 0 for invalid tokens, at T = ``temperature``.

    Attributes:
        divergence: D in nats, without ``kd_weight``, T^2 or token weights.
        cross_entropy: cross-entropy of the labels in nats, at T = 1; NaN without labels.
        student_entropy: entropy of the student's distribution in nats.
        teacher_entropy: entropy of the teacher's distribution in nats.
        top1_agreement: 1.0 where the most likely tokens of both sides are equal, else 0.0.
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
        backend: name of the backend.
        rows_per_chunk: valid rows in a chunk.
        num_chunks: number of chunks.
        buffer_bytes: size of the chunk buffers. No other memory is used for logits.
        dense_bytes: size of the dense ``[N, V]`` logits of the sides with a head, in the dtype of their matrix products, plus the
            student's logit gradient.
        saved_bytes: ``dense_bytes - buffer_bytes``, at least 0.
        not_chosen: for every other backend, the reason why it was not chosen.
    """

    backend: str
    rows_per_chunk: int
    num_chunks: int
    buffer_bytes: int
    dense_bytes: int
    saved_bytes: int
    not_chosen: dict[str, str]


class LossOptions(TypedDict, total=False):
    """Keywords of ``distillation_loss`` except ``return_stats``, for type checkers. ``distillation_loss`` documents them."""

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
    """Compute the distillation loss between a student and a teacher over the vocabulary without storing ``[N, V]`` logits.

    The loss of a valid token is ``kd_weight * T^2 * D(teacher, student; T) + ce_weight * CE(labels; T = 1)`` (Hinton et al. 2015,
    arXiv:1503.02531), times its token weight. The student's hidden states, head or logits get exact gradients if they require them. The
    teacher gets no gradient.

    Args:
        student: ``LMHead(hidden [..., Ds], weight [V, Ds], ...)`` or logits ``[..., V]``.
        teacher: ``LMHead(hidden [..., Dt], weight [V, Dt], ...)`` or logits ``[..., V]``; same leading shape and vocabulary,
            any hidden size and dtype. Or a ``TopK`` (forward KL; reverse KL and JSD if defined for its ``tail``), a ``Sampled``
            (forward KL minus the teacher's entropy, which draws do not determine), or an ``Ensemble``. Always detached.
        divergence: a name (see ``kdkernels.divergences.REGISTRY``) or an instance such as ``JSD(beta=0.3)``.
        temperature: T > 0, divides both sides' logits in the divergence. Values below 2^-100 are raised to 2^-100, which gives the limit.
        t_squared: multiply the divergence and its gradient by T^2, so that its weight relative to the cross-entropy does not depend on T.
        labels: ``[...]`` integers; position i holds the target of position i (labels are not shifted).
        ignore_index: tokens with this label are invalid: they are dropped before any matrix product, with loss 0 and gradient 0.
        kd_weight: weight of the divergence, >= 0.
        ce_weight: weight of the cross-entropy, >= 0; above 0 it needs ``labels``.
        token_weights: ``[...]`` floats >= 0 that multiply the loss of each token; constants (no gradient).
        reduction: ``"mean"`` over ``num_items``, ``"sum"``, or ``"none"`` (the leading shape).
        num_items: denominator of ``"mean"``, int or 0-dim tensor; default: the number of valid tokens of this call. Pass the
            number for the whole batch when you accumulate gradients or train on several ranks. A tensor on a GPU is not checked: 0
            gives infinity or NaN.
        memory_budget: bytes for the chunk buffers. Default: 1 GiB; on a GPU 1/32 of its memory, if that is more.
        chunk_rows: sets the rows per chunk directly; ``memory_budget`` is ignored.
        logits_dtype: dtype of the chunk's logits. None is float32 (float64 for float64 inputs), even for 16-bit operands.
            ``torch.bfloat16`` halves buffers and memory traffic for bfloat16 heads, but rounds the logits.
        backend: ``"auto"`` selects the best backend that can run (see ``plan``). A name selects that backend or raises.
        return_stats: also return a ``TokenStats``.

    Returns:
        The loss in float32 (float64 if a side is float64): 0-dim, or the leading shape with ``reduction="none"``. With
        ``return_stats``, a pair of the loss and the ``TokenStats``. Without valid tokens, the loss is 0.0 and its gradients are 0.

    Raises:
        TypeError, ValueError: an invalid argument; the message gives its name, its value and what to do.
        BackendUnavailable: the backend selected by ``backend`` cannot run here.
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
    """``distillation_loss`` as a module: options in the constructor, tensors in the call.

    >>> loss_fn = DistillationLoss(divergence="jsd", temperature=2.0)
    >>> loss = loss_fn(LMHead(h_s, w_s), LMHead(h_t, w_t), labels=labels)
    """

    def __init__(self, **options: Any) -> None:
        """Accept every keyword of ``distillation_loss`` that is not a tensor, and check the options as far as possible without tensors."""
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
        """Return the loss or, with ``return_stats``, a pair: see ``distillation_loss``."""
        return distillation_loss(student, teacher, labels=labels, token_weights=token_weights, num_items=num_items, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


_MODULE_OPTIONS = {f.name for f in fields(Options)}
_TENSOR_OPTIONS = ("labels", "token_weights", "num_items")


def plan(student: Side, teacher: Teacher, *, return_stats: bool = False, **options: Unpack[LossOptions]) -> Plan:
    """Return the backend, chunks and memory of a ``distillation_loss`` call with the same arguments, without running it.

    Tensors may be on the ``meta`` device, which is planned as ``cpu``. With labels, the valid tokens are counted (one synchronisation).

    Raises:
        TypeError, ValueError, BackendUnavailable: same as ``distillation_loss``.
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
    if call.is_dense:
        return Plan(call.backend, num_rows, 1 if num_rows else 0, dense, dense, 0, not_chosen)
    bytes_per_row = engine.row_bytes(call, tensors)
    chunks = engine.plan(call, num_rows, bytes_per_row, device)
    held = min(chunks.rows, num_rows) * bytes_per_row
    return Plan(call.backend, chunks.rows, chunks.count, held, dense, max(0, dense - held), not_chosen)


def mean_denominator(num_items: float | Tensor | None, count: Tensor, dtype: torch.dtype) -> Tensor | float:
    """Return the denominator of the mean. It is 1 for 0 items without valid tokens, so that the mean is 0 instead of NaN.

    Raises:
        ValueError: ``num_items`` is 0 but there are valid tokens. If reading it would synchronise, the mean is infinity or NaN instead.
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
    """Check that ``num_items`` is one finite number >= 0. A tensor's value is read only if that does not synchronise."""
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
    """Return whether the host can read the values of ``tensor``: False in torch.compile, for fake tensors, and inside torch.func."""
    wrapped = not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(tensor)
    return not (wrapped or torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or tensor.is_meta)
