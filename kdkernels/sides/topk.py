"""A teacher's top-k tokens, from ``topk_logprobs``, a cache or an API."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .. import reference
from ..divergences import Divergence, defined_for
from ..fused.call import SMALLEST_TEMPERATURE, Call, Tensors, flat
from ..fused.sparse import FLOOR, Slopes, SparseForm, Targets, coarsened, linear
from ..reference import row_top
from .side import Checked, TeacherKind, check_beside, check_ids, check_number, check_sparse_fit

Tail = Literal["bucket", "renorm", "zero"]
"""Treatment of the probability outside a ``TopK``: one extra outcome, renormalised away, or dropped."""

LARGEST_LOGPROB = 0.01
"""Largest accepted log-probability of a ``TopK`` that is not renormalised. It allows for the rounding of 0."""

_UNDEFINED = {
    "renorm": "the tokens outside the TopK have probability 0 under the teacher but not under the student, so it is infinite",
    "zero": "the probabilities of the TopK do not sum to 1, and only the forward KL is a sum of terms that each need one token",
    "bucket": "it has no term for all other tokens together",
}


def largest_mass(dtype: torch.dtype) -> float:
    """Return the largest accepted sum of probabilities that are not renormalised: 1 plus rounding to a few decimals or to ``dtype``."""
    return 1.0 + LARGEST_LOGPROB + 4 * torch.finfo(dtype).eps


@dataclass(frozen=True, eq=False)
class TopK(TeacherKind):
    """A teacher's top-k tokens at each position with their log-probabilities, from ``topk_logprobs``, a cache or an API.

    Args:
        ids: ``[..., K]`` integers; -1 is padding, and its log-probability is ignored.
        logprobs: ``[..., K]`` floats: log softmax(z / temperature) at ids.
        tail: treatment of the probability outside the ids: ``"bucket"`` makes it one extra outcome, ``"renorm"`` renormalises it
            away, ``"zero"`` drops it.
        temperature: temperature of the log-probabilities.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not match, or tail or temperature is invalid.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tail = "bucket"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_ids("TopK", self.ids)
        check_beside("TopK.logprobs", self.logprobs, self.ids)
        if not self.logprobs.is_floating_point():
            raise TypeError(f"TopK.logprobs must be floating point, got {self.logprobs.dtype}")
        if self.tail not in get_args(Tail):
            raise ValueError(f"TopK.tail must be one of {', '.join(map(repr, get_args(Tail)))}, got {self.tail!r}")
        check_number("TopK.temperature", self.temperature)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"TopK.temperature must be finite and > 0, got {self.temperature}")

    def check(self, student: Checked, divergence: Divergence, temperature: float) -> Checked:
        """Check that the divergence supports this tail, and convert the log-probabilities to the loss's temperature."""
        check_sparse_fit("TopK", self.ids, student)
        tail = str(self.tail)
        if tail not in divergence.tails:
            others = [other for other in get_args(Tail) if other in divergence.tails]
            raise ValueError(
                f"{divergence.name} is not defined for a TopK teacher with tail={tail!r}: {_UNDEFINED[tail]}. "
                f"Use {', '.join(defined_for(tail))}" + (f", or tail={others[0]!r}" if others else "")
            )
        ids, values = self.ids.detach(), self.logprobs.detach()
        if self.temperature != temperature:
            values = self._at(ids, values, temperature)
        return Checked(TopKForm(tail=tail), {"ids": ids, "values": values}, student.leading, student.device)

    def _at(self, ids: Tensor, values: Tensor, temperature: float) -> Tensor:
        """Return the log-probabilities at another temperature, up to a constant per row."""
        if self.tail != "renorm":
            raise ValueError(
                f"temperature={temperature}, but the teacher's log-probabilities were computed at {self.temperature}, and the probability "
                f"outside them is unknown at another temperature: compute them at {temperature} "
                f"(kd.topk_logprobs(..., temperature={temperature})), or use tail='renorm', which is exact at any temperature"
            )
        # Subtract the largest first: multiplied by a large 1 / T, rounding errors of the values themselves would be too large for exp.
        wide = (values if values.dtype == torch.float64 else values.float()).masked_fill(ids < 0, -math.inf)
        return (wide - row_top(wide)) * (self.temperature / max(temperature, SMALLEST_TEMPERATURE))


