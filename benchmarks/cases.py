"""What is measured: a case is plain data, and builds its own tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import LMHead

LOGIT_STD = 3.0
"""Of the random logits: peaked enough that no kernel gets away with a near-uniform softmax, as in a trained model."""


@dataclass(frozen=True)
class Case:
    """One loss, forward and backward, with both of the student's tensors trained.

    Attributes:
        n, v, ds, dt: tokens, vocabulary, hidden size of the student and of the teacher.
        dtype: of hidden states and heads, a torch dtype's name.
        divergence: a name that ``kdkernels.distillation_loss`` takes.
    """

    n: int
    v: int
    ds: int
    dt: int
    dtype: str = "float32"
    divergence: str = "forward_kl"
    temperature: float = 2.0

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def flop(self) -> int:
        """Of the four matrix products: student logits, teacher logits, hidden gradient, head gradient."""
        return 2 * self.n * self.v * (3 * self.ds + self.dt)

    @property
    def input_bytes(self) -> int:
        return (self.n + self.v) * (self.ds + self.dt) * self.torch_dtype.itemsize

    def __str__(self) -> str:
        return f"N={self.n} V={self.v} Ds={self.ds} Dt={self.dt} {self.dtype} {self.divergence} T={self.temperature:g}"


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a case: ``[N, D]`` hidden states and ``[V, D]`` heads; the student's require grad."""

    student: LMHead
    teacher: LMHead

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        return self.student.hidden, self.student.weight

    def clear_gradients(self) -> None:
        for tensor in self.trained:
            tensor.grad = None


def build(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random data. In place throughout: a temporary would raise the peak that memory is measured from."""
    generator = torch.Generator(device).manual_seed(seed)

    def side(width: int, trained: bool) -> LMHead:
        hidden = torch.empty(case.n, width, dtype=case.torch_dtype, device=device).normal_(generator=generator)
        weight = torch.empty(case.v, width, dtype=case.torch_dtype, device=device).normal_(0, LOGIT_STD * width**-0.5, generator=generator)
        return LMHead(hidden.requires_grad_(trained), weight.requires_grad_(trained))

    return Inputs(side(case.ds, True), side(case.dt, False))
