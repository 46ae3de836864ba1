"""Records passed to a backend: stages, row state, and the rows of one chunk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from torch import Tensor


class Stage(IntFlag):
    """Stages of processing a row. A call runs one or more stages; a backend can fuse the stages of one call."""

    NORMALISERS = 1
    """Compute the largest logits and the sums of exponentials relative to them, and write both to the state."""
    SUMS = 2
    """Compute all other sums over the columns (values, slopes, entropies), and write loss and statistics."""
    GRADIENT = 4
    """Write ``dz``."""


FORWARD = Stage.NORMALISERS | Stage.SUMS

MOST_SUMS = 4
"""Maximum number of sums over the columns of a row that a divergence needs."""

STATE = (
    "top_s", "expsum_s", "top_t", "expsum_t", "expsum_one", "target", "mean_s", "mean_t", "columns",
    "best_s", "best_t", *(f"sum_{i}" for i in range(MOST_SUMS)),
)  # fmt: skip
"""Rows of the state ``[len(STATE), C]``, which a stage writes and later stages read.

NORMALISERS writes ``top = max(z)`` and ``expsum = sum exp((z - top) / T)`` of both sides, the student's ``expsum_one`` at T = 1, and its
logit at the label, ``target`` (-inf if the label is -1). For centred logits it writes both means and ``columns``: the means exclude
columns that are -inf on both sides, and ``columns`` is the number of the others. SUMS writes the divergence's sums and, with statistics,
each side's first column with the largest logit (-1 if no column has it). Only the rows that the call needs are written.

``log q = (z - top) / T - log(expsum)``. Subtract before dividing: z / T and top / T are rounded to the ulp of the largest, and for large
logits or a small T that error is too large for exp.

Only the backend that wrote a state can read it: its logits may lack the side's scale (``Backend.state_scales``).

Stages can run on slices of the columns; fused/merge.py merges the slices' states between two stages.
"""

STATS = ("divergence", "cross_entropy", "student_entropy", "teacher_entropy", "top1_agreement")


@dataclass(frozen=True)
class Transform:
    """Map from ``z = hidden @ weight.T + bias`` to logits: ``softcap * tanh(scale * z / softcap)``. The identity for a logits tensor."""

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
    labels: Tensor | None  # [C] int64, all valid; -1 if the label is in another slice of the columns
    weight: Tensor | None  # [C] compute dtype: token weight; in a backward pass times the upstream gradient
    state: Tensor  # [len(STATE), C] compute dtype
    loss: Tensor | None = None  # [C] compute dtype, out
    stats: Tensor | None = None  # [5, C] float32, out
    dz: Tensor | None = None  # [C, V], out: gradient by ``student``; may lie over it, each row starting where the row does
    dz_scale: float = 1.0  # multiplies dz


@dataclass
class HeadBatch:
    """The rows of one chunk of one side. All arrays except logits and dz are contiguous."""

    logits: Tensor  # [C, V] before bias, scale and softcap
    bias: Tensor | None  # [V]
    top: Tensor  # [C] compute dtype: the largest z. NORMALISERS writes top and log_sum, SUMS writes entropy; other stages read them
    log_sum: Tensor  # [C] log sum exp((z - top) / T)
    entropy: Tensor | None = None  # [C]
    ids: Tensor | None = None  # [C, K] int64, -1 is padding
    logprobs: Tensor | None = None  # [C, K] compute dtype, out: log softmax(z / T) at ids, 0 at -1
    d_lse: Tensor | None = None  # [C] upstream gradient of top / T + log_sum; None is 0
    d_entropy: Tensor | None = None  # [C] upstream gradient of entropy; None is 0
    d_logprobs: Tensor | None = None  # [C, K] upstream gradient of logprobs; None is 0
    dz: Tensor | None = None  # [C, V], out: gradient by ``logits``; may lie over it, each row starting where the row does
    dz_scale: float = 1.0  # multiplies dz
    top_ids: Tensor | None = None  # [C, k] int32, out: sorted by falling logit, ties by rising id; NaN counts as -inf
    top_logprobs: Tensor | None = None  # [C, k] compute dtype
    draws: Tensor | None = None  # [C, S] int32, out: see csrc/philox.h; -1 where the log-sum-exp is not finite
    seed: Tensor | None = None  # [] int64 on the device of the logits: the random key
    first_row: int = 0  # index of the first row within the call: part of the random counter
