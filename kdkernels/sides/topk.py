"""The most likely tokens of a teacher, from ``topk_logprobs``, a cache or an API."""

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
"""What a loss takes the probability outside a ``TopK`` for: one more outcome, nothing (the rest renormalised), or left out."""

LARGEST_LOGPROB = 0.01
"""The largest log-probability of a ``TopK`` that is taken as it stands: rounding makes no more of 0."""

_UNDEFINED = {
    "renorm": "the teacher gives nothing to the tokens that TopK leaves out, and the student does, so it is infinite",
    "zero": "what TopK names is less than a distribution, and only the forward KL has a part for each token alone",
    "bucket": "it is not among those with a part for all other tokens together",
}


def largest_mass(dtype: torch.dtype) -> float:
    """The largest sum of such probabilities: 1, rounded to a few decimals or to ``dtype``."""
    return 1.0 + LARGEST_LOGPROB + 4 * torch.finfo(dtype).eps


@dataclass(frozen=True, eq=False)
class TopK(TeacherKind):
    """The most likely tokens of each position with their log-probabilities, as ``topk_logprobs`` gives and caches keep them.

    Args:
        ids: ``[..., K]`` integers; -1 is padding, whatever its log-probability holds.
        logprobs: ``[..., K]`` floats: log softmax(z / temperature) at ids.
        tail: what a loss makes of the probability outside.
        temperature: that the log-probabilities were taken at.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit together.
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
        """Check that the loss is defined, and bring the log-probabilities to its temperature."""
        check_sparse_fit("TopK", self.ids, student)
        tail = str(self.tail)
        if tail not in divergence.tails:
            others = [other for other in get_args(Tail) if other in divergence.tails]
            raise ValueError(
                f"{divergence.name} is not defined against a teacher of TopK with tail={tail!r}: {_UNDEFINED[tail]}. "
                f"Take {', '.join(defined_for(tail))}" + (f", or tail={others[0]!r}" if others else "")
            )
        ids, values = self.ids.detach(), self.logprobs.detach()
        if self.temperature != temperature:
            values = self._at(ids, values, temperature)
        return Checked(TopKForm(tail=tail), {"ids": ids, "values": values}, student.leading, student.device)

    def _at(self, ids: Tensor, values: Tensor, temperature: float) -> Tensor:
        """The log-probabilities at another temperature, up to a constant of each row."""
        if self.tail != "renorm":
            raise ValueError(
                f"temperature={temperature}, but the teacher's log-probabilities were taken at {self.temperature}, and nobody knows its "
                f"tail at another: take them at {temperature} (kd.topk_logprobs(..., temperature={temperature})), or tail='renorm', which "
                "stays exact"
            )
        # Less the largest first: a product as large as 1 / T is rounded to more than exp can take.
        wide = (values if values.dtype == torch.float64 else values.float()).masked_fill(ids < 0, -math.inf)
        return (wide - row_top(wide)) * (self.temperature / max(temperature, SMALLEST_TEMPERATURE))


@flat
@dataclass(frozen=True)
class TopKForm(SparseForm):
    """The most likely tokens; ``values`` are log-probabilities at the loss's temperature."""

    tail: str = "bucket"
    kind = "TopK"

    @property
    def whole(self) -> bool:
        """Return whether the log-probabilities are those of a distribution as they stand: nothing normalises them."""
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
        """NaN, +inf, or positive where nothing normalises them."""
        return ~(values <= LARGEST_LOGPROB) if self.whole else ~(values < math.inf)

    def bad_rows(self, ids: Tensor, values: Tensor) -> Tensor:
        """Probabilities that add up to more than 1 where nothing normalises them, or a token that is there twice."""
        bad = _repeated(ids.sort(-1).values).any(-1)
        return bad | (_mass(ids, values) > largest_mass(values.dtype)) if self.whole else bad

    def complaint(self, ids: Tensor, values: Tensor) -> str:
        wrong = values[(ids >= 0) & self.bad_values(ids, values)]
        if wrong.numel():
            return (
                f"logprobs contain {wrong[0].item():g} ({wrong.numel()} such entries), and log-probabilities are at most 0: of "
                "probabilities take .log(), of logits log_softmax over the vocabulary, or tail='renorm'"
            )
        mass = _mass(ids, values)
        above = mass[mass > largest_mass(values.dtype)]
        if self.whole and above.numel():
            return (
                f"logprobs of a position add up to a probability of {above[0].item():.4g} "
                f"({above.numel()} such positions), and probabilities to at most 1: take them all from one softmax over the vocabulary, "
                "before any top-p or top-k renormalises them, or tail='renorm'"
            )
        ordered = ids.sort(-1).values
        repeated = ordered[:, 1:][_repeated(ordered)][0]
        return f"ids name token {int(repeated)} twice at one position: add the probabilities up and keep one, the other -1"

    def reference(self, call: Call, tensors: Tensors, z: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        outcomes = reference.named_outcomes(call, tensors["ids"], tensors["values"], -math.inf, z, valid)
        log_p = torch.log_softmax(outcomes.values, -1).nan_to_num(-math.inf, neginf=-math.inf) if self.tail == "renorm" else outcomes.values
        rest = rest_q = torch.full_like(log_p[..., :1], -math.inf)  # logarithms of what all other tokens have together
        if self.tail == "bucket":
            rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=FLOOR).log()
        if self.tail != "zero":
            rest_q = reference.log_rest(outcomes, FLOOR)
        log_p, log_q = torch.cat([log_p, rest], -1), torch.cat([outcomes.log_q, rest_q], -1)
        value = call.divergence.reference_value(log_q, log_p)
        value = torch.where((log_p == -math.inf).all(-1), torch.zeros_like(value), value)  # a row without an id says nothing
        return value, reference.entropy_of(log_p), tensors["ids"].gather(-1, log_p[..., :-1].argmax(-1, keepdim=True))


def _mass(ids: Tensor, values: Tensor) -> Tensor:
    """``[n]``: the probabilities at the ids, added up."""
    return values.masked_fill(ids < 0, -math.inf).to(torch.promote_types(values.dtype, torch.float32)).exp().sum(-1)


def _repeated(ordered: Tensor) -> Tensor:
    """``[n, K - 1]``: ids that are there twice, of ids in order ``[n, K]``."""
    return (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
