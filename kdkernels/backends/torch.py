"""Row kernels in plain torch: any device, any dtype. Rows go through in tiles small enough for the temporaries to stay in cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..divergences import Divergence
from ..problem import STATS, Problem, RowBatch, Transform
from ..reference import normalize, transform

# Elements of a tile. A CPU core's L2 holds a few temporaries of it; a GPU wants enough work for a launch.
_TILE = {"cpu": 1 << 18}
_TILE_DEFAULT = 1 << 22


def unavailable(device_type: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """None: torch runs wherever the tensors are."""
    return None


def rows(problem: Problem, batch: RowBatch, statistics: bool) -> None:
    """Runs a batch tile by tile."""
    count, vocab = batch.student.shape
    tile = max(1, _TILE.get(batch.student.device.type, _TILE_DEFAULT) // vocab)
    for start in range(0, count, tile):
        _tile(problem, batch, slice(start, start + tile), statistics)


def _load(z: Tensor, bias: Tensor | None, t: Transform, dtype: torch.dtype) -> Tensor:
    """Logits of a tile in the compute dtype: a view of them if nothing had to be done."""
    z = z.to(dtype)
    if bias is not None:
        z = z + bias
    return z if t.identity else transform(z, t)


def _softmax(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp ``[C]``, log-softmax and softmax ``[C, V]``, with one exponential per element."""
    top = x.amax(-1, keepdim=True)
    p = (x - top).exp_()
    total = p.sum(-1, keepdim=True)
    lse = top + total.log()
    return lse.squeeze(-1), x - lse, p.div_(total)


def _normalize(x: Tensor, other: Tensor, div: Divergence) -> tuple[Tensor, Tensor, Tensor]:
    """The normaliser ``[C]``, and a divergence's argument ``[C, V]`` with its exponential (if that means anything to it)."""
    if div.normalizer == "softmax":
        return _softmax(x)
    if div.normalizer == "none":
        return x.new_zeros(x.shape[0]), x, x
    centered = normalize(x, other, div)
    top = x.argmax(-1, keepdim=True)
    return (x.gather(-1, top) - centered.gather(-1, top)).squeeze(-1), centered, centered


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    return -(log_p * p).masked_fill_(p == 0, 0.0).sum(-1)


def _tile(problem: Problem, batch: RowBatch, r: slice, statistics: bool) -> None:
    dtype, div = problem.compute_dtype, problem.divergence
    zs = _load(batch.student[r], batch.student_bias, problem.student, dtype)
    zt = _load(batch.teacher[r], batch.teacher_bias, problem.teacher, dtype)
    x, u = (zs, zt) if problem.temperature == 1.0 else (zs / problem.temperature, zt / problem.temperature)
    state = batch.state[:, r]
    softmax = div.normalizer == "softmax"
    if statistics:
        (state[0], log_q, q), (state[1], log_p, p) = _normalize(x, u, div), _normalize(u, x, div)
    else:
        log_q, log_p = x - state[0].unsqueeze(-1), u - state[1].unsqueeze(-1)
        q, p = log_q.exp(), log_p.exp()
    value, slope = div.terms(log_q, log_p, q, p)
    log_one = None
    if problem.needs_ce:
        if statistics:
            shared = softmax and problem.temperature == 1.0
            state[3] = state[0] if shared else torch.logsumexp(zs, -1)
        log_one = zs - state[3].unsqueeze(-1)

    if statistics:
        state[2] = slope.sum(-1) if div.slope_sum is None else div.slope_sum
        divergence = value.sum(-1)
        loss = problem.value_scale * divergence if problem.kd_weight else torch.zeros_like(divergence)
        ce = torch.full_like(divergence, math.nan)
        if log_one is not None and batch.labels is not None:
            ce = -log_one.gather(-1, batch.labels[r].unsqueeze(-1)).squeeze(-1)
            if problem.ce_weight:
                loss = loss + problem.ce_weight * ce
        if batch.loss is not None:
            batch.loss[r] = loss if batch.weight is None else loss * batch.weight[r]
        if batch.stats is not None:
            if not softmax:
                (_, log_q, q), (_, log_p, p) = _softmax(x), _softmax(u)
            values = {
                "divergence": divergence,
                "cross_entropy": ce,
                "student_entropy": _entropy(log_q, q),
                "teacher_entropy": _entropy(log_p, p),
                "top1_agreement": zs.argmax(-1) == zt.argmax(-1),
            }
            for at, name in enumerate(STATS):
                batch.stats[at, r] = values[name]

    if batch.dz is not None:
        if not problem.kd_weight:  # 0 times an infinite slope would be NaN
            dz = torch.zeros_like(slope)
        elif softmax:
            # slope may be a view of p; q is this tile's own.
            dz = slope.sub_(q.mul_(state[2].unsqueeze(-1))).mul_(problem.slope_scale)
        else:
            dz = slope.mul_(problem.slope_scale)
        if problem.ce_weight and log_one is not None and batch.labels is not None:
            dz.add_(log_one.exp(), alpha=problem.ce_weight)
            hit = torch.full((dz.shape[0], 1), -problem.ce_weight, dtype=dtype, device=dz.device)
            dz.scatter_add_(-1, batch.labels[r].unsqueeze(-1), hit)
        if problem.student.scale != 1.0:
            dz.mul_(problem.student.scale)
        if problem.student.softcap is not None:
            dz.mul_(1 - (zs / problem.student.softcap).square_())
        if batch.weight is not None:
            dz.mul_(batch.weight[r].unsqueeze(-1))
        if batch.dz_scale != 1.0:
            dz.mul_(batch.dz_scale)
        batch.dz[r].copy_(dz)
