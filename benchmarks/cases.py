"""What is measured: a case is plain data, and builds its own tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels import LMHead
from kdkernels.sides import Side

LOGIT_STD = 3.0
"""Of the random logits: peaked enough that no kernel gets away with a near-uniform softmax, as in a trained model."""


@dataclass(frozen=True)
class Case:
    """One loss, forward and backward, with everything of the student's trained.

    Attributes:
        n, v: tokens and vocabulary.
        ds, dt: hidden size of the student and of the teacher; both 0 where the two sides are given as logits.
        dtype: of hidden states and heads, or of the logits: a torch dtype's name.
        divergence: a name that ``kdkernels.distillation_loss`` takes.
    """

    n: int
    v: int
    ds: int = 0
    dt: int = 0
    dtype: str = "float32"
    divergence: str = "forward_kl"
    temperature: float = 2.0

    def __post_init__(self) -> None:
        if (self.ds == 0) != (self.dt == 0):
            raise ValueError(f"ds and dt are both 0 (logits are given) or both positive (heads are), got {self.ds} and {self.dt}")

    @classmethod
    def parse(cls, text: str, temperature: float = 2.0) -> Case:
        """From ``"N,V,Ds,Dt:dtype:divergence"``, or ``"N,V:dtype:divergence"`` for logits."""
        match = re.fullmatch(r"([1-9]\d*),([1-9]\d*)(?:,([1-9]\d*),([1-9]\d*))?:(float32|float64|bfloat16|float16):(\w+)", text)
        if match is None:
            raise ValueError(f"a case is N,V,Ds,Dt:dtype:divergence (heads) or N,V:dtype:divergence (logits), got {text!r}")
        n, v, ds, dt, dtype, divergence = match.groups(default="0")
        return cls(int(n), int(v), int(ds), int(dt), dtype, divergence, temperature)

    @property
    def has_heads(self) -> bool:
        return self.ds > 0

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
    def floor_bytes(self) -> int:
        """That a loss of given logits has to move: read both sides, write the gradient. 0 with heads, where products are the floor."""
        return 0 if self.has_heads else 3 * self.n * self.v * self.torch_dtype.itemsize

    @property
    def input_bytes(self) -> int:
        elements = (self.n + self.v) * (self.ds + self.dt) if self.has_heads else 2 * self.n * self.v
        return elements * self.torch_dtype.itemsize

    def __str__(self) -> str:
        sizes = f"Ds={self.ds} Dt={self.dt}" if self.has_heads else "logits"
        return f"N={self.n} V={self.v} {sizes} {self.dtype} {self.divergence} T={self.temperature:g}"


@dataclass(frozen=True, eq=False)
class Inputs:
    """The sides of a case, ``[N, D]`` hidden states and ``[V, D]`` heads or ``[N, V]`` logits; the student's tensors require grad."""

    student: Side
    teacher: Side

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return tensors(self.student)

    @property
    def device(self) -> torch.device:
        return self.trained[0].device

    def clear_gradients(self) -> None:
        for tensor in self.trained:
            tensor.grad = None

    def double(self) -> Inputs:
        """The same numbers in float64, with gradients of their own."""

        def side(s: Side, trained: bool) -> Side:
            wide = [t.detach().double().requires_grad_(trained) for t in tensors(s)]
            return LMHead(wide[0], wide[1]) if isinstance(s, LMHead) else wide[0]

        return Inputs(side(self.student, True), side(self.teacher, False))


def tensors(side: Side) -> tuple[Tensor, ...]:
    return (side.hidden, side.weight) if isinstance(side, LMHead) else (side,)


def build(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random data. In place throughout: a temporary would raise the peak that memory is measured from."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float, trained: bool) -> Tensor:
        values = torch.empty(rows, columns, dtype=case.torch_dtype, device=device).normal_(0, std, generator=generator)
        return values.requires_grad_(trained)

    def side(width: int, trained: bool) -> Side:
        if not case.has_heads:
            return normal(case.n, case.v, LOGIT_STD, trained)
        return LMHead(normal(case.n, width, 1.0, trained), normal(case.v, width, LOGIT_STD * width**-0.5, trained))

    return Inputs(side(case.ds, True), side(case.dt, False))
