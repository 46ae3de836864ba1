"""Quantities of one side: row processing, ``topk`` and ``sample``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import selection
from ..backends.rows import FORWARD, HeadBatch, Stage
from . import chunking, pages
from .call import Call, Tensors
from .chunking import Chunks
from .work import Rows, Selected, Work, plan


class OneSided(Work):
    """Rows of the student alone. ``arrays.loss`` receives the call's quantity, times the token weights if it is a loss.

    With ``Stage.NORMALISERS``, ``arrays.weight`` holds token weights and the gradient is for upstream gradients of 1. Otherwise
    ``arrays.weight`` holds the upstream gradients.
    """

    def rows(self, start: int, stop: int, logits: Tensor, dz: Tensor | None) -> None:
        call, part = self.call, self.arrays.part(slice(start, stop))
        batch = HeadBatch(logits, self.student.bias, top=part.state[0], log_sum=part.state[1], dz=dz, dz_scale=self.dz_scale)
        slope = torch.ones_like(batch.top) if part.weight is None else part.weight
        if part.labels is not None:
            several = part.labels.dim() == 2  # ids per row
            batch.ids = part.labels if several else part.labels.unsqueeze(-1)
            batch.logprobs = torch.empty(batch.ids.shape, dtype=part.state.dtype, device=part.state.device)
            if call.quantity == "cross_entropy":
                batch.d_logprobs = -slope.unsqueeze(-1)
            elif several and Stage.NORMALISERS in part.stages:  # dz = q f, from which ``HeadSink`` computes m: see ``from_ids``
                batch.d_lse = slope
            else:
                batch.d_logprobs = slope.view_as(batch.ids)
        elif call.quantity == "entropy":
            batch.entropy, batch.d_entropy = part.state[2], slope
        else:
            batch.d_lse = slope
        self.backend.head_rows(call, batch, part.stages)
        if part.loss is not None:
            part.loss.copy_(self._values(batch, part.loss, part.weight))

    def _values(self, batch: HeadBatch, like: Tensor, weight: Tensor | None) -> Tensor:
        """Return the quantity of the rows, in the shape of ``like``."""
        if batch.logprobs is not None:
            values = batch.logprobs.view_as(like)
            if self.call.quantity == "cross_entropy":
                values = -values if weight is None else -values * weight
            return values
        return batch.top * self.call.inv_temperature + batch.log_sum if batch.entropy is None else batch.entropy


def from_ids(call: Call, tensors: Tensors, selected: Selected) -> Tensor:
    """Return the hidden gradient of log-probabilities ``[..., K]``: ``sum_k g_k f_k W[id_k] - (sum_k g_k) m``; empty if not needed.

    g is the upstream gradient, f the derivative of ``logits / T`` by ``hidden @ W.T``, and ``m = (q f) @ W`` the student's gradient saved
    by forward. The saved state is ``[2 + K, N]``: log-sum-exps in two parts, then log-probabilities.
    """
    student, num_ids, transform = tensors.student, tensors.ids_per_row, call.student
    out = pages.recycled(student.new_empty(student.shape if call.wants_input else (0,)))
    if not call.wants_input:
        return out
    if selected.index is not None:
        out.zero_()
    dtype, state, count = call.compute_dtype, tensors["saved.state"], selected.count
    ids, g = selected.take(tensors["labels"], torch.int64, num_ids), selected.take(tensors["upstream"], dtype, num_ids)
    assert ids is not None
    assert g is not None
    g = g.masked_fill(ids < 0, 0.0)
    factor = g * (transform.scale * call.inv_temperature)
    if transform.softcap is not None:
        z = ((state[2:, :count] + state[1, :count]) * call.temperature + state[0, :count]).t()
        factor = factor * (1 - (z / transform.softcap).square())
    source, target = Rows(tensors["saved.d_student"], selected.index), Rows(out, selected.index)
    total = g.sum(-1, keepdim=True)
    weight = tensors["student.weight"][: call.vocab]
    block = max(1, chunking.DEFAULT_BUDGET // 16 // (weight.shape[1] * dtype.itemsize or 1))
    for start, stop in Chunks(count, block):
        part = source.take(start, stop) * -total[start:stop]
        for k in range(ids.shape[1]):
            # Under autocast the forward product used the head rounded to this dtype.
            chosen = weight[ids[start:stop, k].clamp(min=0)].to(transform.dtype).to(dtype)
            part.addcmul_(chosen, factor[start:stop, k : k + 1])
        target.put(start, stop, part)
    return out


def _chunks(call: Call, tensors: Tensors) -> Iterator[tuple[slice, HeadBatch]]:
    """Yield all rows of one side chunk by chunk, with buffers for their log-sum-exps."""
    side, device = call.student.student_rows(call, tensors.of("student"), None), tensors.student.device
    chunks = plan(call, tensors.num_rows, side.bytes_per_row, device)
    side.allocate(min(chunks.rows, tensors.num_rows), "student logits")
    for start, stop in chunks:
        state = torch.empty(2, stop - start, dtype=call.compute_dtype, device=device)
        yield slice(start, stop), HeadBatch(side.logits(start, stop), side.bias, state[0], state[1])


def empty_topk(call: Call, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return uninitialised results for ``topk``."""
    new, shape = tensors.student.new_empty, (*tensors.leading, call.count)
    return new(shape, dtype=torch.int32), new(shape, dtype=call.compute_dtype)


def topk(call: Call, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return the ids ``[..., k]`` int32 of the most likely tokens and their log-probabilities, in falling order."""
    ids, logprobs = empty_topk(call, tensors)
    backend = selection.load(call.backend)
    for r, batch in _chunks(call, tensors):
        batch.top_ids, batch.top_logprobs = ids.view(-1, call.count)[r], logprobs.view(-1, call.count)[r]
        backend.head_rows(call, batch, FORWARD)
    return ids, logprobs


def empty_sample(call: Call, tensors: Tensors) -> Tensor:
    """Return an uninitialised result for ``sample``."""
    return tensors.student.new_empty((*tensors.leading, call.count), dtype=torch.int32)


def sample(call: Call, tensors: Tensors) -> Tensor:
    """Return drawn ids ``[..., num_samples]`` int32; -1 in rows whose log-sum-exp is not finite."""
    ids = empty_sample(call, tensors)
    backend = selection.load(call.backend)
    for r, batch in _chunks(call, tensors):
        batch.draws, batch.seed, batch.first_row = ids.view(-1, call.count)[r], tensors["seed"], r.start
        backend.head_rows(call, batch, FORWARD)
    return ids
