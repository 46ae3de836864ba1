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

MOST_SUMS = 4
"""A divergence sums at most this many numbers over the columns of a row."""

STATE = (
    "top_s", "expsum_s", "top_t", "expsum_t", "expsum_one", "target", "mean_s", "mean_t", "columns",
    "best_s", "best_t", *(f"sum_{i}" for i in range(MOST_SUMS)),
)  # fmt: skip
"""Rows of the state, which one stage writes and the next ones read.

NORMALISERS writes ``top = max(z)`` and ``expsum = sum exp((z - top) / T)`` of both sides, the student's ``expsum_one`` at T = 1, and its
logit at the label, ``target`` (-inf if the label is -1). For centred logits it writes both means, over the ``columns`` that are not -inf
on both sides. SUMS writes the divergence's sums and, with statistics, the first column of the largest logit on each side (-1 if it is not
there). Only what the call needs is written.

``log q = (z - top) / T - log(expsum)``. The subtraction comes before the division: z / T and top / T are rounded to the ulp of the
largest, which for large logits or a small T is more than exp can take.

A state belongs to the backend that wrote it: logits in it may lack the side's scale (``Backend.state_scales``).

Stages can run on slices of the columns. fused/merge.py merges the states in between.
"""

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
    labels: Tensor | None  # [C] int64, all valid; -1 for a label in another slice of the columns
    weight: Tensor | None  # [C] compute dtype: token weight, and upstream gradient in a backward pass
    state: Tensor  # [len(STATE), C] compute dtype
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
    log_sum: Tensor  # [C] log sum exp((z - top) / T)
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
