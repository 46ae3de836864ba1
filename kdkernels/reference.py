"""Dense reference of every quantity in plain torch, with gradients by autograd. The tests compare all kernels with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .backends.rows import STATS, Transform
from .divergences import Divergence
from .fused import philox
from .fused.call import Call, Tensors


def run(call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
    """Compute the quantity of a call. The results match those of the ops.

    Returns (loss, number of valid tokens, statistics ``[5, ...]`` if the call returns them) for a loss, (ids, log-probabilities) for top-k
    tokens, and one tensor for other quantities.
    """
    return _QUANTITIES.get(call.quantity, _values)(call, tensors)


def transform(z: Tensor, t: Transform) -> Tensor:
    """Return ``z * scale``, then ``softcap * tanh(z / softcap)``."""
    if t.scale != 1.0:
        z = z * t.scale
    return z if t.softcap is None else t.softcap * torch.tanh(z / t.softcap)


def normalize(x: Tensor, other: Tensor, divergence: Divergence) -> Tensor:
    """Return the argument of a divergence's formula: logits ``[..., V]`` over T, minus the row's normaliser."""
    if divergence.normalizer == "softmax":
        return torch.log_softmax(x, dim=-1)
    return x - row_mean(x, other) if divergence.normalizer == "mean" else x


def row_mean(x: Tensor, other: Tensor) -> Tensor:
    """Return the mean of each row ``[..., 1]`` over the columns that are not -inf on both sides."""
    skipped = (x == -math.inf) & (other == -math.inf)
    values = torch.where(skipped, torch.zeros_like(x), x)
    return values.sum(-1, keepdim=True) / (~skipped).sum(-1, keepdim=True).clamp(min=1)


def over_temperature(z: Tensor, call: Call) -> Tensor:
    """Return ``(z - max(z)) / T``, ``[..., V]``. Softmax is the same, and for small T, z / T alone would be rounded too coarsely."""
    return (z - row_top(z)) * call.inv_temperature


def row_top(z: Tensor) -> Tensor:
    """Return the largest logit of each row ``[..., 1]``, detached; 0 for rows where it is not finite."""
    top = z.detach().amax(-1, keepdim=True)
    return torch.where(torch.isfinite(top), top, torch.zeros_like(top))


def zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return rows ``[..., D]`` with invalid rows zeroed, so that a NaN there does not reach any result."""
    return x if valid is None else torch.where(valid.unsqueeze(-1), x, torch.zeros((), dtype=x.dtype, device=x.device))


def entropy_of(log_p: Tensor) -> Tensor:
    """Return the entropy ``[...]`` in nats of log-probabilities ``[..., V]``."""
    p = log_p.exp()
    return -torch.where(p == 0, torch.zeros_like(p), p * log_p).sum(-1)


