"""Ensembles of teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import reference
from ..backends.selection import traits
from ..divergences import Divergence
from ..fused import chunking
from ..fused.call import Call, Tensors, flat
from ..fused.work import Form, TeacherRows, buffer
from .head import LMHead, Side, check_side
from .logits import DenseForm
from .side import Checked, TeacherKind, check_fit

EnsembleMode = Literal["probs", "logits"]

_CPU_BLOCK = 1 << 18  # elements of a block, of which a few temporaries must fit in a core's cache
_BLOCK = 1 << 21  # on other devices


@dataclass(frozen=True, eq=False)
class Ensemble(TeacherKind):
    """A weighted average of several teachers: of their probabilities or of their logits. The two differ, so ``mode`` has no default.

    Args:
        teachers: heads or logits with the same vocabulary and leading shape; hidden sizes and dtypes may differ.
        weights: one per teacher, > 0, normalised to a sum of 1; None for equal weights.
        mode: ``"probs"`` averages softmax(z / T) at the loss's temperature, ``"logits"`` averages z.

    Raises:
        TypeError, ValueError: the list of teachers is empty, or weights or mode are invalid.
    """

    teachers: Sequence[Side]
    weights: Sequence[float] | None = None
    mode: EnsembleMode = field(kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.teachers, (Tensor, LMHead)) or not isinstance(self.teachers, Sequence):
            raise TypeError(f"Ensemble.teachers must be a list of LMHeads or logits, got {type(self.teachers).__name__}")
        if not self.teachers:
            raise ValueError("Ensemble.teachers is empty: pass one or more teachers")
        if self.mode not in get_args(EnsembleMode):
            raise ValueError(f"Ensemble.mode must be one of {', '.join(map(repr, get_args(EnsembleMode)))}, got {self.mode!r}")
        if self.weights is None:
            return
        if not isinstance(self.weights, Sequence):
            raise TypeError(f"Ensemble.weights must be a list of numbers, got {type(self.weights).__name__}")
        if len(self.weights) != len(self.teachers):
            raise ValueError(f"Ensemble.weights must be one per teacher, {len(self.teachers)}, got {len(self.weights)}")
        for weight in self.weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"Ensemble.weights must be Python numbers, got {type(weight).__name__}")
            if not 0 < weight < math.inf:
                raise ValueError(f"Ensemble.weights must be finite and > 0, got {weight}: leave that teacher out instead")

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, normalised to a sum of 1."""
        weights = self.weights or [1.0] * len(self.teachers)
        return tuple(float(w) / math.fsum(weights) for w in weights)

    def check(self, student: Checked, divergence: Divergence, temperature: float) -> Checked:
        """Check each teacher alone, then against the student."""
        names = [f"teacher.teachers[{i}]" for i in range(len(self.teachers))]
        checked = [check_side(name, side) for name, side in zip(names, self.teachers, strict=True)]
        for name, side in zip(names, checked, strict=True):
            check_fit(name, side, student)
        forms = [side.form for side in checked]
        dtype = torch.float64 if any(form.dtype == torch.float64 for form in forms) else torch.float32
        members = tuple(Member(share, form) for share, form in zip(self.shares, forms, strict=True))
        tensors = {f"{i}.{name}": tensor for i, side in enumerate(checked) for name, tensor in side.tensors.items()}
        return Checked(EnsembleForm(dtype=dtype, mode=self.mode, members=members), tensors, student.leading, student.device, student.vocab)


@flat
@dataclass(frozen=True)
class Member:
    """One teacher of an ensemble."""

    share: float
    form: Form


@flat
@dataclass(frozen=True)
class EnsembleForm(DenseForm):
    """Several teachers and the averaging mode. The tensors of teacher i are ``i.input``, ``i.weight`` and ``i.bias``."""

    mode: str = "probs"
    members: tuple[Member, ...] = ()

    @property
    def is_head(self) -> bool:
        return any(member.form.is_head for member in self.members)

    @property
    def heads(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for member in self.members for dtype in member.form.heads)

    def storage(self, call: Call) -> torch.dtype:
        return call.compute_dtype

    def teacher_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> EnsembleRows:
        rows = []
        for i, member in enumerate(self.members):
            member_rows = member.form.teacher_rows(call, tensors.of(str(i)), index)
            assert member_rows is not None
            rows.append(member_rows)
        return EnsembleRows(self, call, rows, tensors["0.input"].device)

    def reference_logits(self, call: Call, tensors: Tensors, valid: Tensor | None) -> Tensor:
        """Return the average logits, or T times the logarithm of the average probabilities."""
        logits = [member.form.reference_logits(call, tensors.of(str(i)), valid) for i, member in enumerate(self.members)]
        shares = [member.share for member in self.members]
        if self.mode == "logits":
            return torch.stack([share * z for share, z in zip(shares, logits, strict=True)]).sum(0)
        log_p = [torch.log_softmax(reference.over_temperature(z, call), -1) + math.log(s) for s, z in zip(shares, logits, strict=True)]
        return call.temperature * torch.logsumexp(torch.stack(log_p), 0)


class EnsembleRows:
    """The average of several teachers, chunk by chunk. The teachers share one logits buffer; a second buffer accumulates the average."""

    bias = None

    def __init__(self, form: EnsembleForm, call: Call, rows: Sequence[TeacherRows], device: torch.device) -> None:
        self.form, self.call, self.members, self.device = form, call, rows, device
        self.buffer = torch.empty(0)

    @property
    def _width(self) -> int:
        return chunking.padded_vocab(self.call.vocab, self.call.compute_dtype.itemsize)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row: the average plus the largest teacher."""
        return self._width * self.call.compute_dtype.itemsize + max(rows.bytes_per_row for rows in self.members)

    def allocate(self, rows: int, name: str) -> None:
        """Allocate the average's buffer. ``logits`` allocates the teachers' buffers one after the other."""
        self.buffer = buffer(name, rows, self._width, self.call.compute_dtype, self.device)

    def logits(self, start: int, stop: int) -> Tensor:
        """Return ``[C, V]``: the average logits, or T times the logarithm of the average probabilities."""
        probs = self.form.mode == "probs"
        average = self.buffer[: stop - start, : self.call.vocab]
        average.fill_(-math.inf if probs else 0.0)
        for member, rows in zip(self.form.members, self.members, strict=True):
            rows.allocate(stop - start, "logits of an ensemble's member")
            self._average(average, member, rows.logits(start, stop), rows.bias)
            rows.release()
        return average.mul_(self.call.temperature) if probs else average

    def _average(self, average: Tensor, member: Member, logits: Tensor, bias: Tensor | None) -> None:
        """Add a teacher's share, block by block."""
        call = self.call
        step = max(1, (_CPU_BLOCK if traits(average.device).host_memory else _BLOCK) // call.vocab)
        for first in range(0, len(logits), step):
            z, out = logits[first : first + step].to(call.compute_dtype), average[first : first + step]
            z = reference.transform(z if bias is None else z + bias, member.form)
            if self.form.mode == "logits":
                out.add_(z, alpha=member.share)
            else:
                log_p = torch.log_softmax(reference.over_temperature(z, call), -1).add_(math.log(member.share))
                torch.logaddexp(out, log_p, out=out)

    def release(self) -> None:
        """Release the buffer."""
        self.buffer = torch.empty(0)
