"""Losses against a sparse teacher, which has K tokens per row: its most likely ones, or draws from it.

Such a loss is a function of the student's log-probabilities at the K ids, ``D(log q_1 .. log q_K)``, because the probability of all
other tokens together is ``1 - sum_k q_k``. The one-side kernels are therefore enough: one call computes the row's statistics and the K
log-probabilities, the arithmetic on K values is here, and one call writes the gradient, a multiple of q, over the logits. The columns at
the ids are then overwritten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.rows import STATS, HeadBatch, Stage
from ..backends.selection import traits
from .call import Call, Tensors
from .work import Arrays, Complaint, Form, Rows, Selected, Sink, StudentRows, Work

_CACHE_BYTES = 16 << 20  # logits per block on a CPU, which stay in cache between the two kernel calls
_SPARE_BYTES = 64 << 20  # logits per block elsewhere, if the cross-entropy's gradient needs a buffer of the same size
_SORT_ELEMENTS = 1 << 21  # ids checked at a time: sorting needs more memory than its input
FLOOR = torch.finfo(torch.float32).eps
"""Minimum for the total probability of all other tokens. Smaller values are lost in the rounding of the log-probabilities."""


class Targets(NamedTuple):
    """The teacher's probabilities in n rows: at its ids and their logarithms ``[n, K]``; ``rest``: of all other tokens together ``[n]``."""

    p: Tensor
    log_p: Tensor
    rest: Tensor


class Slopes(NamedTuple):
    """``value [n]``: D; ``inside [n, K]``: ``T dD/dz`` at the ids; ``outside [n]``: ``T dD/dz_v / q_v`` at any token v outside the ids."""

    value: Tensor
    outside: Tensor
    inside: Tensor


