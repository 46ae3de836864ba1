"""``liger_kernel.chunked_loss``: the JSD of two heads with cross-entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ... import LMHead, distillation_loss
from ...divergences import of_beta

__all__ = ["LigerFusedLinearJSDFunction", "LigerFusedLinearJSDLoss", "liger_fused_linear_jsd"]


def liger_fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    true_labels: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Return ``weight_hard_loss * CE + weight_soft_loss * JSD``, each averaged over the tokens that are not ignored.

    Args:
        compiled: ignored.
        chunk_size: rows of logits held at a time.
        return_soft_hard_loss: also return the two terms, detached.

    Raises:
        ValueError: the vocabularies differ. Liger pads the smaller one with logit 0, which takes probability mass.
    """
    loss, stats = distillation_loss(
        LMHead(student_input, student_weight, student_bias),
        LMHead(teacher_input, teacher_weight, teacher_bias),
        divergence=of_beta(beta),
        temperature=temperature,
        t_squared=False,
        labels=true_labels,
        ignore_index=ignore_index,
        kd_weight=weight_soft_loss,
        ce_weight=weight_hard_loss,
        chunk_rows=chunk_size,
        return_stats=True,
    )
    if not return_soft_hard_loss:
        return loss
    count = (true_labels != ignore_index).sum().clamp(min=1)
    return loss, stats.divergence.sum() / count, stats.cross_entropy.sum() / count


class LigerFusedLinearJSDFunction:
    """``apply`` of Liger's autograd function."""

    @staticmethod
    def apply(*args: Any) -> Any:
        return liger_fused_linear_jsd(*args)


class LigerFusedLinearJSDLoss(nn.Module):
    """The JSD of two heads with cross-entropy as a module: see :func:`liger_fused_linear_jsd`."""

    def __init__(
        self,
        weight_hard_loss: float = 0.5,
        weight_soft_loss: float = 0.5,
        beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        compiled: bool = True,
        chunk_size: int = 1024,
        return_soft_hard_loss: bool = False,
    ) -> None:
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss, self.beta = weight_hard_loss, weight_soft_loss, beta
        self.ignore_index, self.temperature, self.compiled = ignore_index, temperature, compiled
        self.chunk_size, self.return_soft_hard_loss = chunk_size, return_soft_hard_loss

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        return liger_fused_linear_jsd(
            student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias,
            self.weight_hard_loss, self.weight_soft_loss, self.beta, self.ignore_index, self.temperature, self.compiled,
            self.chunk_size, self.return_soft_hard_loss,
        )  # fmt: skip