@flat
@dataclass(frozen=True)
class TopKForm(SparseForm):
    """Top-k tokens; ``values`` are log-probabilities at the loss's temperature."""

    tail: str = "bucket"
    kind = "TopK"

    @property
    def whole(self) -> bool:
        """Return whether the log-probabilities are used without renormalisation, so that they must be part of a distribution."""
        return self.tail != "renorm"

    def targets(self, ids: Tensor, values: Tensor) -> Targets:
        log_p = values.masked_fill(ids < 0, -math.inf)
        if self.tail == "renorm":
            total = torch.logsumexp(log_p, -1, keepdim=True)
            log_p = log_p - torch.where(total == -math.inf, torch.zeros_like(total), total)
        p = log_p.exp()
        rest = (1.0 - p.sum(-1)).clamp(min=FLOOR) if self.tail == "bucket" else torch.zeros_like(p[:, 0])
        return Targets(p, log_p, rest)

    def slopes(self, call: Call, log_q: Tensor, targets: Targets) -> Slopes:
        return linear(targets, log_q, entropy=True) if self.tail == "zero" else coarsened(call, targets, log_q)

    def bad_values(self, ids: Tensor, values: Tensor) -> Tensor:
        """Return a mask of values that are NaN, +inf or, without renormalisation, positive."""
        return ~(values <= LARGEST_LOGPROB) if self.whole else ~(values < math.inf)

    def bad_rows(self, ids: Tensor, values: Tensor) -> Tensor:
        """Return a mask of rows with a repeated token or, without renormalisation, a total probability above 1."""
        bad = _repeated(ids.sort(-1).values).any(-1)
        return bad | (_mass(ids, values) > largest_mass(values.dtype)) if self.whole else bad

    def complaint(self, ids: Tensor, values: Tensor) -> str:
        wrong = values[(ids >= 0) & self.bad_values(ids, values)]
        if wrong.numel():
            return (
                f"logprobs contain {wrong[0].item():g} ({wrong.numel()} such entries), but log-probabilities are at most 0: use .log() "
                "on probabilities, log_softmax over the vocabulary on logits, or tail='renorm'"
            )
        mass = _mass(ids, values)
        above = mass[mass > largest_mass(values.dtype)]
        if self.whole and above.numel():
            return (
                f"logprobs of a position add up to a probability of {above[0].item():.4g} "
                f"({above.numel()} such positions), but at most 1 is possible: compute them with one softmax over the vocabulary, before "
                "top-p or top-k renormalisation, or use tail='renorm'"
            )
        ordered = ids.sort(-1).values
        repeated = ordered[:, 1:][_repeated(ordered)][0]
        return f"ids contain token {int(repeated)} twice at one position: keep one entry with the total probability, set the other to -1"

    def reference(self, call: Call, tensors: Tensors, z: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        outcomes = reference.named_outcomes(call, tensors["ids"], tensors["values"], -math.inf, z, valid)
        log_p = torch.log_softmax(outcomes.values, -1).nan_to_num(-math.inf, neginf=-math.inf) if self.tail == "renorm" else outcomes.values
        rest = rest_q = torch.full_like(log_p[..., :1], -math.inf)  # log-probabilities of all other tokens together
        if self.tail == "bucket":
            rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=FLOOR).log()
        if self.tail != "zero":
            rest_q = reference.log_rest(outcomes, FLOOR)
        log_p, log_q = torch.cat([log_p, rest], -1), torch.cat([outcomes.log_q, rest_q], -1)
        value = call.divergence.reference_value(log_q, log_p)
        value = torch.where((log_p == -math.inf).all(-1), torch.zeros_like(value), value)  # a row without ids has no loss
        return value, reference.entropy_of(log_p), tensors["ids"].gather(-1, log_p[..., :-1].argmax(-1, keepdim=True))


def _mass(ids: Tensor, values: Tensor) -> Tensor:
    """Return the total probability ``[n]`` of the ids."""
    return values.masked_fill(ids < 0, -math.inf).to(torch.promote_types(values.dtype, torch.float32)).exp().sum(-1)


def _repeated(ordered: Tensor) -> Tensor:
    """Return a mask ``[n, K - 1]`` of repeated ids in sorted ids ``[n, K]``."""
    return (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
