"""Row kernels in plain torch: any device, any dtype. Rows go through in tiles small enough for the temporaries to stay in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..divergences import Divergence
from ..fused import philox
from ..fused.problem import Problem
from ..reference import row_mean, row_top, transform
from .rows import STATS, HeadBatch, RowBatch, Stage, Transform

# Elements of a tile. A CPU core's L2 holds a few temporaries of it; a GPU wants enough work for a launch.
_TILE = {"cpu": 1 << 18}
_TILE_DEFAULT = 1 << 22


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """None: torch runs wherever the tensors are."""
    return None


def rows(problem: Problem, batch: RowBatch, stages: Stage) -> None:
    """Runs a batch tile by tile."""
    for r in _tiles(batch.student):
        _tile(problem, batch, r, stages)


def head_rows(problem: Problem, batch: HeadBatch, stages: Stage) -> None:
    """Runs a batch of one side tile by tile."""
    for r in _tiles(batch.logits):
        _head_tile(problem, batch, r, stages)


def softmax_rows(x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """``softmax(x / T)`` or its logarithm."""
    function = torch.log_softmax if logarithm else torch.softmax
    for r in _tiles(x):
        wide = _widen(x[r])
        out[r] = function(wide if temperature == 1.0 else _over_temperature(wide, wide.amax(-1), 1.0 / temperature), -1)


def softmax_gradient_rows(y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """The gradient by x, from ``softmax_rows``' result and the gradient by it."""
    for r in _tiles(y):
        wide, upstream = _widen(y[r]), _widen(dy[r])
        if logarithm:
            gradient = upstream - wide.exp().mul_(upstream.sum(-1, keepdim=True))
        else:
            gradient = (upstream - (wide * upstream).sum(-1, keepdim=True)).mul_(wide)
        out[r] = gradient.div_(temperature)


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _tiles(logits: Tensor) -> Iterator[slice]:
    count, vocab = logits.shape
    rows = max(1, _TILE.get(logits.device.type, _TILE_DEFAULT) // vocab)
    return (slice(start, start + rows) for start in range(0, count, rows))


def _load(z: Tensor, bias: Tensor | None, t: Transform, dtype: torch.dtype) -> Tensor:
    """Logits of a tile in the compute dtype: a view of them if nothing had to be done."""
    z = z.to(dtype)
    if bias is not None:
        z = z + bias
    return z if t.identity else transform(z, t)


def _softmax(z: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two parts of the log-sum-exp ``[C]``, log-softmax and softmax ``[C, V]`` at T, with one exponential per element."""
    top = z.amax(-1)
    log_p = _over_temperature(z, top, inv_temperature)
    p = log_p.exp()
    total = p.sum(-1, keepdim=True)
    rest = total.log()
    return top, rest.squeeze(-1), log_p.sub_(rest), p.div_(total)


def _normalize(z: Tensor, other: Tensor, div: Divergence, inv_temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normaliser's two parts ``[C]``, and a divergence's argument ``[C, V]`` with its exponential (if that means anything to it)."""
    if div.normalizer == "softmax":
        return _softmax(z, inv_temperature)
    zeros = z.new_zeros(z.shape[0])
    top = zeros if div.normalizer == "none" else row_mean(z, other).squeeze(-1)
    argument = _shifted(z, top, zeros, inv_temperature)
    return top, zeros, argument, argument


def _shifted(z: Tensor, top: Tensor, rest: Tensor, inv_temperature: float) -> Tensor:
    """``(z - top) / T - rest``, the normaliser's two parts ``[C]``: see STATE."""
    return _over_temperature(z, top, inv_temperature).sub_(rest.unsqueeze(-1))


def _over_temperature(z: Tensor, top: Tensor, inv_temperature: float) -> Tensor:
    """``(z - top) / T``, top ``[C]``."""
    difference = z - top.unsqueeze(-1)
    return difference if inv_temperature == 1.0 else difference.mul_(inv_temperature)


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    return -(log_p * p).masked_fill_(p == 0, 0.0).sum(-1)


def _tile(problem: Problem, batch: RowBatch, r: slice, stages: Stage) -> None:
    statistics = Stage.NORMALISERS in stages
    dtype, div = problem.compute_dtype, problem.divergence
    zs = _load(batch.student[r], batch.student_bias, problem.student, dtype)
    zt = _load(batch.teacher[r], batch.teacher_bias, problem.teacher, dtype)
    inv_t = problem.inv_temperature
    top_s, rest_s, top_t, rest_t, slope_sum, top_ce, rest_ce = batch.state[:, r]
    softmax = div.normalizer == "softmax"
    if statistics:
        (top_s[:], rest_s[:], log_q, q), (top_t[:], rest_t[:], log_p, p) = (
            _normalize(zs, zt, div, inv_t),
            _normalize(zt, zs, div, inv_t),
        )
    else:
        log_q, log_p = _shifted(zs, top_s, rest_s, inv_t), _shifted(zt, top_t, rest_t, inv_t)
        q, p = log_q.exp(), log_p.exp()
    value, slope = div.terms(log_q, log_p, q, p)
    log_one = None
    if problem.needs_ce:
        if statistics:
            shared = softmax and problem.temperature == 1.0
            top_ce[:], rest_ce[:] = (top_s, rest_s) if shared else _softmax(zs, 1.0)[:2]
        log_one = _shifted(zs, top_ce, rest_ce, 1.0)
    # Of these very slopes, in backward too: those of the forward pass are rounded otherwise, and a slope may jump in between.
    total = slope.sum(-1) if div.slope_sum is None else torch.full_like(top_s, div.slope_sum)

    if statistics:
        slope_sum[:] = total
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
                (_, _, log_q, q), (_, _, log_p, p) = _softmax(zs, inv_t), _softmax(zt, inv_t)
            values = {
                "divergence": divergence,
                "cross_entropy": ce,
                "student_entropy": _entropy(log_q, q),
                "teacher_entropy": _entropy(log_p, p),
                "top1_agreement": zs.argmax(-1) == zt.argmax(-1),
            }
            for at, name in enumerate(STATS):
                batch.stats[at, r] = values[name]

    if batch.dz is not None and Stage.GRADIENT in stages:
        if not problem.kd_weight:  # 0 times an infinite slope would be NaN
            dz = torch.zeros_like(slope)
        elif softmax:
            # slope may be a view of p; q is this tile's own.
            dz = slope.sub_(q.mul_(total.unsqueeze(-1))).mul_(problem.slope_scale)
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


def _head_tile(problem: Problem, batch: HeadBatch, r: slice, stages: Stage) -> None:
    statistics = Stage.NORMALISERS in stages
    dtype = problem.compute_dtype
    z = _load(batch.logits[r], batch.bias, problem.student, dtype)
    if statistics:
        batch.top[r], batch.log_sum[r], log_q, q = _softmax(z, problem.inv_temperature)
        if batch.entropy is not None:
            batch.entropy[r] = _entropy(log_q, q)
    else:
        log_q = _shifted(z, batch.top[r], batch.log_sum[r], problem.inv_temperature)
        q = log_q.exp()
    none = ids = None
    if batch.ids is not None and batch.logprobs is not None:
        none = batch.ids[r] < 0
        ids = batch.ids[r].clamp(min=0)
        batch.logprobs[r] = log_q.gather(-1, ids).masked_fill_(none, 0.0)
    if batch.top_ids is not None and batch.top_logprobs is not None:
        top = largest(z, batch.top_ids.shape[1])
        batch.top_ids[r], batch.top_logprobs[r] = top, log_q.gather(-1, top)
    if batch.draws is not None and batch.seed is not None:
        # From the logits as they are stored, in double: see philox.draw.
        bias = None if batch.bias is None else batch.bias.double()
        exact = _load(batch.logits[r], bias, problem.student, torch.float64)
        exact = (exact - row_top(exact)).mul_(problem.inv_temperature)
        ids_drawn = philox.draw(exact, batch.seed, batch.first_row + r.start, batch.draws.shape[1])
        batch.draws[r] = ids_drawn.masked_fill_(~torch.isfinite(batch.log_sum[r]).unsqueeze(-1), -1)
    if batch.dz is None or Stage.GRADIENT not in stages:
        return

    constant = torch.zeros_like(batch.top[r]) if batch.d_lse is None else batch.d_lse[r]
    d_ids = None
    if batch.d_logprobs is not None and none is not None:
        d_ids = batch.d_logprobs[r].masked_fill(none, 0.0)
        constant = constant - d_ids.sum(-1)
    if batch.d_entropy is not None and batch.entropy is not None:
        slope = batch.d_entropy[r].unsqueeze(-1)
        constant = constant.unsqueeze(-1) - slope * batch.entropy[r].unsqueeze(-1)
        dz = (constant - slope * log_q).mul_(q).masked_fill_(q == 0, 0.0)
    else:
        dz = q.mul_(constant.unsqueeze(-1))
    if d_ids is not None and ids is not None:
        # Accumulating index_put_ adds in a fixed order where ids repeat, unlike scatter_add_ on a GPU.
        dz.index_put_((torch.arange(len(ids), device=ids.device).unsqueeze(-1).expand_as(ids), ids), d_ids, accumulate=True)
    dz.mul_(problem.student.scale * problem.inv_temperature * batch.dz_scale)
    if problem.student.softcap is not None:
        dz.mul_(1 - (z / problem.student.softcap).square_())
    batch.dz[r].copy_(dz)


def largest(z: Tensor, k: int) -> Tensor:
    """``[C, k]`` int64: columns of the k largest of each row, falling; among equals the first ones. NaN counts as -inf."""
    z = z.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if z.dtype == torch.float64:
        return z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # topk says nothing of ties: so let there be none. A float32's bits, as an integer, order like it once negative ones are turned
    # round; below them goes the column, rising ones first.
    bits = (z + 0.0).view(torch.int32).to(torch.int64)  # -0.0 + 0.0 = 0.0
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    columns = torch.arange(z.shape[1], device=z.device)
    return ((ordered << 32) + (0x7FFFFFFF - columns)).topk(k, sorted=True).values.bitwise_and_(0xFFFFFFFF).neg_().add_(0x7FFFFFFF)
