"""Quantities of one side alone: what the rows of a chunk are asked for, and the primitives that have no gradient or no head."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from ..backends import selection
from ..backends.rows import FORWARD, HeadBatch, Stage
from . import chunking, pages
from .chunking import Chunks
from .problem import Problem
from .sources import Inputs, Rows, both_sides, check_and_select, plan, select


def from_ids(problem: Problem, inputs: Inputs, state: Tensor, means: Tensor, upstream: Tensor) -> Tensor:
    """``sum_k g_k f_k W[id_k] - (sum_k g_k) m``: the hidden gradient of ``[..., K]`` log-probabilities, empty if not wanted.

    Args:
        state: ``[2 + K, N]``: log-sum-exps in two parts, log-probabilities; means: ``[..., D]``, both as the forward pass left them.
        upstream: ``[..., K]``
    """
    many = inputs.ids_per_row
    assert many is not None
    assert inputs.student_weight is not None
    out = pages.recycled(inputs.student.new_empty(inputs.student.shape if problem.wants_input else (0,)))
    if not problem.wants_input:
        return out
    index, count = check_and_select(problem, inputs, check=False)
    if index is not None:
        out.zero_()
    dtype, t = problem.compute_dtype, problem.student
    ids, g = select(inputs.labels, index, torch.int64, many), select(upstream, index, dtype, many)
    assert ids is not None
    assert g is not None
    g = g.masked_fill(ids < 0, 0.0)
    factor = g * (t.scale * problem.inv_temperature)
    if t.softcap is not None:
        z = ((state[2:, :count] + state[1, :count]) * problem.temperature + state[0, :count]).t()
        factor = factor * (1 - (z / t.softcap).square())
    source, target = Rows(means, index), Rows(out, index)
    total = g.sum(-1, keepdim=True)
    weight = inputs.student_weight[: problem.vocab]
    block = max(1, chunking.DEFAULT_BUDGET // 16 // (weight.shape[1] * dtype.itemsize or 1))
    for start, stop in Chunks(count, block):
        part = source.take(start, stop) * -total[start:stop]
        for k in range(many):
            # Rounded as the head was for its product, under autocast.
            chosen = weight[ids[start:stop, k].clamp(min=0)].to(problem.student_dtype).to(dtype)
            part.addcmul_(chosen, factor[start:stop, k : k + 1])
        target.put(start, stop, part)
    return out


def rows(
    backend: ModuleType,
    problem: Problem,
    logits: Tensor,
    bias: Tensor | None,
    stages: Stage,
    *,
    weight: Tensor | None,
    loss: Tensor | None,
    labels: Tensor | None,
    state: Tensor,
    dz: Tensor | None,
    dz_scale: float,
) -> None:
    """The rows of one chunk of one side, for the quantity that is asked for; ``loss`` is that quantity, times any weights if a loss.

    With ``Stage.NORMALISERS`` a weight is a token's and the gradient is left for unit upstream gradients; else it is the upstream gradient.
    """
    batch = HeadBatch(logits, bias, top=state[0], log_sum=state[1], dz=dz, dz_scale=dz_scale)
    slope = torch.ones_like(batch.top) if weight is None else weight
    if labels is not None:
        many = labels.dim() == 2
        batch.ids = labels if many else labels.unsqueeze(-1)
        batch.logprobs = torch.empty(batch.ids.shape, dtype=state.dtype, device=state.device)
        if problem.quantity == "cross_entropy":
            batch.d_logprobs = -slope.unsqueeze(-1)
        elif many and Stage.NORMALISERS in stages:  # m, see the top of the file
            batch.d_lse = slope
        else:
            batch.d_logprobs = slope.view_as(batch.ids)
    elif problem.quantity == "entropy":
        batch.entropy, batch.d_entropy = state[2], slope
    else:
        batch.d_lse = slope
    backend.head_rows(problem, batch, stages)
    if loss is None:
        return
    if batch.logprobs is not None:
        values = batch.logprobs.view_as(loss)
        if problem.quantity == "cross_entropy":
            values = -values if weight is None else -values * weight
    else:
        values = batch.top * problem.inv_temperature + batch.log_sum if batch.entropy is None else batch.entropy
    loss.copy_(values)


def _head_chunks(problem: Problem, inputs: Inputs) -> Iterator[tuple[slice, HeadBatch]]:
    """All rows of one side, chunk by chunk, with room for their log-sum-exps."""
    side, _ = both_sides(problem, inputs, None)
    count = inputs.student.numel() // inputs.student.shape[-1] if inputs.student.shape[-1] else 0
    chunks = plan(problem, count, side.bytes_per_row, inputs.student.device)
    side.allocate(min(chunks.rows, count), "student logits")
    for start, stop in chunks:
        state = torch.empty(2, stop - start, dtype=problem.compute_dtype, device=inputs.student.device)
        yield slice(start, stop), HeadBatch(side.logits(start, stop), side.bias, state[0], state[1])


def topk(problem: Problem, inputs: Inputs, k: int) -> tuple[Tensor, Tensor]:
    """Ids ``[..., k]`` int32 and their log-probabilities, the most likely first."""
    shape = (*inputs.student.shape[:-1], k)
    ids = inputs.student.new_empty(shape, dtype=torch.int32)
    logprobs = inputs.student.new_empty(shape, dtype=problem.compute_dtype)
    backend = selection.load(problem.backend)
    for r, batch in _head_chunks(problem, inputs):
        batch.top_ids, batch.top_logprobs = ids.view(-1, k)[r], logprobs.view(-1, k)[r]
        backend.head_rows(problem, batch, FORWARD)
    return ids, logprobs


def sample(problem: Problem, inputs: Inputs, seed: Tensor, num_samples: int) -> Tensor:
    """Ids ``[..., num_samples]`` int32; -1 in rows without a finite log-sum-exp."""
    ids = inputs.student.new_empty((*inputs.student.shape[:-1], num_samples), dtype=torch.int32)
    backend = selection.load(problem.backend)
    for r, batch in _head_chunks(problem, inputs):
        batch.draws, batch.seed, batch.first_row = ids.view(-1, num_samples)[r], seed, r.start
        backend.head_rows(problem, batch, FORWARD)
    return ids


def softmax(
    x: Tensor,
    dy: Tensor | None,
    out: Tensor,
    temperature: float,
    logarithm: bool,
    memory_budget: int | None,
    chunk_rows: int | None,
    backend: str,
) -> None:
    """``softmax(x / T)`` or its logarithm into ``out``; with ``dy`` x is that result, and the gradient by the logits goes there.

    All ``[..., V]``; ``out`` has unit stride in its last dimension and one stride between its rows, and may be x or dy. Inputs
    that don't are copied chunk by chunk.
    """
    if not out.numel():
        return
    vocab = x.shape[-1]
    sources = [Rows(t, None) for t in (x, dy) if t is not None]
    copied = sum(not s.sliceable for s in sources) * vocab * x.element_size()
    target = out.view(-1, vocab)
    module = selection.load(backend)
    for start, stop in chunking.plan_chunks(len(target), copied, memory_budget, chunk_rows):
        chunks = [s.take(start, stop) for s in sources]
        if dy is None:
            module.softmax_rows(*chunks, target[start:stop], temperature, logarithm)
        else:
            module.softmax_gradient_rows(*chunks, target[start:stop], temperature, logarithm)
