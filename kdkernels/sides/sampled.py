"""Tokens sampled from a teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..divergences import Divergence, ForwardKL, defined_for
from ..fused.call import Call, Tensors, flat
from ..fused.sparse import Slopes, SparseForm, Targets, linear
from .side import Checked, TeacherKind, check_beside, check_ids, check_sparse_fit


@dataclass(frozen=True, eq=False)
class Sampled(TeacherKind):
    """Tokens sampled at each position, as returned by ``sample``. An id may occur more than once.

    Args:
        ids: ``[..., S]`` integers; -1 is padding.
        counts: ``[..., S]``: number of times each id was drawn (or its weight), >= 0.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not match.
    """

    ids: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        check_ids("Sampled", self.ids)
        check_beside("Sampled.counts", self.counts, self.ids)
        if self.counts.dtype == torch.bool or self.counts.is_complex():
            raise TypeError(f"Sampled.counts must be numbers, got {self.counts.dtype}")

    def check(self, student: Checked, divergence: Divergence, temperature: float) -> Checked:
        """Check that the divergence supports this teacher."""
        check_sparse_fit("Sampled", self.ids, student)
        if "sampled" not in divergence.tails:
            raise ValueError(
                f"{divergence.name} is not defined for a Sampled teacher: only the forward KL is linear in the teacher's "
                f"probabilities, so that draws estimate it without bias. Use {', '.join(defined_for('sampled'))}"
            )
        return Checked(SampledForm(), {"ids": self.ids.detach(), "values": self.counts.detach()}, student.leading, student.device)


@flat
@dataclass(frozen=True)
class SampledForm(SparseForm):
    """Sampled tokens; ``values`` are counts."""

    kind = "Sampled"

    def distinct(self, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Merge repeated ids of a row by adding their counts. -1 fills the remaining columns."""
        ordered, order = ids.sort(dim=-1, stable=True)
        group = torch.zeros_like(ids)
        torch.cumsum(ordered[:, 1:] != ordered[:, :-1], -1, out=group[:, 1:])
        # index_put_(accumulate=True) adds in a fixed order, unlike scatter_add_ on a GPU.
        rows = torch.arange(len(ids), device=ids.device).unsqueeze(-1).expand_as(ids)
        total = torch.zeros_like(values).index_put_((rows, group), values.gather(-1, order), accumulate=True)
        return torch.full_like(ids, -1).scatter_(-1, group, ordered), total

    def targets(self, ids: Tensor, values: Tensor) -> Targets:
        counts = values.masked_fill(ids < 0, 0.0)
        total = counts.sum(-1, keepdim=True)
        p = counts / torch.where(total > 0, total, torch.ones_like(total))
        return Targets(p, p.log(), torch.zeros_like(p[:, 0]))

    def slopes(self, call: Call, log_q: Tensor, targets: Targets) -> Slopes:
        """Return the slopes of the cross-entropy. The entropy of a few draws is not an estimate of the teacher's entropy."""
        return linear(targets, log_q, entropy=False)

    def bad_values(self, ids: Tensor, values: Tensor) -> Tensor:
        """Return a mask of counts that are negative, infinite or NaN."""
        return ~((values >= 0) & (values < math.inf))

    def bad_rows(self, ids: Tensor, values: Tensor) -> Tensor:
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def complaint(self, ids: Tensor, values: Tensor) -> str:
        wrong = values[(ids >= 0) & self.bad_values(ids, values)]
        return f"counts contain {wrong[0].item()} ({wrong.numel()} such entries): they must be finite and not negative"

    def reference(self, call: Call, tensors: Tensors, z: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        outcomes = reference.named_outcomes(call, tensors["ids"], tensors["values"], 0.0, z, valid)
        p = outcomes.values / outcomes.values.sum(-1, keepdim=True).clamp(min=torch.finfo(outcomes.values.dtype).tiny)
        entropy = reference.entropy_of(p.log())
        value = ForwardKL().reference(outcomes.log_q, p.log()).sum(-1) + entropy
        return value, entropy, tensors["ids"].gather(-1, p.argmax(-1, keepdim=True))
