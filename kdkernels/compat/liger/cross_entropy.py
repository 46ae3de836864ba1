"""``LigerFusedLinearCrossEntropyLoss``. Class weights, label smoothing, z-loss and token scaling run in chunked torch, the rest fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import LMHead, cross_entropy

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCrossEntropyFunction",
    "LigerFusedLinearCrossEntropyLoss",
    "liger_fused_linear_cross_entropy",
]

CHUNK_BYTES = 256 << 20


@dataclass
class CrossEntropyOutput:
    """The loss, and the optional outputs."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


@dataclass(frozen=True)
class _Options:
    """Options of a token's loss."""

    class_weights: Tensor | None
    ignore_index: int
    z_scale: float
    label_smoothing: float
    softcap: float | None
    scale_tokens: bool

    def values(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return cross-entropy and z-loss of each token, float32 ``[rows]``; 0 for ignored tokens."""
        logits = logits.float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        valid = target != self.ignore_index
        ce = F.cross_entropy(
            logits, target, self.class_weights, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing, reduction="none"
        )
        z_loss = torch.where(valid, self.z_scale * torch.logsumexp(logits, -1) ** 2, 0.0)
        if self.scale_tokens:
            of_target = logits.detach().softmax(-1).gather(1, target.clamp(min=0)[:, None]).squeeze(1)
            scale = torch.where(valid, of_target, 0.0)
            ce, z_loss = ce * scale, z_loss * scale
        return ce, z_loss


class _Chunked(torch.autograd.Function):
    """Cross-entropy and z-loss of each token, and the most likely token. Backward recomputes each chunk of logits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, target)
        ctx.options = options
        parts = []
        for piece in _pieces(x, weight):
            logits = F.linear(x[piece], weight, bias)
            parts.append((*options.values(logits, target[piece]), logits.argmax(-1)))
        ce, z_loss, predicted = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        ctx.mark_non_differentiable(predicted)
        return ce, z_loss, predicted

    @staticmethod
    def backward(ctx: Any, grad_ce: Tensor, grad_z: Tensor, _: Tensor) -> Any:
        x, weight, bias, target = ctx.saved_tensors
        sides = [side for side in (x, weight, bias) if side is not None]
        sums = [torch.zeros_like(side, dtype=torch.float32) for side in sides]
        for piece in _pieces(x, weight):
            with torch.enable_grad():
                leaves = [side.detach().requires_grad_() for side in (x[piece], *sides[1:])]
                values = ctx.options.values(F.linear(*leaves), target[piece])
            gradients = torch.autograd.grad(values, leaves, (grad_ce[piece], grad_z[piece]))
            sums[0][piece] = gradients[0]
            for total, gradient in zip(sums[1:], gradients[1:], strict=True):
                total += gradient
        cast = [total.to(side.dtype) for total, side in zip(sums, sides, strict=True)]
        return cast[0], cast[1], cast[2] if bias is not None else None, None, None


def _pieces(x: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return [slice(start, start + rows) for start in range(0, max(1, x.shape[0]), rows)]


def liger_fused_linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ce_weight: Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = 1,
) -> Tensor | CrossEntropyOutput:
    """Return the cross-entropy of a head's logits, and with a ``return_`` option a :class:`CrossEntropyOutput`.

    Args:
        input: ``[N, D]``.
        weight: ``[V, D]``.
        target: ``[N]``.
        ce_weight: ``[V]``, a weight for each class; the mean is then over the weights.
        lse_square_scale: adds this times the squared log-sum-exp.
        use_token_scaling: multiply each token's loss by its own probability, detached.
        accum_dtype, chunk_mem_const: ignored. Gradients are accumulated in float32, in chunks of a fixed size.
    """
    loss, z_loss, accuracy, predicted = LigerFusedLinearCrossEntropyFunction.apply(
        input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss,
        accum_dtype, use_token_scaling, return_token_accuracy, return_predicted_tokens,
    )  # fmt: skip
    if not (return_z_loss or return_token_accuracy or return_predicted_tokens):
        return loss
    return CrossEntropyOutput(loss, z_loss, accuracy, predicted)


class LigerFusedLinearCrossEntropyFunction:
    """``apply`` of Liger's autograd function: returns loss, z-loss, accuracy and predicted tokens, None if not requested."""

    @staticmethod
    def apply(
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        *kernels: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none; got {reduction!r}")
        fused = ce_weight is None and not (lse_square_scale or label_smoothing or return_z_loss or use_token_scaling)
        if fused and not (return_token_accuracy or return_predicted_tokens):
            return cross_entropy(LMHead(input, weight, bias, softcap=softcap), target, ignore_index, reduction=reduction), None, None, None
        options = _Options(ce_weight, ignore_index, lse_square_scale, label_smoothing, softcap, use_token_scaling)
        ce, z_loss, predicted = _Chunked.apply(input, weight, bias, target, options)  # type: ignore[no-untyped-call]
        valid = target != ignore_index
        count = valid.sum().clamp(min=1)
        correct = torch.where(valid, (predicted == target).float(), 0.0)
        if reduction != "none":
            correct = correct.sum() / count
            divisor = count if ce_weight is None else ce_weight[target[valid]].sum()
            ce, z_loss = ce.sum(), z_loss.sum()
            if reduction == "mean":
                ce, z_loss = ce / divisor, z_loss / count
        return (
            ce + z_loss,
            z_loss if return_z_loss else None,
            correct if return_token_accuracy else None,
            predicted.masked_fill(~valid, -1) if return_predicted_tokens else None,
        )


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """The cross-entropy of a head as a module: see :func:`liger_fused_linear_cross_entropy`."""

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.ce_weight, self.ignore_index, self.lse_square_scale = ce_weight, ignore_index, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = label_smoothing, reduction, softcap
        self.return_z_loss, self.accum_dtype, self.use_token_scaling = return_z_loss, accum_dtype, use_token_scaling
        self.return_token_accuracy, self.return_predicted_tokens = return_token_accuracy, return_predicted_tokens

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor | CrossEntropyOutput:
        return liger_fused_linear_cross_entropy(
            _input, lin_weight, target, bias, self.ce_weight, self.ignore_index, self.lse_square_scale, self.label_smoothing,
            self.reduction, self.softcap, self.return_z_loss, self.accum_dtype, self.use_token_scaling, self.return_token_accuracy,
            self.return_predicted_tokens,
        )  # fmt: skip
