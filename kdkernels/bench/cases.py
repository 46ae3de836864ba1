"""Cases to measure: plain data that builds its own tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import LMHead
from ..sides import Side

LOGIT_STD = 3.0
"""Standard deviation of the random logits. Their softmax is as peaked as a trained model's, so no kernel profits from a uniform one."""

IGNORED = -100

OPERATIONS = ("distillation", "cross_entropy")
"""Operations of a case. A new one needs its costs here (``Case.flop``, ``Case.floor_bytes``), and its true value and implementations in
variants.py (``TRUTHS``, ``BUILDERS``)."""


@dataclass(frozen=True)
class Case:
    """One operation, forward and backward.

    Attributes:
        n, v: tokens and vocabulary.
        ds, dt: hidden sizes of student and teacher; both 0 if the sides are logits.
        dtype: name of the torch dtype of hidden states and heads, or of the logits.
        divergence: a name for ``kdkernels.distillation_loss``.
        masked: share of the tokens that are ignored.
        frozen_head: only the hidden states are trained.
        gap: None for independent sides; else the teacher is the student with this many standard deviations of noise on its hidden states.
        operation: one of ``OPERATIONS``; cross-entropy has no teacher.
    """

    n: int
    v: int
    ds: int = 0
    dt: int = 0
    dtype: str = "float32"
    divergence: str = "forward_kl"
    temperature: float = 2.0
    masked: float = 0.0
    frozen_head: bool = False
    gap: float | None = None
    operation: str = "distillation"

    def __post_init__(self) -> None:
        if (self.ds == 0) != (self.dt == 0):
            raise ValueError(f"ds and dt are both 0 (logits are given) or both positive (heads are), got {self.ds} and {self.dt}")
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation {self.operation!r} is unknown; valid: {', '.join(OPERATIONS)}")
        if not 0 <= self.masked < 1:
            raise ValueError(f"masked is a share in [0, 1), got {self.masked}")
        if self.gap is not None and self.ds != self.dt:
            raise ValueError(f"with a gap the teacher is the student plus noise: ds and dt must be equal, got {self.ds} and {self.dt}")

    @staticmethod
    def parse_shape(text: str) -> tuple[int, int, int, int]:
        """Parse ``"N,V,Ds,Dt"``, or ``"N,V"`` for logits."""
        match = re.fullmatch(r"([1-9]\d*),([1-9]\d*)(?:,([1-9]\d*),([1-9]\d*))?", text)
        if match is None:
            raise ValueError(f"a shape is N,V,Ds,Dt (heads) or N,V (logits), such as 2048,32000,512,1024; got {text!r}")
        n, v, ds, dt = map(int, match.groups(default="0"))
        return n, v, ds, dt

    @property
    def has_heads(self) -> bool:
        return self.ds > 0

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def valid(self) -> int:
        """Number of tokens that are not ignored."""
        return self.n - int(self.n * self.masked)

    @property
    def flop(self) -> int:
        """FLOPs of the matrix products: student logits, hidden gradient, head gradient if it is trained, teacher logits."""
        student = (2 if self.frozen_head else 3) * self.ds
        return 2 * self.valid * self.v * (student + (self.dt if self.operation == "distillation" else 0))

    @property
    def floor_bytes(self) -> int:
        """Bytes that an operation on logits must move: read each side, write the gradient. 0 with heads."""
        passes = 3 if self.operation == "distillation" else 2
        return 0 if self.has_heads else passes * self.valid * self.v * self.torch_dtype.itemsize

    @property
    def input_bytes(self) -> int:
        elements = (self.n + self.v) * (self.ds + self.dt) if self.has_heads else 2 * self.n * self.v
        return elements * self.torch_dtype.itemsize

    @property
    def shape(self) -> str:
        return f"N={self.n:,} V={self.v:,} " + (f"Ds={self.ds:,} Dt={self.dt:,}" if self.has_heads else "(logits given)")

    def __str__(self) -> str:
        what = self.divergence if self.operation == "distillation" else self.operation
        rest = [f"{self.masked:.0%} masked"] * (self.masked > 0) + ["frozen head"] * self.frozen_head
        rest += [f"gap {self.gap:g}"] if self.gap is not None else []
        return f"{what}, {self.dtype}, {self.shape}, T={self.temperature:g}" + "".join(f", {x}" for x in rest)


@dataclass(frozen=True, eq=False)
class Inputs:
    """The sides of a case, ``[N, D]`` hidden states and ``[V, D]`` heads or ``[N, V]`` logits, and ``[N]`` labels."""

    student: Side
    teacher: Side
    labels: Tensor

    @property
    def trained(self) -> tuple[Tensor, ...]:
        return tuple(t for t in tensors(self.student) if t.requires_grad)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def clear_gradients(self) -> None:
        for tensor in self.trained:
            tensor.grad = None

    def double(self) -> Inputs:
        """Return the same inputs in float64, as new leaves."""

        def side(s: Side) -> Side:
            wide = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors(s)]
            return LMHead(wide[0], wide[1]) if isinstance(s, LMHead) else wide[0]

        return Inputs(side(self.student), side(self.teacher), self.labels)


def tensors(side: Side) -> tuple[Tensor, ...]:
    return (side.hidden, side.weight) if isinstance(side, LMHead) else (side,)


def build(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Return random inputs. They are filled in place, because a temporary would raise the peak memory before the measurement."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, std: float, trained: bool) -> Tensor:
        values = torch.empty(rows, columns, dtype=case.torch_dtype, device=device).normal_(0, std, generator=generator)
        return values.requires_grad_(trained)

    def side(width: int, trained: bool) -> Side:
        if not case.has_heads:
            return normal(case.n, case.v, LOGIT_STD, trained)
        weight = normal(case.v, width, LOGIT_STD * width**-0.5, trained and not case.frozen_head)
        return LMHead(normal(case.n, width, 1.0, trained), weight)

    student = side(case.ds, True)
    teacher = side(case.dt, False) if case.gap is None else _near(student, case.gap, generator)
    labels = torch.randint(case.v, (case.n,), device=device, generator=generator)
    if case.masked:
        labels[torch.randperm(case.n, device=device, generator=generator)[case.valid :]] = IGNORED
    return Inputs(student, teacher, labels)


def _near(student: Side, gap: float, generator: torch.Generator) -> Side:
    """Return a teacher close to the student: the same head, and hidden states (or logits) with noise of size ``gap``."""
    source = tensors(student)[0].detach()
    noise = torch.empty_like(source).normal_(0, gap, generator=generator)
    near = source.mul(math.sqrt(1 - min(gap, 1.0) ** 2)).add_(noise)
    return LMHead(near, student.weight.detach()) if isinstance(student, LMHead) else near
