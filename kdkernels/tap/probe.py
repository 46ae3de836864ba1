"""What a model does to its logits after the head, measured with a ramp in the place of the head's output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Transform", "UnknownTransform", "fit", "ramp"]

# From where a soft cap can't be felt to where nothing else is felt, and below float16's largest.
SMALLEST, LARGEST, STEPS = 1e-3, 3e4, 32


class UnknownTransform(Exception):
    """What lies between head and logits is not a scale, a soft cap and a truncation. The message completes "because"."""


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
    """``[columns]`` float32: the magnitudes over and over, the smallest and the largest first, of both signs.

    A truncation leaves enough of it, wherever it cuts.
    """
    magnitudes = torch.logspace(math.log10(SMALLEST), math.log10(LARGEST), STEPS, dtype=torch.float64)
    both_ends = torch.stack([magnitudes[: STEPS // 2], magnitudes[STEPS // 2 :].flip(0)], dim=1).flatten()
    index = torch.arange(columns)
    signs = 1.0 - 2 * ((index + index // STEPS) % 2)
    return (both_ends[index % STEPS] * signs).float()


def fit(logits: Tensor) -> Transform:
    """What made ``logits`` ``[..., V]`` of :func:`ramp`, in every row alike.

    Raises:
        UnknownTransform: no scale and soft cap explain all of them.
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
    # The small end is not quite linear where the soft cap is low and the scale high.
    exact = ratio if softcap is None else (torch.atanh(y / softcap) * softcap / x)[:, smallest]
    scale = exact.median().item()
    found = Transform(_plain(scale), None if softcap is None else _plain(softcap), columns)
    step = max(torch.finfo(torch.float32).eps, torch.finfo(logits.dtype).eps)
    error = (y / found(x) - 1).abs().max().item()
    if not error <= 16 * step:
        raise UnknownTransform(
            f"something else than a scale, a soft cap and a truncation lies between head and logits (off by {error:.2g})"
        )
    return found


def _plain(value: float) -> float:
    """The number that a config would hold: fewest digits, or one over it, where float32 can't tell them apart."""
    for candidate in (float(f"{value:.6g}"), 1 / float(f"{1 / value:.6g}")):
        if abs(candidate / value - 1) <= 2 * torch.finfo(torch.float32).eps:
            return candidate
    return value
