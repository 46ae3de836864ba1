"""The dense definition of every loss: plain tensor operations, gradients by autograd, no kernel. The oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends.rows import STATS, Transform
from .divergences import Divergence, ForwardKL
from .fused import philox
from .fused.problem import Problem
from .sides import Ensemble, LMHead, Sampled, Side, Teacher, TopK


def transform(z: Tensor, t: Transform) -> Tensor:
    """``z * scale``, then ``softcap * tanh(z / softcap)``."""
    if t.scale != 1.0:
        z = z * t.scale
    return z if t.softcap is None else t.softcap * torch.tanh(z / t.softcap)


def normalize(x: Tensor, other: Tensor, divergence: Divergence) -> Tensor:
    """The argument of a divergence's formula: ``[..., V]`` logits over T, less the row's normaliser."""
    if divergence.normalizer == "softmax":
        return torch.log_softmax(x, dim=-1)
    return x - row_mean(x, other) if divergence.normalizer == "mean" else x


def row_mean(x: Tensor, other: Tensor) -> Tensor:
    """The mean of each row ``[..., 1]``, over the columns that are finite on at least one side."""
    skipped = (x == -math.inf) & (other == -math.inf)
    kept = torch.where(skipped, torch.zeros_like(x), x)
    return kept.sum(-1, keepdim=True) / (~skipped).sum(-1, keepdim=True).clamp(min=1)


def over_temperature(z: Tensor, problem: Problem) -> Tensor:
    """``[..., V]`` logits over T, less the row's largest, which no softmax notices: for small T the quotients alone would be too coarse."""
    return (z - row_top(z)) * problem.inv_temperature


def row_top(z: Tensor) -> Tensor:
    """The largest logit of each row ``[..., 1]``, a constant; 0 for rows where it is not finite."""
    top = z.detach().amax(-1, keepdim=True)
    return torch.where(torch.isfinite(top), top, torch.zeros_like(top))


def _logits(side: Side, t: Transform, valid: Tensor | None, vocab: int, dtype: torch.dtype) -> Tensor:
    """``[..., V]`` in the compute dtype; invalid rows are zeroed first, so that a NaN there reaches nothing."""
    x = _input(side).to(dtype)
    if valid is not None:
        x = torch.where(valid.unsqueeze(-1), x, torch.zeros((), dtype=dtype, device=x.device))
    if not isinstance(side, LMHead):
        return x
    z = x @ side.weight[:vocab].to(dtype).t()
    if side.bias is not None:
        z = z + side.bias[:vocab].to(dtype)
    return transform(z, t)


def _teacher_logits(problem: Problem, teacher: Side | Ensemble, valid: Tensor | None) -> Tensor:
    """``[..., V]``; T times the logarithm of the average where probabilities are averaged."""
    vocab, dtype = problem.vocab, problem.compute_dtype
    if not isinstance(teacher, Ensemble):
        return _logits(teacher, problem.teacher, valid, vocab, dtype)
    found = [_logits(side, m.transform, valid, vocab, dtype) for side, m in zip(teacher.teachers, problem.members, strict=True)]
    shares = [m.share for m in problem.members]
    if teacher.mode == "logits":
        return torch.stack([share * z for share, z in zip(shares, found, strict=True)]).sum(0)
    log_p = [torch.log_softmax(over_temperature(z, problem), -1) + math.log(share) for share, z in zip(shares, found, strict=True)]
    return problem.temperature * torch.logsumexp(torch.stack(log_p), 0)


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -torch.where(p == 0, torch.zeros_like(p), p * log_p).sum(-1)


def _log_rest(x: Tensor, ids: Tensor, named: Tensor, floor: float) -> Tensor:
    """``[..., 1]``: the log-probability of all tokens but ``ids`` together, at least log(floor).

    The clamp stops no gradient: the log-sum-exp of all tokens has its own, and that of the others, sum q_v / rest, is taken with the
    clamped rest.
    """
    at_ids = torch.zeros(x.shape, dtype=torch.int32, device=x.device).scatter_add(-1, ids, named.to(torch.int32)) > 0
    others = torch.where(at_ids.all(-1, keepdim=True), torch.zeros_like(x), x.masked_fill(at_ids, -math.inf)).logsumexp(-1, keepdim=True)
    all_tokens = x.logsumexp(-1, keepdim=True)
    log_rest = (others - all_tokens).detach()
    clamped = torch.where(at_ids.all(-1, keepdim=True), math.log(floor), log_rest.clamp(min=math.log(floor)))
    share = torch.where(at_ids.all(-1, keepdim=True), 0.0, (log_rest - clamped).exp())
    return clamped + share * (others - others.detach()) - (all_tokens - all_tokens.detach())