class SparseForm(Form):
    """A teacher with ``ids`` and ``values`` ``[..., K]``. Each subclass defines their meaning."""

    kind: str
    """Name of the public class, for messages."""

    @property
    def is_sparse(self) -> bool:
        return True

    def teacher_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> None:
        return None

    def work(self, call: Call, tensors: Tensors, selected: Selected, student: StudentRows, arrays: Arrays, sink: Sink | None) -> Work:
        return Sparse(call, student, Rows(tensors["values"], selected.index), Rows(tensors["ids"], selected.index), arrays, sink)

    def distinct(self, ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and values ``[n, K]`` with each id at most once per row."""
        return ids.contiguous(), values

    def targets(self, ids: Tensor, values: Tensor) -> Targets:
        """Return the teacher's probabilities from ids ``[n, K]`` (-1 is padding) and values ``[n, K]``."""
        raise NotImplementedError

    def slopes(self, call: Call, log_q: Tensor, targets: Targets) -> Slopes:
        """Return the divergence and its slopes. ``log_q``: ``[n, K]`` at the ids, -inf at padding."""
        raise NotImplementedError

    def bad_values(self, ids: Tensor, values: Tensor) -> Tensor:
        """Return a mask ``[n, K]`` of invalid values."""
        raise NotImplementedError

    def bad_rows(self, ids: Tensor, values: Tensor) -> Tensor:
        """Return a mask ``[n]`` of rows that are invalid as a whole."""
        raise NotImplementedError

    def complaint(self, ids: Tensor, values: Tensor) -> str:
        """Return an error message for the first fault. Each of the rows has a fault."""
        raise NotImplementedError

    def complaints(self, call: Call, tensors: Tensors, valid: Tensor | None) -> list[Complaint]:
        ids, values = (tensors[name].reshape(-1, tensors[name].shape[-1]) for name in ("ids", "values"))
        bad = torch.empty(len(ids), dtype=torch.bool, device=ids.device)
        step = max(1, _SORT_ELEMENTS // ids.shape[1])
        for start in range(0, len(ids), step):
            block_ids, block_values = ids[start : start + step], values[start : start + step]
            wrong = outside(block_ids, call.vocab) | (self.bad_values(block_ids, block_values) & (block_ids >= 0))
            bad[start : start + step] = wrong.any(-1) | self.bad_rows(block_ids, block_values)
        if valid is not None:
            bad &= valid.reshape(-1)

        def message() -> str:
            strange = ids[bad][outside(ids[bad], call.vocab)]
            if not strange.numel():
                return f"teacher {self.kind}.{self.complaint(ids[bad], values[bad])}"
            return (
                f"teacher {self.kind}.ids contain {int(strange[0])} ({strange.numel()} such entries), outside the vocabulary "
                f"[0, {call.vocab}) and not -1, which is padding: check that they come from the student's tokenizer"
            )

        return [(bad.any(), message)]


def outside(ids: Tensor, vocab: int) -> Tensor:
    """Return a mask of the ids that are neither a token nor padding."""
    return (ids < -1) | (ids >= vocab)


def linear(targets: Targets, log_q: Tensor, entropy: bool) -> Slopes:
    """Return the forward KL over the ids; without the teacher's ``entropy`` term, the cross-entropy."""
    p, log_p, _ = targets
    terms = p * (log_p - log_q) if entropy else p * -log_q
    mass = p.sum(-1)
    return Slopes(terms.masked_fill(p == 0, 0.0).sum(-1), mass, mass.unsqueeze(-1) * log_q.exp() - p)


def coarsened(call: Call, targets: Targets, log_q: Tensor) -> Slopes:
    """Return the call's divergence between two distributions over K + 1 outcomes: the ids, and all other tokens together.

    The slope of the last outcome is distributed over its tokens in proportion to their q.
    """
    p, log_p, rest = targets
    q = log_q.exp()
    rest_q = (1.0 - q.sum(-1)).clamp(min=FLOOR)
    log_p, log_q = (torch.cat([log_ids, others.log().unsqueeze(-1)], -1) for log_ids, others in ((log_p, rest), (log_q, rest_q)))
    p, q = (torch.cat([at_ids, others.unsqueeze(-1)], -1) for at_ids, others in ((p, rest), (q, rest_q)))
    div = call.divergence
    terms = div.terms(log_q, log_p, q, p)
    value, coefficients = div.finish([term.sum(-1, keepdim=True) for term in terms[: div.num_sums]])
    slope = div.slope(terms, coefficients)
    total = slope.sum(-1, keepdim=True)  # equal to the first coefficient, except in rows without ids
    nothing = (p == 0).all(-1)  # no id to renormalise over
    return Slopes(value[:, 0].masked_fill(nothing, 0.0), slope[:, -1] / rest_q - total[:, 0], (slope - q * total)[:, :-1])


class Sparse(Work):
    """Rows against a sparse teacher."""

    def __init__(self, call: Call, student: StudentRows, values: Rows, ids: Rows, arrays: Arrays, sink: Sink | None) -> None:
        super().__init__(call, student, arrays, sink)
        assert isinstance(call.teacher, SparseForm)
        self.form, self._values, self._ids = call.teacher, values, ids

    def rows(self, start: int, stop: int, logits: Tensor, dz: Tensor | None) -> None:
        part = self.arrays.part(slice(start, stop))
        ids = self._ids.take(start, stop).to(torch.int64)
        values = self._values.take(start, stop).to(part.state.dtype)
        step, row_bytes = len(logits), logits.shape[1] * logits.element_size()
        if traits(logits.device).host_memory:
            step = max(1, _CACHE_BYTES // row_bytes)
        elif self.call.needs_ce and self.call.temperature != 1.0:  # the chunk plan does not count this buffer
            step = max(1, _SPARE_BYTES // row_bytes)
        for first in range(0, len(logits), max(step, 1)):
            r = slice(first, first + step)
            _Block(self, logits[r], *self.form.distinct(ids[r], values[r]), part.part(r), None if dz is None else dz[r]).run()


@dataclass
class _Block:
    """Some rows of a chunk."""

    work: Sparse
    logits: Tensor  # [C, V]
    ids: Tensor  # [C, K] int64
    values: Tensor  # [C, K] in the compute dtype
    arrays: Arrays  # state [>= 4, C]: the log-sum-exp at T in two parts, then the one at T = 1 if the cross-entropy needs it
    dz: Tensor | None

    def __post_init__(self) -> None:
        self.call, state = self.work.call, self.arrays.state
        self.factor = torch.ones_like(state[0]) if self.arrays.weight is None else self.arrays.weight
        self.labels = self.arrays.labels if self.call.needs_ce else None
        # At T = 1 the label is an extra id in the same kernel calls. At another temperature the cross-entropy needs separate calls.
        self.with_label = self.labels is not None and self.call.temperature == 1.0
        self.forward = self.arrays.stages & Stage.NORMALISERS | Stage.SUMS

    def run(self) -> None:
        """Compute loss, statistics and gradients of these rows."""
        call, form = self.call, self.work.form
        cross_entropy, label_dz = torch.full_like(self.factor, math.nan), None
        if self.labels is not None and not self.with_label:  # before the gradient overwrites the logits
            label_dz = torch.empty_like(self.dz) if self.dz is not None and call.ce_weight else None
            cross_entropy = self._cross_entropy(self.labels, label_dz)
        head = self._statistics()
        assert head.logprobs is not None
        targets = form.targets(self.ids, self.values)
        log_q = head.logprobs[:, : self.ids.shape[1]].masked_fill(self.ids < 0, -math.inf)
        slopes = form.slopes(call, log_q, targets)
        if self.with_label:
            cross_entropy = -head.logprobs[:, -1]
        self._store(slopes.value, cross_entropy, targets, head)
        if self.dz is not None:
            self._gradient(self.dz, slopes, log_q, head.logprobs[:, -1:])
            if label_dz is not None:
                self.dz.add_(label_dz)

    def _batch(self, **parts: object) -> HeadBatch:
        top, log_sum = self.arrays.state[:2]
        return HeadBatch(self.logits, self.work.student.bias, top, log_sum, **parts)  # type: ignore[arg-type]

    def _statistics(self) -> HeadBatch:
        """Compute log-probabilities at the ids and then at the label, and for statistics the entropy and the most likely token."""
        ids, factor = self.ids, self.factor
        if self.with_label and self.labels is not None:
            ids = torch.cat([ids, self.labels.unsqueeze(-1)], -1)
        head = self._batch(ids=ids, logprobs=factor.new_empty(ids.shape))
        if self.arrays.stats is not None:
            head.entropy = torch.empty_like(factor)
            head.top_ids, head.top_logprobs = ids.new_empty((len(ids), 1), dtype=torch.int32), factor.new_empty((len(ids), 1))
        self.work.backend.head_rows(self.call, head, self.forward)
        return head

    def _cross_entropy(self, labels: Tensor, dz: Tensor | None) -> Tensor:
        """Return the cross-entropy ``[C]`` at T = 1, and write its part of the gradient to ``dz``."""
        ids, state = labels.unsqueeze(-1).contiguous(), self.arrays.state
        logprobs = self.factor.new_empty(ids.shape)
        head = HeadBatch(self.logits, self.work.student.bias, state[2], state[3], ids=ids, logprobs=logprobs)
        if dz is not None:
            head.dz, head.dz_scale, head.d_logprobs = dz, self.work.dz_scale, (-self.call.ce_weight * self.factor).unsqueeze(-1)
        stages = self.forward if dz is None else self.forward | Stage.GRADIENT
        self.work.backend.head_rows(replace(self.call, temperature=1.0), head, stages)
        return -logprobs[:, 0]

    def _store(self, value: Tensor, cross_entropy: Tensor, targets: Targets, head: HeadBatch) -> None:
        """Write the loss and the statistics."""
        call, arrays = self.call, self.arrays
        if arrays.loss is not None:
            # 0 * inf would be NaN.
            total = call.value_scale * value if call.kd_weight else torch.zeros_like(value)
            arrays.loss.copy_((total + call.ce_weight * cross_entropy if call.ce_weight else total) * self.factor)
        if arrays.stats is not None and head.entropy is not None and head.top_ids is not None:
            most_likely = self.ids.gather(-1, targets.p.argmax(-1, keepdim=True))
            statistics = {
                "divergence": value,
                "cross_entropy": cross_entropy,
                "student_entropy": head.entropy,
                "teacher_entropy": -(torch.xlogy(targets.p, targets.p).sum(-1) + torch.xlogy(targets.rest, targets.rest)),
                "top1_agreement": (most_likely == head.top_ids).squeeze(-1),
            }
            for row, name in enumerate(STATS):
                arrays.stats[row] = statistics[name]

    def _gradient(self, dz: Tensor, slopes: Slopes, log_q: Tensor, log_label: Tensor) -> None:
        """Write the logit gradient of all columns as a multiple of q, then overwrite the columns at the ids and the label."""
        call = self.call
        ce_weight = call.ce_weight if self.with_label else 0.0
        if call.kd_weight:
            outside, inside = slopes.outside * call.value_scale + ce_weight, slopes.inside * call.value_scale
        else:
            outside, inside = torch.full_like(slopes.outside, ce_weight), torch.zeros_like(slopes.inside)
        everywhere = self._batch(d_lse=outside * self.factor, dz=dz, dz_scale=self.work.dz_scale)
        self.work.backend.head_rows(call, everywhere, Stage.GRADIENT)
        if self.with_label and self.labels is not None:
            label = self.labels.unsqueeze(-1)
            self._put(dz, label, log_label, outside.unsqueeze(-1) * log_label.exp() - ce_weight)
            inside = inside + ce_weight * (log_q.exp() - (self.ids == label).to(inside.dtype))
        self._put(dz, self.ids, log_q, inside)

    def _put(self, dz: Tensor, ids: Tensor, log_q: Tensor, slopes: Tensor) -> None:
        """Write ``T dD/dz`` at ids ``[C, K]`` to their columns of dz. Ids are distinct within a row; -1 writes nothing.

        The columns are overwritten: adding a correction to the multiple of q that the kernel wrote would lose digits to cancellation.
        """
        call, state = self.call, self.arrays.state
        values = slopes * (self.factor * (call.student.scale * call.inv_temperature * self.work.dz_scale)).unsqueeze(-1)
        if call.student.softcap is not None:
            z = (log_q + state[1].unsqueeze(-1)) * call.temperature + state[0].unsqueeze(-1)
            values = values * (1 - (z / call.student.softcap).square())
        # A padded id must not change the row: point it at a column that the row writes anyway, with the same value, or rewrite the value
        # already there.
        present = ids >= 0  # not padding
        first = present.to(torch.int8).argmax(-1, keepdim=True)  # slot of the row's first id
        column = ids.gather(-1, first).clamp(min=0)
        value = torch.where(present.gather(-1, first), values.gather(-1, first), dz.gather(-1, column).to(values.dtype))
        dz.scatter_(-1, torch.where(present, ids, column), torch.where(present, values, value).to(dz.dtype))
