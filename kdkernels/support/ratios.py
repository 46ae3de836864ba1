"""Logarithms of ratios and mixtures of probabilities, the building blocks of the divergences."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def zero_where(empty: Tensor, x: Tensor) -> Tensor:
    """Set x to 0 where ``empty``, the limit of 0 * log 0. In place: x is always a temporary."""
    return x.masked_fill_(empty, 0.0)


def safe_product(weight: Tensor, factor: Tensor) -> Tensor:
    """Return ``weight * factor``; 0 where the weight is 0, in value and gradient (reference formulas only)."""
    empty = weight == 0
    return torch.where(empty, torch.zeros_like(weight), weight * torch.where(empty, torch.zeros_like(factor), factor))


def log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log(a / b); 0 where both are 0 (reference formulas only)."""
    both = (log_a == -math.inf) & (log_b == -math.inf)
    zero = torch.zeros((), dtype=log_a.dtype, device=log_a.device)
    return torch.where(both, zero, torch.where(both, zero, log_a) - torch.where(both, zero, log_b))


def log_mix(weight: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return log(weight * a + (1 - weight) * b); -inf with gradient 0 where both are 0 (reference formulas only)."""
    both = (log_a == -math.inf) & (log_b == -math.inf)
    zero = torch.zeros((), dtype=log_a.dtype, device=log_a.device)
    mixed = torch.logaddexp(torch.where(both, zero, log_a) + math.log(weight), torch.where(both, zero, log_b) + math.log1p(-weight))
    return torch.where(both, zero - math.inf, mixed)


def choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Return ``yes`` where ``condition`` else ``no``, in the dtype of ``like`` (torch.where of two numbers would round them to float32)."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def mixture(weight_q: float, weight_p: float, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(log(q / m), log(p / m))`` for ``m = weight_q * q + weight_p * p``; the weights sum to 1. NaN where p and q are both 0.

    The larger of p and q is factored out of m, so that nothing overflows: ``m / larger = 1 + share * (smaller / larger - 1)``, where
    ``share`` is the weight of the smaller one. This is accurate near p = q, but cancels if the smaller one has nearly all of the weight;
    then ``m / larger`` is computed directly.
    """
    ratio = log_q - log_p
    q_larger = ratio >= 0
    size = ratio.abs().neg_()  # log(smaller / larger)
    share = weight_q if weight_q == weight_p else choose(q_larger, weight_p, weight_q, ratio)
    lost = torch.expm1(size).mul_(share)  # m / larger - 1
    if max(weight_q, weight_p) <= 0.9:
        log_m = lost.log1p_()
    else:
        direct = size.exp_().mul_(share).add_(choose(q_larger, weight_q, weight_p, ratio))  # m / larger
        log_m = torch.where(lost > -0.5, torch.log1p(lost), direct.log_())
    log_qm = torch.where(q_larger, -log_m, ratio - log_m)
    log_pm = torch.where(q_larger, -ratio - log_m, -log_m)
    return log_qm, log_pm
