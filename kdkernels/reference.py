"""The dense definition of every loss: plain tensor operations, gradients by autograd, no kernel. The oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    x = (side.hidden if isinstance(side, LMHead) else side).to(dtype)
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