def dense_divergence(call: Call, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the divergence ``[...]`` between logits ``[..., V]`` of two sides."""
    div = call.divergence
    if div.normalizer == "softmax":
        x, u = over_temperature(student, call), over_temperature(teacher, call)
    else:
        x, u = student * call.inv_temperature, teacher * call.inv_temperature
    return div.reference_value(normalize(x, u, div), normalize(u, x, div))


class Outcomes(NamedTuple):
    """Student and teacher at the ids of a sparse teacher, ``[..., K]``."""

    x: Tensor  # [..., V]: the student's logits over T
    ids: Tensor  # int64, 0 for padding
    named: Tensor  # False for padding and in ignored rows
    log_q: Tensor  # the student's log-probabilities, -inf for padding
    values: Tensor  # the teacher's log-probabilities or counts


def named_outcomes(call: Call, ids: Tensor, values: Tensor, padding: float, z: Tensor, valid: Tensor | None) -> Outcomes:
    """Return student and teacher at the ids ``[..., K]`` of a sparse teacher. The values of padded ids become ``padding``."""
    x = over_temperature(z, call)
    log_q = torch.log_softmax(x, -1)
    named = ids >= 0 if valid is None else (ids >= 0) & valid.unsqueeze(-1)
    at = torch.where(named, ids.long(), torch.zeros((), dtype=torch.int64, device=ids.device))
    values = torch.where(named, values.to(log_q.dtype), torch.full((), padding, dtype=log_q.dtype))
    log_q = log_q.gather(-1, at)
    return Outcomes(x, at, named, torch.where(named, log_q, torch.full_like(log_q, -math.inf)), values)


def log_rest(outcomes: Outcomes, floor: float) -> Tensor:
    """Return the student's log-probability of all other tokens together ``[..., 1]``, at least log(floor).

    Gradients flow even where the clamp applies: the gradient of the log-sum-exp over the other tokens is q_v / rest, computed with the
    clamped rest.
    """
    x, ids, named = outcomes.x, outcomes.ids, outcomes.named
    at_ids = torch.zeros(x.shape, dtype=torch.int32, device=x.device).scatter_add(-1, ids, named.to(torch.int32)) > 0
    others = torch.where(at_ids.all(-1, keepdim=True), torch.zeros_like(x), x.masked_fill(at_ids, -math.inf)).logsumexp(-1, keepdim=True)
    all_tokens = x.logsumexp(-1, keepdim=True)
    log_rest = (others - all_tokens).detach()
    clamped = torch.where(at_ids.all(-1, keepdim=True), math.log(floor), log_rest.clamp(min=math.log(floor)))
    share = torch.where(at_ids.all(-1, keepdim=True), 0.0, (log_rest - clamped).exp())
    return clamped + share * (others - others.detach()) - (all_tokens - all_tokens.detach())


def _student_logits(call: Call, tensors: Tensors, valid: Tensor | None) -> Tensor:
    return call.student.reference_logits(call, tensors.of("student"), valid)


def _distillation(call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
    """Return the loss, the number of valid tokens, and the statistics if the call returns them."""
    labels = tensors.get("labels")
    valid = None if labels is None else labels != call.ignore_index
    z = _student_logits(call, tensors, valid)
    divergence, teacher_entropy, most_likely = call.teacher.reference(call, tensors.of("teacher"), z, valid)
    # With kd_weight = 0, value and gradient must be 0; 0 * inf would be NaN.
    loss = call.value_scale * divergence if call.kd_weight else z.masked_fill(torch.ones_like(z, dtype=torch.bool), 0.0).sum(-1)
    cross_entropy = torch.full_like(divergence, math.nan)
    if labels is not None:
        target = labels.masked_fill(labels == call.ignore_index, 0).unsqueeze(-1)
        cross_entropy = -torch.log_softmax(z, -1).gather(-1, target).squeeze(-1)
        if call.ce_weight:
            loss = loss + call.ce_weight * cross_entropy
    results = _reduced(call, tensors, loss, valid)
    if not call.return_stats:
        return results
    values = {
        "divergence": divergence,
        "cross_entropy": cross_entropy,
        "student_entropy": entropy_of(torch.log_softmax(over_temperature(z, call), -1)),
        "teacher_entropy": teacher_entropy,
        "top1_agreement": (z.argmax(-1, keepdim=True) == most_likely).squeeze(-1),
    }
    stats = torch.stack([values[name].detach().to(torch.float32) for name in STATS])
    return *results, stats if valid is None else torch.where(valid, stats, torch.zeros_like(stats))


def _reduced(call: Call, tensors: Tensors, loss: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight the losses ``[...]``, sum them unless they are per token, and count the valid tokens."""
    weights = tensors.get("token_weights")
    if weights is not None:
        loss = loss * (weights.to(loss.dtype) if valid is None else torch.where(valid, weights.to(loss.dtype), 0.0))
    if valid is None:
        count = torch.full((), loss.numel(), dtype=torch.int64, device=loss.device)
    else:
        loss, count = torch.where(valid, loss, torch.zeros_like(loss)), valid.sum()
    return loss if call.per_token else loss.sum(), count


def _values(call: Call, tensors: Tensors) -> tuple[Tensor, ...]:
    """Return a quantity of one side per token, ``[...]`` or ``[..., K]``; 0 at ids of -1."""
    ids, several = tensors.get("labels"), tensors.ids_per_row is not None
    index = None if ids is None else ids.long() if several else ids.long().unsqueeze(-1)
    padding = None if index is None else index == call.ignore_index
    valid = None if padding is None else ~padding.all(-1)
    z = _student_logits(call, tensors, valid)
    x = over_temperature(z, call)
    log_q = torch.log_softmax(x, -1)
    if call.quantity == "logsumexp":
        values = torch.logsumexp(x, -1) + (row_top(z) * call.inv_temperature).squeeze(-1)
    elif call.quantity == "entropy":
        values = entropy_of(log_q)
    else:
        assert index is not None
        assert padding is not None
        chosen = log_q.gather(-1, torch.where(padding, torch.zeros_like(index), index))
        values = torch.where(padding, torch.zeros_like(chosen), chosen)
        values = values if several else values.squeeze(-1)
    if call.quantity == "cross_entropy":
        return _reduced(call, tensors, -values, valid)
    return (values,)


def _topk(call: Call, tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Return ids ``[..., k]`` and log-probabilities in falling order, ties by rising id, NaN as -inf."""
    z = _student_logits(call, tensors, None).detach()
    order = torch.where(torch.isnan(z), torch.full_like(z, -math.inf), z).sort(dim=-1, descending=True, stable=True).indices
    order = order[..., : call.count]
    return order.to(torch.int32), torch.log_softmax(over_temperature(z, call), -1).gather(-1, order)


def _sample(call: Call, tensors: Tensors) -> tuple[Tensor]:
    """Return drawn ids ``[..., num_samples]``; -1 in rows whose log-sum-exp is not finite."""
    z = _student_logits(call, tensors, None).detach().to(torch.float64)
    x = over_temperature(z, call).flatten(0, -2)
    ids = philox.draw(x, tensors["seed"], 0, call.count)
    ids = torch.where(torch.isfinite(torch.logsumexp(x, -1, keepdim=True)), ids, torch.full_like(ids, -1))
    return (ids.to(torch.int32).view(*z.shape[:-1], call.count),)


def _softmax(call: Call, tensors: Tensors) -> tuple[Tensor]:
    """Return ``softmax(logits / T)`` or its logarithm, in the dtype of the logits."""
    logits = tensors.student
    x = over_temperature(logits.to(torch.promote_types(logits.dtype, torch.float32)), call)
    return ((torch.log_softmax(x, -1) if call.quantity == "log_softmax" else torch.softmax(x, -1)).to(logits.dtype),)


_QUANTITIES: dict[str, Callable[[Call, Tensors], tuple[Tensor, ...]]] = {
    "distillation": _distillation, "topk": _topk, "sample": _sample, "softmax": _softmax, "log_softmax": _softmax,
}  # fmt: skip
