"""Divergences used only in tests. They are nonlinear functions of sums. Triton versions: more_triton_divergences.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels.divergences import Divergence, ReverseKL, TotalVariation


@dataclass(frozen=True)
class NegLogAcceptance(Divergence):
    """``-log(1 - TV)``: the logarithm of a sum."""

    name = "neg_log_acceptance"
    id = 10
    slope_jumps = True

    def reference_value(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return -torch.log1p(-TotalVariation().reference_value(log_q, log_p))

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return TotalVariation().terms(log_q, log_p, q, p)

    def finish(self, sums: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        acceptance = 1 - sums[0]
        return -acceptance.log(), (sums[1] / acceptance, acceptance)

    def slope(self, terms: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
        return terms[1] / coefficients[1]


@dataclass(frozen=True)
class Mixed(Divergence):
    """``weight * ReverseKL + (1 - weight) * NegLogAcceptance``: two divergences in one pass, with four sums."""

    weight: float = 0.3
    name = "mixed"
    id = 11
    slope_jumps = True
    num_sums = 4  # type: ignore[assignment]

    def reference_value(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        first, second = ReverseKL().reference_value(log_q, log_p), NegLogAcceptance().reference_value(log_q, log_p)
        return self.weight * first + (1 - self.weight) * second

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        return *ReverseKL().terms(log_q, log_p, q, p), *NegLogAcceptance().terms(log_q, log_p, q, p)

    def finish(self, sums: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        (first, (total,)), (second, (other_total, acceptance)) = ReverseKL().finish(sums[:2]), NegLogAcceptance().finish(sums[2:])
        w = self.weight
        return w * first + (1 - w) * second, (w * total + (1 - w) * other_total, acceptance)

    def slope(self, terms: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
        return self.weight * terms[1] + (1 - self.weight) * terms[3] / coefficients[1]
