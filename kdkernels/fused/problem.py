"""One call without its tensors: what every chunk and every backend has to know."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch

from .. import divergences
from ..backends.rows import Transform
from ..divergences import Divergence

DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

SMALLEST_TEMPERATURE = 2.0**-100
"""A smaller T is taken as this one: already here every logit but the largest has probability 0, and 1 / T fits into float32."""


_FORMAT = 3
"""Number in every spec: another one whenever the shapes or dtypes of what the ops return change. torch.compile keeps graphs on disk, by
what the graph says and not by what our ops have become; those of an older version of the package must not be found."""

Quantity = Literal["distillation", "cross_entropy", "logprobs", "logsumexp", "entropy"]
"""What is computed of each row: a loss between two sides, or of one side alone (the "student" then) one of the others."""


@dataclass(frozen=True)
class Member:
    """One teacher of an ensemble."""

    share: float
    transform: Transform
    dtype: torch.dtype
    has_weight: bool
    has_bias: bool


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is not a tensor. ``encode``, ``numbers`` and ``decode`` carry it through a custom op."""

    divergence: Divergence
    """Looked at in a distillation only, like ``teacher``, ``t_squared`` and the two weights."""
    vocab: int
    quantity: Quantity = "distillation"
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
    ensemble: str | None = None
    """Of several teachers: what is averaged, ``Ensemble.mode``."""
    members: tuple[Member, ...] = ()
    tail: str | None = None
    """Of a sparse teacher: what stands for the tokens that it does not name, ``TopK.tail`` or ``"sampled"``."""
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
    def inv_temperature(self) -> float:
        return 1.0 / self.temperature

    @property
    def value_scale(self) -> float:
        """Multiplies the divergence in the loss."""
        return self.kd_weight * (self.temperature**2 if self.t_squared else 1.0)

    @property
    def slope_scale(self) -> float:
        """Multiplies ``g - q * sum(g)`` in the gradient by the student's logits."""
        return self.value_scale * self.inv_temperature

    @property
    def needs_ce(self) -> bool:
        return self.has_labels and (self.ce_weight != 0 or self.return_stats)

    @property
    def needs_ids(self) -> bool:
        """Columns of one side are asked for: its labels' (cross-entropy) or its ids'."""
        return self.quantity in ("cross_entropy", "logprobs")

    def storage(self, side_dtype: torch.dtype) -> torch.dtype:
        """Dtype in which a head's chunk logits are held."""
        return side_dtype if self.logits_dtype == side_dtype else self.compute_dtype

    @property
    def dz_scale(self) -> float:
        """A power of two that float16 logit gradients are held multiplied by: small ones stay above its smallest step, and large weights
        or scales do not make the others overflow.

        It takes the gradient of a row of weight 1 to at most 256 where slopes are bounded (by a few T), else to about 1: the quadratic
        and the power families need the room.
        """
        if self.student_dtype != torch.float16:
            return 1.0
        unbounded, per_slope = False, self.inv_temperature
        if self.quantity == "distillation":
            unbounded = self.divergence.unbounded_slopes
            per_slope = abs(self.slope_scale) + (abs(self.ce_weight) if self.has_labels else 0.0)
        size = per_slope * abs(self.student.scale)
        exponent = math.ceil(math.log2(size)) if 0.0 < size < math.inf else 0
        return 2.0 ** ((0 if unbounded else 8) - max(-100, min(100, exponent)))

    @property
    def numbers(self) -> tuple[float, ...]:
        """Every float of the call: they may change from step to step and travel as a tensor, so that nothing recompiles."""
        return (
            self.temperature, self.kd_weight, self.ce_weight,
            self.student.scale, self.student.softcap or 0.0, self.teacher.scale, self.teacher.softcap or 0.0,
            *(x for m in self.members for x in (m.share, m.transform.scale, m.transform.softcap or 0.0)),
            *self.divergence.parameters,
        )  # fmt: skip

    @property
    def sizes(self) -> list[int]:
        """Every int of the call, for the same reason; 0 for None."""
        return [self.vocab, self.ignore_index, self.memory_budget or 0, self.chunk_rows or 0]

    def encode(self) -> str:
        """Everything but what ``numbers`` and ``sizes`` hold."""
        structure = (
            _FORMAT,
            self.divergence.name,
            self.divergence.flags,
            (self.student.softcap is not None, self.teacher.softcap is not None),
            (
                DTYPE_NAMES[self.student_dtype],
                DTYPE_NAMES[self.teacher_dtype],
                None if self.logits_dtype is None else DTYPE_NAMES[self.logits_dtype],
            ),
            tuple((m.transform.softcap is not None, DTYPE_NAMES[m.dtype], m.has_weight, m.has_bias) for m in self.members),
            {
                name: getattr(self, name)
                for name in (
                    "quantity", "ensemble", "tail", "t_squared", "per_token", "wants_input", "wants_weight", "wants_bias", "return_stats",
                    "has_labels", "backend",
                )
            },
        )  # fmt: skip
        return repr(structure)


@lru_cache(maxsize=256)
def _decode_structure(spec: str) -> Problem:
    _, name, flags, capped, dtypes, members, rest = ast.literal_eval(spec)
    student_dtype, teacher_dtype, logits_dtype = (None if d is None else DTYPES[d] for d in dtypes)
    return Problem(
        divergence=divergences.REGISTRY[name](**flags),
        vocab=0,
        student=Transform(softcap=1.0 if capped[0] else None),
        teacher=Transform(softcap=1.0 if capped[1] else None),
        student_dtype=student_dtype or torch.float32,
        teacher_dtype=teacher_dtype or torch.float32,
        logits_dtype=logits_dtype,
        members=tuple(Member(1.0, Transform(softcap=1.0 if cap else None), DTYPES[dtype], *has) for cap, dtype, *has in members),
        **rest,
    )


def decode(spec: str, numbers: Sequence[float] | None = None, sizes: Sequence[int] = ()) -> Problem:
    """The inverse of ``Problem.encode``, ``numbers`` and ``sizes``; without numbers, what can be said of shapes and dtypes."""
    problem = _decode_structure(spec)
    if sizes:
        vocab, ignore_index, memory_budget, chunk_rows = sizes
        problem = replace(
            problem, vocab=vocab, ignore_index=ignore_index, memory_budget=memory_budget or None, chunk_rows=chunk_rows or None
        )
    if numbers is None:
        return problem
    temperature, kd_weight, ce_weight, s_scale, s_cap, t_scale, t_cap, *others = numbers
    of_members, parameters = others[: 3 * len(problem.members)], others[3 * len(problem.members) :]
    members = (
        replace(m, share=share, transform=Transform(scale, None if m.transform.softcap is None else cap))
        for m, share, scale, cap in zip(problem.members, of_members[::3], of_members[1::3], of_members[2::3], strict=True)
    )
    return replace(
        problem,
        divergence=type(problem.divergence)(*parameters, **problem.divergence.flags),
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        student=Transform(s_scale, None if problem.student.softcap is None else s_cap),
        teacher=Transform(t_scale, None if problem.teacher.softcap is None else t_cap),
        members=tuple(members),
    )
