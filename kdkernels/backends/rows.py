"""The rows of one chunk, as a backend receives them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from torch import Tensor


class Stage(IntFlag):
    """Stages of a row. A call names one or several; a backend fuses those that are asked for together."""

    NORMALISERS = 1
    """Find the largest logits and the sums from there, and write them to the state."""
    SUMS = 2
    """Find everything else that is summed over the columns: values, slopes, entropies; write loss and statistics."""
    GRADIENT = 4
    """Write ``dz``."""


FORWARD = Stage.NORMALISERS | Stage.SUMS

STATE = ("top_s", "rest_s", "top_t", "rest_t", "slope_sum", "top_ce", "rest_ce")
"""Rows of the saved state: the normalisers of both sides at T, the sum of the divergence's slopes, and the student's log-sum-exp at
T = 1 if cross-entropy is computed. A normaliser is two numbers, and log q = (z - top) / T - rest. For softmax, top = max(z) and
rest = log sum exp((z - top) / T). For the mean, top is the mean of z, and rest is 0. The subtraction comes before the division: z / T
and top / T are rounded to the ulp of the largest, which for large logits or a small T is more than exp can take. Only the backend that
wrote a state reads it, so the unit of rest is its own."""

STATS = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement")


@dataclass(frozen=True)
class Transform:
    """What lies between ``hidden @ weight.T + bias`` and the logits: ``softcap * tanh(scale * z / softcap)``; identity for logits."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None


@dataclass
class RowBatch:
    """The rows of one chunk, as a backend receives them. C rows, V columns, unit stride along V."""

    student: Tensor  # [C, V] logits before bias, scale and softcap
    teacher: Tensor  # [C, V]
    student_bias: Tensor | None  # [V]
    teacher_bias: Tensor | None  # [V]
    labels: Tensor | None  # [C] int64, all valid
    weight: Tensor | None  # [C] compute dtype: token weight, and upstream gradient in a backward pass
    state: Tensor  # [7, C] compute dtype, see STATE: written by ``Stage.NORMALISERS`` and ``SUMS``, read by later stages
    loss: Tensor | None = None  # [C] compute dtype, out
    stats: Tensor | None = None  # [5, C] float32, out
    dz: Tensor | None = None  # [C, V], out: gradient by ``student``; may lie over it, each row starting where the row does
    dz_scale: float = 1.0  # multiplies dz


@dataclass
class HeadBatch:
    """The rows of one chunk of one side alone. Arrays of more than one dimension but logits and dz are contiguous."""

    logits: Tensor  # [C, V] before bias, scale and softcap
    bias: Tensor | None  # [V]
    top: Tensor  # [C] compute dtype, the largest z; this and the next written by ``Stage.NORMALISERS``, entropy by ``SUMS``; else read
    log_sum: Tensor  # [C] log sum exp((z - top) / T), see STATE
    entropy: Tensor | None = None  # [C]
    ids: Tensor | None = None  # [C, K] int64, -1 for none
    logprobs: Tensor | None = None  # [C, K] compute dtype, out: log softmax(z / T) at ids, 0 at -1
    d_lse: Tensor | None = None  # [C] upstream gradients, None for 0: of top / T + log_sum,
    d_entropy: Tensor | None = None  # [C] of entropy,
    d_logprobs: Tensor | None = None  # [C, K] and of logprobs
    dz: Tensor | None = None  # [C, V], out: gradient by ``logits``; may lie over it, each row starting where the row does
    dz_scale: float = 1.0  # multiplies dz
    top_ids: Tensor | None = None  # [C, k] int32, out: by falling logit, among equals by rising id; NaN counts as -inf
    top_logprobs: Tensor | None = None  # [C, k] compute dtype
    draws: Tensor | None = None  # [C, S] int32, out: see csrc/philox.h; -1 where the log-sum-exp is not finite
    seed: Tensor | None = None  # [] int64 on the logits' device: the random key
    first_row: int = 0  # number of the first row within the call: part of the random counter
