"""Merge the row states of several slices of the columns, between the stages that run on each slice: see ``backends.rows.STATE``.

The states of all slices are stacked, ``[slices, len(STATE), C]``, in column order, and merged in that order. Every process that merges
the same states gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends.rows import MOST_SUMS, STATE, STATS
from .call import Call

Scales = tuple[float, float]
"""Factors that convert logits stored in a state to logits, for the student and the teacher: ``Backend.state_scales``."""


def normalisers(call: Call, parts: Tensor, scales: Scales = (1.0, 1.0)) -> Tensor:
    """Return the state of whole rows ``[len(STATE), C]`` from the slices' states after ``Stage.NORMALISERS``."""
    whole = parts[0].clone()
    part, state = _by_name(parts.unbind(1)), _by_name(whole)
    for side, scale in (("s", scales[0]), ("t", scales[1])):
        top, expsum = f"top_{side}", f"expsum_{side}"
        state[top][:] = part[top].amax(0)
        state[expsum][:] = _moved(part[expsum], part[top], state[top], scale * call.inv_temperature)
    state["expsum_one"][:] = _moved(part["expsum_one"], part["top_s"], state["top_s"], scales[0])
    state["target"][:] = part["target"].amax(0)
    if call.divergence.normalizer == "mean":
        state["columns"][:] = part["columns"].sum(0)
        for mean in ("mean_s", "mean_t"):
            state[mean][:] = (part[mean] * part["columns"]).sum(0) / state["columns"].clamp(min=1)
    return whole


def sums(parts: Tensor, starts: Sequence[int]) -> Tensor:
    """Return the state of whole rows ``[len(STATE), C]`` from the slices' states after ``Stage.SUMS``.

    Args:
        starts: the first column of each slice.
    """
    whole = parts[0].clone()
    part, state = _by_name(parts.unbind(1)), _by_name(whole)
    for i in range(MOST_SUMS):
        state[f"sum_{i}"][:] = part[f"sum_{i}"].sum(0)
    for best in ("best_s", "best_t"):
        columns = part[best] + torch.tensor(starts, dtype=parts.dtype, device=parts.device).unsqueeze(-1)
        first = columns.masked_fill(part[best] < 0, math.inf).amin(0)
        state[best][:] = first.masked_fill(first == math.inf, -1)
    return whole


def cross_entropy(state: Tensor, scales: Scales = (1.0, 1.0)) -> Tensor:
    """Return the cross-entropy ``[C]`` at T = 1 from a merged state."""
    row = _by_name(state)
    return row["expsum_one"].log() - (row["target"] - row["top_s"]) * scales[0]


def divergence(call: Call, state: Tensor) -> Tensor:
    """Return the divergence ``[C]`` from a merged state."""
    row = _by_name(state)
    return call.divergence.finish([row[f"sum_{i}"] for i in range(call.divergence.num_sums)])[0]


def loss(call: Call, state: Tensor, weight: Tensor | None, scales: Scales = (1.0, 1.0)) -> Tensor:
    """Return the loss ``[C]``, times the row weights, from a merged state."""
    value = divergence(call, state)
    total = call.value_scale * value if call.kd_weight else torch.zeros_like(value)
    if call.ce_weight:
        total = total + call.ce_weight * cross_entropy(state, scales)
    return total if weight is None else total * weight


def statistics(call: Call, state: Tensor, parts: Tensor) -> Tensor:
    """Return the token statistics ``[5, C]`` from a merged state and the slices' statistics ``[slices, 5, C]`` of ``Stage.SUMS``."""
    part, row = dict(zip(STATS, parts.unbind(1), strict=True)), _by_name(state)
    values = {
        "divergence": divergence(call, state),
        "cross_entropy": part["cross_entropy"][0],  # the same in every slice
        "student_entropy": part["student_entropy"].sum(0),
        "teacher_entropy": part["teacher_entropy"].sum(0),
        "top1_agreement": row["best_s"] == row["best_t"],
    }
    return torch.stack([values[name].to(parts.dtype) for name in STATS])


def log_sums(tops: Tensor, log_sums: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Return ``top`` and ``log_sum`` of whole rows ``[C]`` of one side from those of the slices ``[slices, C]``."""
    top = tops.amax(0)
    return top, torch.logsumexp((tops - top) * inv_temperature + log_sums, 0)


def _by_name(state: Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
    return dict(zip(STATE, state, strict=True))


def _moved(expsums: Tensor, tops: Tensor, top: Tensor, factor: float) -> Tensor:
    """Sum the slices' exponentials, rescaled from each slice's largest logit ``[slices, C]`` to the row's, ``top`` ``[C]``."""
    return (expsums * ((tops - top) * factor).exp()).sum(0)