def sparse_divergence(problem: Problem, x: Tensor, ids: Tensor, values: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """D ``[...]``, the entropy of what is known of the teacher ``[...]``, and its most likely id ``[..., 1]``.

    Over the outcomes that the teacher names and, as one more, all other tokens.

    Args:
        x: ``[..., V]``, the student's logits over T; ids, values: ``[..., K]`` as in ``Inputs``.
    """
    log_q = torch.log_softmax(x, -1)
    named = ids >= 0 if valid is None else (ids >= 0) & valid.unsqueeze(-1)
    at = torch.where(named, ids.long(), torch.zeros((), dtype=torch.int64, device=ids.device))
    values = torch.where(named, values.to(log_q.dtype), torch.full((), 0.0 if problem.tail == "sampled" else -math.inf, dtype=log_q.dtype))
    if problem.tail == "sampled":
        p = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    else:
        p = torch.softmax(values, -1).nan_to_num(0.0) if problem.tail == "renorm" else values.exp()
    none, log_of_q = torch.full_like(p[..., :1], -math.inf), torch.where(named, log_q.gather(-1, at), torch.full_like(p, -math.inf))
    rest = rest_q = none  # logarithms of what all other tokens have together
    floor = torch.finfo(torch.float32).eps
    if problem.tail == "bucket":
        rest = (1 - p.sum(-1, keepdim=True)).clamp(min=floor).log()
    if problem.tail in ("bucket", "renorm"):
        rest_q = _log_rest(x, at, named, floor)
    log_of_p = torch.cat([p.log(), rest], -1)
    entropy = _entropy(log_of_p)
    if problem.tail in ("zero", "sampled"):  # no distribution, and the one form that needs none
        value = ForwardKL().reference(torch.cat([log_of_q, rest_q], -1), log_of_p).sum(-1)
        value = value + entropy if problem.tail == "sampled" else value
    else:
        value = problem.divergence.reference_value(torch.cat([log_of_q, rest_q], -1), log_of_p)
        value = torch.where((log_of_p == -math.inf).all(-1), torch.zeros_like(value), value)  # a row without an id says nothing
    return value, entropy, ids.gather(-1, p.argmax(-1, keepdim=True))


def distillation_rows(
    problem: Problem, student: Side, teacher: Teacher, labels: Tensor | None, token_weights: Tensor | None, sparse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per-token loss ``[...]`` (0 for invalid tokens), number of valid tokens (0-dim int64), statistics ``[5, ...]`` or None.

    Args:
        sparse: ``[..., K]`` values of a sparse teacher, at the loss's temperature.
    """
    dtype = problem.compute_dtype
    valid = None if labels is None else labels != problem.ignore_index
    zs = _logits(student, problem.student, valid, problem.vocab, dtype)
    x = over_temperature(zs, problem)
    if isinstance(teacher, (TopK, Sampled)):
        assert sparse is not None
        divergence, teacher_entropy, first = sparse_divergence(problem, x, teacher.ids, sparse, valid)
        agreement = zs.argmax(-1, keepdim=True) == first
    else:
        zt = _teacher_logits(problem, teacher, valid).detach()
        u, div = over_temperature(zt, problem), problem.divergence
        a, b = (x, u) if div.normalizer == "softmax" else (zs * problem.inv_temperature, zt * problem.inv_temperature)
        divergence = div.reference_value(normalize(a, b, div), normalize(b, a, div))
        teacher_entropy = _entropy(torch.log_softmax(u, -1))
        agreement = zs.argmax(-1, keepdim=True) == zt.argmax(-1, keepdim=True)
    # Without weight 0, with gradient 0: 0 times an infinite divergence has neither.
    loss = problem.value_scale * divergence if problem.kd_weight else zs.masked_fill(torch.ones_like(zs, dtype=torch.bool), 0.0).sum(-1)
    ce = torch.full_like(divergence, math.nan)
    if labels is not None:
        target = labels.masked_fill(labels == problem.ignore_index, 0).unsqueeze(-1)
        ce = -torch.log_softmax(zs, -1).gather(-1, target).squeeze(-1)
        if problem.ce_weight:
            loss = loss + problem.ce_weight * ce
    if token_weights is not None:
        weights = token_weights.to(dtype)  # of ignored tokens anything, NaN too
        loss = loss * (weights if valid is None else torch.where(valid, weights, torch.zeros_like(weights)))
    count = torch.full((), loss.numel(), dtype=torch.int64, device=loss.device) if valid is None else valid.sum()
    stats = None
    if problem.return_stats:
        with torch.no_grad():
            values = {
                "divergence": divergence,
                "cross_entropy": ce,
                "student_entropy": _entropy(torch.log_softmax(x, -1)),
                "teacher_entropy": teacher_entropy,
                "top1_agreement": agreement.squeeze(-1),
            }
            stats = torch.stack([values[name].to(torch.float32) for name in STATS])
            if valid is not None:
                stats = torch.where(valid, stats, torch.zeros_like(stats))
    if valid is not None:
        loss = torch.where(valid, loss, torch.zeros_like(loss))
    return loss, count, stats


def head_values(problem: Problem, side: Side, ids: Tensor | None) -> Tensor:
    """A quantity of one side per token, ``[...]`` or ``[..., K]``; see ``Problem.quantity``. Cross-entropy is 0 for invalid tokens."""
    many = ids is not None and ids.dim() == _input(side).dim()
    index = None if ids is None else ids.long() if many else ids.long().unsqueeze(-1)
    none = None if index is None else index == problem.ignore_index
    valid = None if none is None else ~none.all(-1)
    z = _logits(side, problem.student, valid, problem.vocab, problem.compute_dtype)
    x = over_temperature(z, problem)
    if problem.quantity == "logsumexp":
        return torch.logsumexp(x, -1) + (row_top(z) * problem.inv_temperature).squeeze(-1)
    log_q = torch.log_softmax(x, -1)
    if problem.quantity == "entropy":
        return _entropy(log_q)
    assert index is not None
    assert none is not None
    chosen = log_q.gather(-1, torch.where(none, torch.zeros_like(index), index))
    values = torch.where(none, torch.zeros_like(chosen), chosen)
    if problem.quantity == "cross_entropy":
        values = -values
    return values if many else values.squeeze(-1)


def topk(problem: Problem, side: Side, k: int) -> tuple[Tensor, Tensor]:
    """Ids ``[..., k]`` and their log-probabilities, falling; among equals the lower id first, NaN as -inf."""
    z = _logits(side, problem.student, None, problem.vocab, problem.compute_dtype).detach()
    order = torch.where(torch.isnan(z), torch.full_like(z, -math.inf), z).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return order.to(torch.int32), torch.log_softmax(over_temperature(z, problem), -1).gather(-1, order)


def sample(problem: Problem, side: Side, seed: Tensor, num_samples: int) -> Tensor:
    """Ids ``[..., num_samples]``; -1 in rows without a finite log-sum-exp."""
    z = _logits(side, problem.student, None, problem.vocab, problem.compute_dtype).detach().to(torch.float64)
    x = over_temperature(z, problem).flatten(0, -2)
    ids = philox.draw(x, seed, 0, num_samples)
    ids = torch.where(torch.isfinite(torch.logsumexp(x, -1, keepdim=True)), ids, torch.full_like(ids, -1))
    return ids.to(torch.int32).view(*z.shape[:-1], num_samples)


def softmax(logits: Tensor, temperature: float, logarithm: bool) -> Tensor:
    """``softmax(logits / T)`` or its logarithm, in the dtype of the logits."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    x = (wide - row_top(wide)) * (1.0 / temperature)
    return (torch.log_softmax(x, -1) if logarithm else torch.softmax(x, -1)).to(logits.dtype)


def _input(side: Side) -> Tensor:
    return side.hidden if isinstance(side, LMHead) else side
