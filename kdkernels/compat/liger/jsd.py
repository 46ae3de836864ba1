"""``liger_kernel.transformers``: the JSD of two heads, and the JSD and KL of log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ... import LMHead, distillation_loss
from ...divergences import of_beta

__all__ = [
    "LigerFusedLinearJSD",
    "LigerFusedLinearJSDFunction",
    "LigerJSD",
    "LigerJSDFunction",
    "LigerKLDIVLoss",
    "liger_fused_linear_jsd",
    "liger_jsd",
    "liger_kl_div",
]

CHUNK_BYTES = 64 << 20


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the mean JSD over the tokens whose label is not ``ignore_index``.

    Args:
        student_input, teacher_input: ``[N, D]``; the widths may differ.
        student_weight, teacher_weight: ``[V, D]``.
        shift_labels: ``[N]``, used only for ``ignore_index``.
        accum_dtype: ignored. The head's gradient is accumulated in float32.
    """
    return distillation_loss(
        LMHead(student_input, student_weight),
        LMHead(teacher_input, teacher_weight),
        divergence=of_beta(jsd_beta),
        temperature=temperature,
        t_squared=False,
        labels=shift_labels,
        ignore_index=ignore_index,
    )


class LigerFusedLinearJSDFunction:
    """``apply`` of Liger's autograd function. The last two arguments, which select a kernel, are ignored."""

    @staticmethod
    def apply(*args: Any) -> Tensor:
        return liger_fused_linear_jsd(*args[:9])


class LigerFusedLinearJSD(nn.Module):
    """The JSD of two heads as a module: see :func:`liger_fused_linear_jsd`."""

    def __init__(
        self, jsd_beta: float = 0.5, ignore_index: int = -100, temperature: float = 1.0, accum_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.jsd_beta, self.ignore_index, self.temperature, self.accum_dtype = jsd_beta, ignore_index, temperature, accum_dtype

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        return liger_fused_linear_jsd(
            student_input, student_weight, teacher_input, teacher_weight, shift_labels, self.jsd_beta, self.ignore_index, self.temperature
        )


class _SumOverRows(torch.autograd.Function):
    """The sum of ``function(rows of x, rows of y)``. The forward pass computes the gradient for x, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        rows = max(1, CHUNK_BYTES // (4 * x.shape[-1]))
        total, gradient = x.new_zeros((), dtype=torch.float32), torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for start in range(0, x.shape[0], rows):
            piece = slice(start, start + rows)
            with torch.enable_grad():
                part = x[piece].detach().float().requires_grad_(gradient is not None)
                value = function(part, y[piece].detach().float())
            total += value.detach()
            if gradient is not None:
                gradient[piece] = torch.autograd.grad(value, part)[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else (gradient * grad_output).to(gradient.dtype), None, None


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum of ``p (log p - log q)``; a column with p = 0 contributes 0."""
    return torch.where(log_p == -math.inf, 0.0, log_p.exp() * (log_p - log_q)).sum()


def liger_jsd(input: Tensor, target: Tensor, shift_labels: Tensor | None = None, beta: float = 0.5, ignore_index: int = -100) -> Tensor:
    """Return the mean JSD of log-probabilities, in their dtype. The gradient is for the log-probabilities: no softmax is implied.

    Args:
        input, target: ``[N, V]`` of the student and of the teacher. The teacher gets no gradient.
        shift_labels: ``[N]``, used only for ``ignore_index``.
    """

    def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
        if beta == 0:
            return _kl(log_p, log_q)
        if beta == 1:
            return _kl(log_q, log_p)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)

    count: int | Tensor = input.shape[0]
    dtype = input.dtype
    if shift_labels is not None:
        valid = shift_labels != ignore_index
        input, target, count = input[valid], target[valid], valid.sum().clamp(min=1)
    total: Tensor = _SumOverRows.apply(input, target, divergence)  # type: ignore[no-untyped-call]
    return (total / count).to(dtype)


class LigerJSDFunction:
    """``apply`` of Liger's autograd function. The last two arguments, which select a kernel, are ignored."""

    @staticmethod
    def apply(*args: Any) -> Tensor:
        return liger_jsd(*args[:5])


class LigerJSD(nn.Module):
    """The JSD of log-probabilities as a module: see :func:`liger_jsd`."""

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta, self.ignore_index = beta, ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        return liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)


def liger_kl_div(input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False, eps: float = 1e-10) -> Tensor:
    """Return ``F.kl_div`` of ``[N, V]`` in float32, with probabilities below ``eps`` replaced by it inside the logarithm.

    Args:
        reduction: ``"batchmean"``, ``"mean"``, ``"sum"``, or ``"none"`` (``[N, V]``).
    """

    def pointwise(log_q: Tensor, p: Tensor) -> Tensor:
        return p.exp() * (p - log_q) if log_target else p * (p.clamp(min=eps).log() - log_q)

    if reduction == "none":
        return pointwise(input.float(), target.detach().float())
    if reduction not in (divisors := {"sum": 1, "mean": input.numel(), "batchmean": input.shape[0]}):
        raise ValueError(f"reduction must be one of {', '.join(divisors)}, none; got {reduction!r}")
    total: Tensor = _SumOverRows.apply(input, target, lambda x, y: pointwise(x, y).sum())  # type: ignore[no-untyped-call]
    return total / divisors[reduction]


class LigerKLDIVLoss(nn.KLDivLoss):
    """``nn.KLDivLoss`` over ``[N, V]`` with Liger's ``eps``: see :func:`liger_kl_div`."""

    def __init__(self, eps: float = 1e-10, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        return liger_kl_div(y_pred, y_true, self.reduction, self.log_target, self.eps)
