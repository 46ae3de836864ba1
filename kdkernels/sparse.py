"""Losses against what has been kept of a teacher: its most likely tokens, or draws from it.

Such a loss depends on the student's log-probabilities at the K ids alone, ``D(log q_1 .. log q_K)``, since what the student gives to
all other tokens is ``1 - sum_k q_k``. So the kernels of one side do all of it: one call for the statistics of a row and the K
log-probabilities, K-sized arithmetic here, and one call that turns the K slopes into the gradient, in place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from . import divergences
from .problem import STATS, HeadBatch, Problem

BLOCK_BYTES = {"cpu": 16 << 20}
"""Of the logits that go through both calls together, so that a CPU's second one finds them in cache."""


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


def divergence(problem: Problem, log_q: Tensor, padding: Tensor, p: Tensor, log_p: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """``D [n]`` and its slopes ``dD / d log q_k [n, K]``."""
    d = problem.divergence
    q = log_q.exp().masked_fill(padding, 0.0)
    if isinstance(d, divergences.ForwardKL) and problem.tail != "bucket":
        # Of draws the cross-entropy: the entropy of a few draws is no estimate of the teacher's.
        terms = p * -log_q if problem.tail == "sampled" else p * (log_p - log_q)
        return terms.masked_fill(p == 0, 0.0).sum(-1), -p
    rest_q = (1.0 - q.sum(-1)).clamp(min=torch.finfo(torch.float32).eps)
    if isinstance(d, divergences.ForwardKL):
        terms = (p * (log_p - log_q)).masked_fill(p == 0, 0.0)
        return terms.sum(-1) + rest * (rest / rest_q).log(), q * (rest / rest_q).unsqueeze(-1) - p
    if isinstance(d, divergences.ReverseKL):
        ratio, of_rest = log_q - log_p, (rest_q / rest).log()
        return (q * ratio).masked_fill(q == 0, 0.0).sum(-1) + rest_q * of_rest, (q * (ratio - of_rest.unsqueeze(-1))).masked_fill(
            q == 0, 0.0
        )
    assert isinstance(d, divergences.JSD)
    b = d.beta
    m, rest_m = b * p + (1 - b) * q, b * rest + (1 - b) * rest_q
    of_teacher = (p * (log_p - m.log())).masked_fill(p == 0, 0.0).sum(-1) + torch.xlogy(rest, rest / rest_m)
    log_ratio, of_rest = (log_q - m.log()).masked_fill(q == 0, 0.0), (rest_q / rest_m).log()
    of_student = (q * log_ratio).sum(-1) + rest_q * of_rest
    return b * of_teacher + (1 - b) * of_student, (1 - b) * q * (log_ratio - of_rest.unsqueeze(-1))


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


def rows(backend: ModuleType, problem: Problem, batch: SparseBatch, statistics: bool) -> None:
    """The rows of one chunk; with ``statistics`` the state is written, else read."""
    row_bytes = batch.logits.shape[1] * batch.logits.element_size()
    step = max(1, BLOCK_BYTES.get(batch.logits.device.type, len(batch.logits) * row_bytes) // row_bytes)
    for start in range(0, len(batch.logits), step):
        _block(backend, problem, batch.part(slice(start, start + step)), statistics)


def _block(backend: ModuleType, problem: Problem, batch: SparseBatch, statistics: bool) -> None:
    ids, many, state, dz = batch.ids.contiguous(), batch.ids.shape[1], batch.state, batch.dz
    factor = torch.ones_like(state[0]) if batch.weight is None else batch.weight
    cross_entropy, of_labels = torch.full_like(factor, math.nan), None
    # Cross-entropy at T = 1 is one more id of the same calls; at another temperature calls of its own, before the logits are written over.
    with_label = batch.labels is not None and problem.needs_ce and problem.temperature == 1.0
    if batch.labels is not None and problem.needs_ce:
        if with_label:
            ids = torch.cat([ids, batch.labels.unsqueeze(-1)], -1)
        else:
            of_labels = None if dz is None or not problem.ce_weight else torch.empty_like(dz)
            cross_entropy = _cross_entropy(backend, problem, batch, batch.labels, factor, of_labels, statistics)
    head = HeadBatch(batch.logits, batch.bias, state[0], state[1], ids=ids, logprobs=factor.new_empty(ids.shape))
    assert head.logprobs is not None
    if batch.stats is not None:
        head.entropy = torch.empty_like(factor)
        head.top_ids, head.top_logprobs = ids.new_empty((len(ids), 1), dtype=torch.int32), factor.new_empty((len(ids), 1))
    backend.head_rows(problem, head, statistics)

    p, log_p, rest = targets(str(problem.tail), batch.values, batch.ids)
    value, slopes = divergence(problem, head.logprobs[:, :many], batch.ids < 0, p, log_p, rest)
    if with_label:
        cross_entropy = -head.logprobs[:, many]
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
            "top1_agreement": (batch.ids.gather(-1, p.argmax(-1, keepdim=True)) == head.top_ids).squeeze(-1),
        }
        for at, name in enumerate(STATS):
            batch.stats[at] = found[name]
    if dz is None:
        return
    slopes = slopes * problem.value_scale if problem.kd_weight else torch.zeros_like(slopes)
    if with_label:
        slopes = torch.cat([slopes, torch.full_like(slopes[:, :1], -problem.ce_weight)], -1)
    head = HeadBatch(batch.logits, batch.bias, state[0], state[1], ids=ids, logprobs=head.logprobs, dz=dz, dz_scale=batch.dz_scale)
    head.d_logprobs = (slopes * factor.unsqueeze(-1)).contiguous()
    backend.head_rows(problem, head, False)
    if of_labels is not None:
        dz.add_(of_labels)


def _cross_entropy(
    backend: ModuleType, problem: Problem, batch: SparseBatch, labels: Tensor, factor: Tensor, dz: Tensor | None, statistics: bool
) -> Tensor:
    """``[C]`` at T = 1, and its share of the gradient into ``dz``."""
    ids = labels.unsqueeze(-1).contiguous()
    head = HeadBatch(batch.logits, batch.bias, batch.state[2], batch.state[3], ids=ids, logprobs=factor.new_empty(ids.shape))
    if dz is not None:
        head.dz, head.dz_scale, head.d_logprobs = dz, batch.dz_scale, (-problem.ce_weight * factor).unsqueeze(-1)
    backend.head_rows(replace(problem, temperature=1.0), head, statistics)
    assert head.logprobs is not None
    return -head.logprobs[:, 0]
