"""Measure what a model does to its logits after the head, by replacing the head's output with a ramp."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Transform", "UnknownTransform", "fit", "ramp"]

# At the smallest magnitude a soft cap has no effect; at the largest only the cap remains. Within float16.
SMALLEST, LARGEST, STEPS = 1e-3, 3e4, 32


class UnknownTransform(Exception):
    """Raised if the step from head to logits is not a scale, a soft cap and a truncation. The message completes "because"."""


@dataclass(frozen=True)
class Transform:
    """``z = head(h)[:columns] * scale``, then ``softcap * tanh(z / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None
    columns: int | None = None

    def __call__(self, z: Tensor) -> Tensor:
        z = z[..., : self.columns] * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


def ramp(columns: int) -> Tensor:
    """Return ``[columns]`` float32: the magnitudes, repeated with both signs, the smallest and the largest first.

    So a truncation leaves both ends, wherever it cuts.
    """
    magnitudes = torch.logspace(math.log10(SMALLEST), math.log10(LARGEST), STEPS, dtype=torch.float64)
    both_ends = torch.stack([magnitudes[: STEPS // 2], magnitudes[STEPS // 2 :].flip(0)], dim=1).flatten()
    index = torch.arange(columns)
    signs = 1.0 - 2 * ((index + index // STEPS) % 2)
    return (both_ends[index % STEPS] * signs).float()


def fit(logits: Tensor) -> Transform:
    """Return the transform that turns :func:`ramp` into ``logits`` ``[..., V]``, the same in every row.

    Raises:
        UnknownTransform: no scale and soft cap fit all logits.
    """
    columns = logits.shape[-1]
    x, y = ramp(columns).double(), logits.detach().cpu().double().reshape(-1, columns)
    ratio = y / x
    smallest = x.abs() <= 1.01 * SMALLEST
    scale = ratio[:, smallest].median().item()
    top = y[:, x.abs().argmax()].abs().median().item()
    linear = scale * x.abs().max().item()
    if not (math.isfinite(scale) and math.isfinite(top)) or scale == 0 or top == 0:
        raise UnknownTransform("its logits do not follow its head")
    softcap = None if abs(top / linear - 1) < 1e-2 else top
    # With a low soft cap and a high scale the smallest logits are not quite linear.
    exact = ratio if softcap is None else (torch.atanh(y / softcap) * softcap / x)[:, smallest]
    scale = exact.median().item()
    found = Transform(_plain(scale), None if softcap is None else _plain(softcap), columns)
    step = max(torch.finfo(torch.float32).eps, torch.finfo(logits.dtype).eps)
    error = (y / found(x) - 1).abs().max().item()
    if not error <= 16 * step:
        raise UnknownTransform(f"the step from head to logits is not a scale, a soft cap and a truncation (off by {error:.2g})")
    return found


def _plain(value: float) -> float:
    """Return the number that a config would hold: the fewest digits, or 1 over such a number, within float32's precision."""
    for candidate in (float(f"{value:.6g}"), 1 / float(f"{1 / value:.6g}")):
        if abs(candidate / value - 1) <= 2 * torch.finfo(torch.float32).eps:
            return candidate
    return value
