"""Losses against what has been kept of a teacher: its most likely tokens, or draws from it.

Such a loss depends on the student's log-probabilities at the K ids alone, ``D(log q_1 .. log q_K)``, since what the student gives to
all other tokens is ``1 - sum_k q_k``. So the kernels of one side do all of it: one call for the statistics of a row and the K
log-probabilities, K-sized arithmetic here, and one call that writes the gradient, a multiple of q, over the logits. Its columns at the
ids are then written again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from ..backends.rows import STATS, HeadBatch, Stage
from .problem import Problem

_CACHE_BYTES = 16 << 20
_SPARE_BYTES = 64 << 20


def targets(tail: str, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's probabilities of the ids and their logarithms ``[n, K]``, and what it gives to all other tokens together ``[n]``.

    Args:
        tail: ``Problem.tail``.
        values: ``[n, K]`` log-probabilities, or (``"sampled"``) counts.
        ids: ``[n, K]``, -1 for none.
    """
    none = ids < 0
    if tail == "sampled":
        counts = values.masked_fill(none, 0.0)
        total = counts.sum(-1, keepdim=True)
        p = counts / torch.where(total > 0, total, torch.ones_like(total))
        return p, p.log(), torch.zeros_like(p[:, 0])
    log_p = values.masked_fill(none, -math.inf)
    if tail == "renorm":
        total = torch.logsumexp(log_p, -1, keepdim=True)
        log_p = log_p - torch.where(total == -math.inf, torch.zeros_like(total), total)
    p = log_p.exp()
    if tail == "bucket":
        # What is rounded in the log-probabilities leaves no say on less than that.
        return p, log_p, (1.0 - p.sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
    return p, log_p, torch.zeros_like(p[:, 0])


def merged(ids: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Every id of a row ``[n, K]`` once, with its counts added up, and -1 in what is left over."""
    ordered, order = ids.sort(dim=-1, stable=True)
    group = torch.zeros_like(ids)
    torch.cumsum(ordered[:, 1:] != ordered[:, :-1], -1, out=group[:, 1:])
    # Accumulating index_put_ adds in a fixed order, unlike scatter_add_ on a GPU.
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(-1).expand_as(ids)
    total = torch.zeros_like(counts).index_put_((rows, group), counts.gather(-1, order), accumulate=True)
    return torch.full_like(ids, -1).scatter_(-1, group, ordered), total


def divergence(problem: Problem, log_q: Tensor, p: Tensor, log_p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``D [n]``, and ``T dD/dz``: over ``q_v`` at tokens without an id ``[n]``, where it is the same for all, and at the ids ``[n, K]``.

    Args:
        log_q: ``[n, K]``, -inf at padding; the others from ``targets``.
    """
    q = log_q.exp()
    if problem.tail in ("zero", "sampled"):
        # Of draws the cross-entropy: the entropy of a few draws is no estimate of the teacher's.
        terms = p * -log_q if problem.tail == "sampled" else p * (log_p - log_q)
        mass = p.sum(-1)
        return terms.masked_fill(p == 0, 0.0).sum(-1), mass, mass.unsqueeze(-1) * q - p
    # One more outcome, all other tokens together, makes two distributions of it, and a divergence like any other. Its slope is theirs
    # in proportion to their q.
    rest_q = (1.0 - q.sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
    log_p, log_q = (torch.cat([log, of_rest.log().unsqueeze(-1)], -1) for log, of_rest in ((log_p, rest), (log_q, rest_q)))
    p, q = (torch.cat([some, of_rest.unsqueeze(-1)], -1) for some, of_rest in ((p, rest), (q, rest_q)))
    div = problem.divergence
    parts = div.terms(log_q, log_p, q, p)
    value, coefficients = div.finish([part.sum(-1, keepdim=True) for part in parts[: div.num_sums]])
    slope, total = div.slope(parts, coefficients), coefficients[0]
    nothing = (p == 0).all(-1)  # no id to renormalise over
    return value[:, 0].masked_fill(nothing, 0.0), slope[:, -1] / rest_q - total[:, 0], (slope - q * total)[:, :-1]


@dataclass
class SparseBatch:
    """The rows of one chunk, as ``RowBatch`` describes them, and what is known of the teacher."""

    logits: Tensor  # [C, V]
    bias: Tensor | None
    values: Tensor  # [C, K] in the compute dtype, of ``targets``
    ids: Tensor  # [C, K] int64
    labels: Tensor | None
    weight: Tensor | None
    state: Tensor  # [4 or more, C]: log-sum-exps in two parts, at T and, where cross-entropy needs them apart, at 1
    loss: Tensor | None
    stats: Tensor | None
    dz: Tensor | None
    dz_scale: float

    def part(self, r: slice) -> SparseBatch:
        """Some of the rows."""
        labels, weight, loss, dz = (None if t is None else t[r] for t in (self.labels, self.weight, self.loss, self.dz))
        return SparseBatch(
            self.logits[r], self.bias, self.values[r], self.ids[r], labels, weight, self.state[:, r], loss,
            None if self.stats is None else self.stats[:, r], dz, self.dz_scale,
        )  # fmt: skip


def rows(backend: ModuleType, problem: Problem, batch: SparseBatch, stages: Stage) -> None:
    """The stages of the rows of one chunk; without ``Stage.NORMALISERS`` the state is read."""
    step, row_bytes = len(batch.logits), batch.logits.shape[1] * batch.logits.element_size()
    if batch.logits.device.type == "cpu":  # what goes through both calls together stays in cache
        step = max(1, _CACHE_BYTES // row_bytes)
    elif problem.needs_ce and problem.temperature != 1.0:  # cross-entropy's own gradient is beside what the plan counts
        step = max(1, _SPARE_BYTES // row_bytes)
    step = max(step, 1)
    for start in range(0, len(batch.logits), step):
        _block(backend, problem, batch.part(slice(start, start + step)), stages)


def _block(backend: ModuleType, problem: Problem, batch: SparseBatch, stages: Stage) -> None:
    state, dz, labels = batch.state, batch.dz, batch.labels if problem.needs_ce else None
    ids, values = merged(batch.ids, batch.values) if problem.tail == "sampled" else (batch.ids.contiguous(), batch.values)
    factor = torch.ones_like(state[0]) if batch.weight is None else batch.weight
    cross_entropy, of_labels = torch.full_like(factor, math.nan), None
    # Cross-entropy at T = 1 is one more id of the same calls; at another temperature calls of its own, before the logits are written over.
    with_label = labels is not None and problem.temperature == 1.0
    if labels is not None and not with_label:
        of_labels = torch.empty_like(dz) if dz is not None and problem.ce_weight else None
        cross_entropy = _cross_entropy(backend, problem, batch, labels, factor, of_labels, stages)
    asked = ids if labels is None or not with_label else torch.cat([ids, labels.unsqueeze(-1)], -1)
    head = HeadBatch(batch.logits, batch.bias, state[0], state[1], ids=asked, logprobs=factor.new_empty(asked.shape))
    assert head.logprobs is not None
    if batch.stats is not None:
        head.entropy = torch.empty_like(factor)
        head.top_ids, head.top_logprobs = asked.new_empty((len(ids), 1), dtype=torch.int32), factor.new_empty((len(ids), 1))
    backend.head_rows(problem, head, stages & Stage.NORMALISERS | Stage.SUMS)

    p, log_p, rest = targets(str(problem.tail), values, ids)
    log_q = head.logprobs[:, : ids.shape[1]].masked_fill(ids < 0, -math.inf)
    value, outside, inside = divergence(problem, log_q, p, log_p, rest)
    if with_label:
        cross_entropy = -head.logprobs[:, -1]
    if batch.loss is not None:
        # 0 times what is infinite would be NaN.
        total = problem.value_scale * value if problem.kd_weight else torch.zeros_like(value)
        batch.loss.copy_((total + problem.ce_weight * cross_entropy if problem.ce_weight else total) * factor)
    if batch.stats is not None and head.entropy is not None and head.top_ids is not None:
        found = {
            "divergence": value,
            "cross_entropy": cross_entropy,
            "student_entropy": head.entropy,
            "teacher_entropy": -(torch.xlogy(p, p).sum(-1) + torch.xlogy(rest, rest)),
            "top1_agreement": (ids.gather(-1, p.argmax(-1, keepdim=True)) == head.top_ids).squeeze(-1),
        }
        for at, name in enumerate(STATS):
            batch.stats[at] = found[name]
    if dz is None:
        return
    scale, ce_weight = problem.value_scale, problem.ce_weight if with_label else 0.0
    if problem.kd_weight:
        outside, inside = outside * scale + ce_weight, inside * scale
    else:
        outside, inside = torch.full_like(outside, ce_weight), torch.zeros_like(inside)
    slopes = HeadBatch(batch.logits, batch.bias, state[0], state[1], d_lse=outside * factor, dz=dz, dz_scale=batch.dz_scale)
    backend.head_rows(problem, slopes, Stage.GRADIENT)
    put = _Columns(problem, batch, dz, factor)
    if with_label and labels is not None:
        label, log_label = labels.unsqueeze(-1), head.logprobs[:, -1:]
        put(label, log_label, outside.unsqueeze(-1) * log_label.exp() - ce_weight)
        inside = inside + ce_weight * (log_q.exp() - (ids == label).to(inside.dtype))
    put(ids, log_q, inside)
    if of_labels is not None:
        dz.add_(of_labels)


@dataclass
class _Columns:
    """Writes a few columns of the gradient as such: as a multiple of q and what the kernel would add to it, digits would cancel."""

    problem: Problem
    batch: SparseBatch
    dz: Tensor  # [C, V]
    factor: Tensor  # [C]

    def __call__(self, ids: Tensor, log_q: Tensor, slopes: Tensor) -> None:
        """``T dD/dz`` at ids ``[C, K]``, none of them twice, into its columns; -1 writes nothing."""
        problem, batch = self.problem, self.batch
        values = slopes * (self.factor * (problem.student.scale * problem.inv_temperature * batch.dz_scale)).unsqueeze(-1)
        if problem.student.softcap is not None:
            z = (log_q + batch.state[1].unsqueeze(-1)) * problem.temperature + batch.state[0].unsqueeze(-1)
            values = values * (1 - (z / problem.student.softcap).square())
        # Padding writes what another of its row writes, or where there is none what is there already: no column twice, unlike.
        named = ids >= 0
        one = named.to(torch.int8).argmax(-1, keepdim=True)
        column = ids.gather(-1, one).clamp(min=0)
        there = torch.where(named.gather(-1, one), values.gather(-1, one), self.dz.gather(-1, column).to(values.dtype))
        self.dz.scatter_(-1, torch.where(named, ids, column), torch.where(named, values, there).to(self.dz.dtype))


def _cross_entropy(
    backend: ModuleType, problem: Problem, batch: SparseBatch, labels: Tensor, factor: Tensor, dz: Tensor | None, stages: Stage
) -> Tensor:
    """``[C]`` at T = 1, and its share of the gradient into ``dz``."""
    ids = labels.unsqueeze(-1).contiguous()
    head = HeadBatch(batch.logits, batch.bias, batch.state[2], batch.state[3], ids=ids, logprobs=factor.new_empty(ids.shape))
    if dz is not None:
        head.dz, head.dz_scale, head.d_logprobs = dz, batch.dz_scale, (-problem.ce_weight * factor).unsqueeze(-1)
    stages = stages & Stage.NORMALISERS | Stage.SUMS | (Stage(0) if dz is None else Stage.GRADIENT)
    backend.head_rows(replace(problem, temperature=1.0), head, stages)
    assert head.logprobs is not None
    return -head.logprobs[:, 0]
