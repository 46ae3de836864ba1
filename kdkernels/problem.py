"""One call without its tensors: what every chunk and every backend has to know."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import divergences
from .divergences import Divergence

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

STATE = ("norm_s", "norm_t", "slope_sum", "lse_ce")
"""Rows of the saved state: the normalisers of x and u (log-sum-exps unless the divergence says otherwise), the sum of the
divergence's slopes, and the student's log-sum-exp at T = 1 where cross-entropy is asked for."""

STATS = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement")


@dataclass(frozen=True)
class Transform:
    """What lies between ``hidden @ weight.T + bias`` and the logits: ``softcap * tanh(scale * z / softcap)``; identity for logits."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is not a tensor. ``encode`` and ``decode`` carry it through a custom op's string argument."""

    divergence: Divergence
    vocab: int
    temperature: float = 1.0
    t_squared: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    ignore_index: int = -100
    student: Transform = field(default_factory=Transform)
    teacher: Transform = field(default_factory=Transform)
    student_dtype: torch.dtype = torch.float32
    """Dtype of the student's logits where they are given, of its matrix products where a head is."""
    teacher_dtype: torch.dtype = torch.float32
    logits_dtype: torch.dtype | None = None
    per_token: bool = False
    """``reduction="none"``: the loss is kept per token and upstream gradients differ between tokens."""
    wants_input: bool = False
    """The student's hidden states or logits require grad; the next two are for its head."""
    wants_weight: bool = False
    wants_bias: bool = False
    return_stats: bool = False
    has_labels: bool = False
    memory_budget: int | None = None
    chunk_rows: int | None = None
    backend: str = "torch"

    @property
    def wants_grad(self) -> bool:
        return self.wants_input or self.wants_weight or self.wants_bias

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of statistics, losses and accumulators: float64 if a side is, else float32."""
        return torch.float64 if torch.float64 in (self.student_dtype, self.teacher_dtype) else torch.float32

    @property
    def value_scale(self) -> float:
        """Multiplies the divergence in the loss."""
        return self.kd_weight * (self.temperature**2 if self.t_squared else 1.0)

    @property
    def slope_scale(self) -> float:
        """Multiplies ``g - q * sum(g)`` in the gradient by the student's logits."""
        return self.value_scale / self.temperature

    @property
    def needs_ce(self) -> bool:
        return self.has_labels and (self.ce_weight != 0 or self.return_stats)

    def storage(self, side_dtype: torch.dtype) -> torch.dtype:
        """Dtype in which a head's chunk logits are held."""
        return side_dtype if self.logits_dtype == side_dtype else self.compute_dtype

    @property
    def dz_scale(self) -> float:
        """A power of two that float16 logit gradients are held multiplied by, so that small ones stay above its smallest step.

        Only where the slopes are bounded (by a few T): the quadratic and power families would overflow instead.
        """
        unbounded = (divergences.LogitMSE, divergences.ABDivergence, divergences.AlphaDivergence)
        return 1.0 if self.student_dtype != torch.float16 or isinstance(self.divergence, unbounded) else 256.0

    def encode(self) -> str:
        """Without temperature, kd_weight and ce_weight: they may change every step and travel as numbers (see ``decode``)."""
        structure = (
            self.divergence.name,
            self.divergence.parameters,
            (self.student.scale, self.student.softcap, self.teacher.scale, self.teacher.softcap),
            (
                DTYPE_NAMES[self.student_dtype],
                DTYPE_NAMES[self.teacher_dtype],
                None if self.logits_dtype is None else DTYPE_NAMES[self.logits_dtype],
            ),
            {
                name: getattr(self, name)
                for name in (
                    "vocab", "t_squared", "ignore_index", "per_token", "wants_input", "wants_weight", "wants_bias",
                    "return_stats", "has_labels", "memory_budget", "chunk_rows", "backend",
                )
            },
        )  # fmt: skip
        return repr(structure)


@lru_cache(maxsize=256)
def _decode_structure(spec: str) -> Problem:
    name, parameters, transforms, dtypes, rest = ast.literal_eval(spec)
    cls = divergences.REGISTRY[name]
    s_scale, s_cap, t_scale, t_cap = transforms
    student_dtype, teacher_dtype, logits_dtype = (None if d is None else DTYPES[d] for d in dtypes)
    return Problem(
        # Parameters travel as floats; a flag is one of 0.0 and 1.0.
        divergence=cls(**{f.name: bool(v) if f.type == "bool" else v for f, v in zip(fields(cls), parameters, strict=True)}),
        student=Transform(s_scale, s_cap),
        teacher=Transform(t_scale, t_cap),
        student_dtype=student_dtype or torch.float32,
        teacher_dtype=teacher_dtype or torch.float32,
        logits_dtype=logits_dtype,
        **rest,
    )


def decode(spec: str, temperature: float = 1.0, kd_weight: float = 1.0, ce_weight: float = 0.0) -> Problem:
    """The inverse of ``Problem.encode``; without the numbers, what can be said of shapes and dtypes."""
    return replace(_decode_structure(spec), temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight)


@dataclass
class RowBatch:
    """The rows of one chunk, as a backend receives them. C rows, V columns, unit stride along V."""

    student: Tensor  # [C, V] logits before bias, scale and softcap
    teacher: Tensor  # [C, V]
    student_bias: Tensor | None  # [V]
    teacher_bias: Tensor | None  # [V]
    labels: Tensor | None  # [C] int64, all valid
    weight: Tensor | None  # [C] compute dtype: token weight, and upstream gradient in a backward pass
    state: Tensor  # [4, C] compute dtype, written with ``statistics``, else read
    loss: Tensor | None = None  # [C] compute dtype, out
    stats: Tensor | None = None  # [5, C] float32, out
    dz: Tensor | None = None  # [C, V], out: gradient by ``student``; may lie over it, each row starting where the row does
    dz_scale: float = 1.0  # multiplies dz
