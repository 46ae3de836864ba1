"""The dense definition of every loss: plain tensor operations, gradients by autograd, no kernel. The oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import philox
from .divergences import Divergence
from .problem import STATS, Problem, Transform
from .sides import LMHead, Side


def transform(z: Tensor, t: Transform) -> Tensor:
    """``z * scale``, then ``softcap * tanh(z / softcap)``."""
    if t.scale != 1.0:
        z = z * t.scale
    return z if t.softcap is None else t.softcap * torch.tanh(z / t.softcap)


def normalize(x: Tensor, other: Tensor, divergence: Divergence) -> Tensor:
    """The argument of a divergence's formula: ``[..., V]`` logits over T, less the row's normaliser."""
    if divergence.normalizer == "softmax":
        return torch.log_softmax(x, dim=-1)
    if divergence.normalizer == "mean":
        skipped = (x == -math.inf) & (other == -math.inf)
        kept = torch.where(skipped, torch.zeros_like(x), x)
        return x - kept.sum(-1, keepdim=True) / (~skipped).sum(-1, keepdim=True).clamp(min=1)
    return x


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


def _entropy(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    return -torch.where(p == 0, torch.zeros_like(p), p * log_p).sum(-1)


def distillation_rows(
    problem: Problem, student: Side, teacher: Side, labels: Tensor | None, token_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per-token loss ``[...]`` (0 for invalid tokens), number of valid tokens (0-dim int64), statistics ``[5, ...]`` or None."""
    dtype = problem.compute_dtype
    valid = None if labels is None else labels != problem.ignore_index
    zs = _logits(student, problem.student, valid, problem.vocab, dtype)
    zt = _logits(teacher, problem.teacher, valid, problem.vocab, dtype).detach()
    x, u = zs / problem.temperature, zt / problem.temperature
    div = problem.divergence
    divergence = div.reference(normalize(x, u, div), normalize(u, x, div)).sum(-1)
    loss = problem.value_scale * divergence if problem.kd_weight else torch.zeros_like(divergence)
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
                "teacher_entropy": _entropy(torch.log_softmax(u, -1)),
                "top1_agreement": zs.argmax(-1) == zt.argmax(-1),
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
    x = _logits(side, problem.student, valid, problem.vocab, problem.compute_dtype) / problem.temperature
    if problem.quantity == "logsumexp":
        return torch.logsumexp(x, -1)
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
    return order.to(torch.int32), torch.log_softmax(z / problem.temperature, -1).gather(-1, order)


def sample(problem: Problem, side: Side, seed: Tensor, num_samples: int) -> Tensor:
    """Ids ``[..., num_samples]``; -1 in rows without a finite log-sum-exp."""
    z = _logits(side, problem.student, None, problem.vocab, problem.compute_dtype).detach().to(torch.float64)
    x = (z / problem.temperature).flatten(0, -2)
    ids = philox.draw(x, seed, 0, num_samples)
    ids = torch.where(torch.isfinite(torch.logsumexp(x, -1, keepdim=True)), ids, torch.full_like(ids, -1))
    return ids.to(torch.int32).view(*z.shape[:-1], num_samples)


def softmax(logits: Tensor, temperature: float, logarithm: bool) -> Tensor:
    """``softmax(logits / T)`` or its logarithm, in the dtype of the logits."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return (torch.log_softmax(x, -1) if logarithm else torch.softmax(x, -1)).to(logits.dtype)


def _input(side: Side) -> Tensor:
    return side.hidden if isinstance(side, LMHead) else side
