"""The backend "torch": row kernels in plain torch for any device and dtype. Rows are processed in tiles whose temporaries fit in cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..fused import philox
from ..fused.call import Call
from ..reference import row_mean, row_top, transform
from .rows import STATE, STATS, HeadBatch, RowBatch, Stage, Transform
from .selection import traits

CACHED_TILE, TILE = 1 << 18, 1 << 22
"""Elements of a tile. On a CPU a few temporaries of this size fit in a core's L2 cache; elsewhere a tile is enough work per launch."""


DEVICE_TYPES: tuple[str, ...] = ()


def unavailable(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Return None: torch runs wherever the tensors are."""
    return None


def state_scales(call: Call) -> tuple[float, float]:
    """Return 1 for both sides: states hold logits."""
    return 1.0, 1.0


def rows(call: Call, batch: RowBatch, stages: Stage) -> None:
    """Run a batch tile by tile."""
    for r in _tiles(batch.student):
        _tile(call, batch, r, stages)


def head_rows(call: Call, batch: HeadBatch, stages: Stage) -> None:
    """Run a batch of one side tile by tile."""
    for r in _tiles(batch.logits):
        _head_tile(call, batch, r, stages)


def softmax_rows(x: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """Write ``softmax(x / T)`` or its logarithm to ``out``."""
    function = torch.log_softmax if logarithm else torch.softmax
    for r in _tiles(x):
        wide = _widen(x[r])
        out[r] = function(wide if temperature == 1.0 else _over_temperature(wide, wide.amax(-1), 1.0 / temperature), -1)


def softmax_gradient_rows(y: Tensor, dy: Tensor, out: Tensor, temperature: float, logarithm: bool) -> None:
    """Write the gradient by x to ``out``, from the softmax's result y and its gradient dy."""
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
    rows = max(1, (CACHED_TILE if traits(logits.device).host_memory else TILE) // vocab)
    return (slice(start, start + rows) for start in range(0, count, rows))


def _load(z: Tensor, bias: Tensor | None, t: Transform, dtype: torch.dtype) -> Tensor:
    """Return the logits of a tile in the compute dtype, as a view if no conversion is necessary."""
    z = z.to(dtype)
    if bias is not None:
        z = z + bias
    return z if t.identity else transform(z, t)


def _exponentials(z: Tensor, top: Tensor, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Return ``x = (z - top) / T`` and exp(x), ``[C, V]``. In rows whose largest logit is -inf, top is not subtracted."""
    x = _over_temperature(z, top.masked_fill(top == -math.inf, 0.0), inv_temperature)
    return x, x.exp()


def _softmax(x: Tensor, e: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log-softmax and softmax in place from the results of ``_exponentials`` and their sum ``[C]``."""
    total = total.unsqueeze(-1)
    return x.sub_(total.log()), e.div_(total)


def _shifted(z: Tensor, top: Tensor, rest: Tensor, inv_temperature: float) -> Tensor:
    """Return ``(z - top) / T - rest``. ``top`` and ``rest`` ``[C]`` are the two parts of the normaliser: see STATE."""
    return _over_temperature(z, top, inv_temperature).sub_(rest.unsqueeze(-1))


def _over_temperature(z: Tensor, top: Tensor, inv_temperature: float) -> Tensor:
    """Return ``(z - top) / T``, top ``[C]``."""
    difference = z - top.unsqueeze(-1)
    return difference if inv_temperature == 1.0 else difference.mul_(inv_temperature)


def _entropy(log_p: Tensor, p: Tensor) -> Tensor:
    return -(log_p * p).masked_fill_(p == 0, 0.0).sum(-1)


def _tile(call: Call, batch: RowBatch, r: slice, stages: Stage) -> None:
    tile = _Tile(call, batch, r)
    if Stage.NORMALISERS in stages:
        tile.find_normalisers()
    if not stages & ~Stage.NORMALISERS:
        return
    log_q, log_p, q, p = tile.arguments()
    terms = call.divergence.terms(log_q, log_p, q, p)
    if Stage.SUMS in stages:
        tile.find_sums(terms)
    if Stage.GRADIENT in stages and batch.dz is not None:
        tile.write_gradient(batch.dz[r], terms, q)


class _Tile:
    """A few rows of a batch, whose temporaries fit in cache."""

    def __init__(self, call: Call, batch: RowBatch, r: slice) -> None:
        self.call, self.batch, self.r = call, batch, r
        self.divergence = call.divergence
        self.student = _load(batch.student[r], batch.student_bias, call.student, call.compute_dtype)  # [C, V]
        self.teacher = _load(batch.teacher[r], batch.teacher_bias, call.teacher, call.compute_dtype)
        self.state = dict(zip(STATE, batch.state[:, r], strict=True))
        self.labels = batch.labels[r].unsqueeze(-1) if batch.labels is not None and call.needs_ce else None
        self.weight = None if batch.weight is None else batch.weight[r]
        self.exponentials: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # x and exp(x) of the student, then of the teacher
        self.softmaxes: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @property
    def needs_softmax(self) -> bool:
        return self.divergence.normalizer == "softmax" or self.batch.stats is not None

    def find_normalisers(self) -> None:
        """Compute the normalisers of the rows and write them to the state."""
        state, inv_t = self.state, self.call.inv_temperature
        if self.needs_softmax or self.labels is not None:
            state["top_s"][:] = self.student.amax(-1)
        if self.needs_softmax:
            state["top_t"][:] = self.teacher.amax(-1)
            student = _exponentials(self.student, state["top_s"], inv_t)
            teacher = _exponentials(self.teacher, state["top_t"], inv_t)
            state["expsum_s"][:], state["expsum_t"][:] = student[1].sum(-1), teacher[1].sum(-1)
            self.exponentials = *student, *teacher
        if self.labels is not None:
            shared = self.needs_softmax and self.call.temperature == 1.0
            state["expsum_one"][:] = state["expsum_s"] if shared else _exponentials(self.student, state["top_s"], 1.0)[1].sum(-1)
            target = self.student.gather(-1, self.labels.clamp(min=0)).masked_fill_(self.labels < 0, -math.inf)
            state["target"][:] = target.squeeze(-1)
        if self.divergence.normalizer == "mean":
            present = (self.student != -math.inf) | (self.teacher != -math.inf)
            state["columns"][:] = present.sum(-1)
            for name, z, other in (("mean_s", self.student, self.teacher), ("mean_t", self.teacher, self.student)):
                state[name][:] = row_mean(z, other).squeeze(-1)

    def softmax(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return log-softmax and softmax at T of the student and of the teacher."""
        if self.softmaxes is None:
            state, inv_t = self.state, self.call.inv_temperature
            x, e, u, f = self.exponentials or (
                *_exponentials(self.student, state["top_s"], inv_t), *_exponentials(self.teacher, state["top_t"], inv_t),
            )  # fmt: skip
            (log_q, q), (log_p, p) = _softmax(x, e, state["expsum_s"]), _softmax(u, f, state["expsum_t"])
            self.softmaxes = log_q, log_p, q, p
        return self.softmaxes

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the divergence's arguments: log q and log p (or centred logits) ``[C, V]``, and q and p if the divergence uses them."""
        if self.divergence.normalizer == "softmax":
            return self.softmax()
        inv_t, zero = self.call.inv_temperature, torch.zeros_like(self.state["mean_s"])
        centred = self.divergence.normalizer == "mean"
        x, u = (
            _over_temperature(z, self.state[mean] if centred else zero, inv_t)
            for z, mean in ((self.student, "mean_s"), (self.teacher, "mean_t"))
        )
        return x, u, x, u

    def find_sums(self, terms: Sequence[Tensor]) -> None:
        """Write the sums of the rows to the state, and loss and statistics if the batch has tensors for them."""
        call, batch, r, state = self.call, self.batch, self.r, self.state
        sums = [term.sum(-1) for term in terms[: self.divergence.num_sums]]
        for i, total in enumerate(sums):
            state[f"sum_{i}"][:] = total
        divergence, _ = self.divergence.finish(sums)
        cross_entropy = torch.full_like(divergence, math.nan)
        if self.labels is not None:
            cross_entropy = state["expsum_one"].log() - (state["target"] - state["top_s"])
        if batch.loss is not None:
            loss = call.value_scale * divergence if call.kd_weight else torch.zeros_like(divergence)
            if self.labels is not None and call.ce_weight:
                loss = loss + call.ce_weight * cross_entropy
            batch.loss[r] = loss if self.weight is None else loss * self.weight
        if batch.stats is None:
            return
        log_q, log_p, q, p = self.softmax()
        for name, z, top in (("best_s", self.student, "top_s"), ("best_t", self.teacher, "top_t")):
            column = z.argmax(-1, keepdim=True)
            elsewhere = z.gather(-1, column) < state[top].unsqueeze(-1)
            state[name][:] = column.masked_fill_(elsewhere, -1).squeeze(-1)
        values = {
            "divergence": divergence,
            "cross_entropy": cross_entropy,
            "student_entropy": _entropy(log_q, q),
            "teacher_entropy": _entropy(log_p, p),
            "top1_agreement": state["best_s"] == state["best_t"],
        }
        for i, name in enumerate(STATS):
            batch.stats[i, r] = values[name]

    def write_gradient(self, out: Tensor, terms: Sequence[Tensor], q: Tensor) -> None:
        """Write the gradient by the student's logits, before bias, scale and softcap, from the sums in the state."""
        call, state = self.call, self.state
        if call.kd_weight:
            sums = [state[f"sum_{i}"].unsqueeze(-1) for i in range(self.divergence.num_sums)]
            _, coefficients = self.divergence.finish(sums)
            dz = self.divergence.slope(terms, coefficients)
            if self.divergence.normalizer == "softmax":
                # In place: q and the slope, which may be a view of p, are temporaries of this tile.
                dz = dz.sub_(q.mul_(coefficients[0]))
            dz = dz.mul_(call.slope_scale)
        else:  # 0 * inf would be NaN
            dz = torch.zeros_like(self.student)
        if call.ce_weight and self.labels is not None:
            _, one = _exponentials(self.student, state["top_s"], 1.0)
            dz.add_(one.div_(state["expsum_one"].unsqueeze(-1)), alpha=call.ce_weight)
            hit = torch.full_like(dz[:, :1], -call.ce_weight).masked_fill_(self.labels < 0, 0.0)
            dz.scatter_add_(-1, self.labels.clamp(min=0), hit)
        if call.student.scale != 1.0:
            dz.mul_(call.student.scale)
        if call.student.softcap is not None:
            dz.mul_(1 - (self.student / call.student.softcap).square_())
        if self.weight is not None:
            dz.mul_(self.weight.unsqueeze(-1))
        if self.batch.dz_scale != 1.0:
            dz.mul_(self.batch.dz_scale)
        out.copy_(dz)


def _head_tile(call: Call, batch: HeadBatch, r: slice, stages: Stage) -> None:
    statistics = Stage.NORMALISERS in stages
    dtype = call.compute_dtype
    z = _load(batch.logits[r], batch.bias, call.student, dtype)
    if statistics:
        batch.top[r] = z.amax(-1)
        x, e = _exponentials(z, batch.top[r], call.inv_temperature)
        total = e.sum(-1)
        batch.log_sum[r] = total.log()
        log_q, q = _softmax(x, e, total)
        if batch.entropy is not None:
            batch.entropy[r] = _entropy(log_q, q)
    else:
        log_q = _shifted(z, batch.top[r], batch.log_sum[r], call.inv_temperature)
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
        # In float64 from the stored logits: see philox.draw.
        bias = None if batch.bias is None else batch.bias.double()
        exact = _load(batch.logits[r], bias, call.student, torch.float64)
        exact = (exact - row_top(exact)).mul_(call.inv_temperature)
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
        # For repeated ids, index_put_(accumulate=True) adds in a fixed order, unlike scatter_add_ on a GPU.
        dz.index_put_((torch.arange(len(ids), device=ids.device).unsqueeze(-1).expand_as(ids), ids), d_ids, accumulate=True)
    dz.mul_(call.student.scale * call.inv_temperature * batch.dz_scale)
    if call.student.softcap is not None:
        dz.mul_(1 - (z / call.student.softcap).square_())
    batch.dz[r].copy_(dz)


def largest(z: Tensor, k: int) -> Tensor:
    """Return ``[C, k]`` int64: columns of each row's k largest values in falling order, ties by column. NaN counts as -inf."""
    z = z.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if z.dtype == torch.float64:
        return z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    # torch.topk has no fixed order for ties, so build keys without ties: the high bits are the float32's bits, which as an integer sort
    # like the float once negative ones are flipped; the low bits are the column, so that smaller columns come first.
    bits = (z + 0.0).view(torch.int32).to(torch.int64)  # -0.0 + 0.0 = 0.0
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    columns = torch.arange(z.shape[1], device=z.device)
    return ((ordered << 32) + (0x7FFFFFFF - columns)).topk(k, sorted=True).values.bitwise_and_(0xFFFFFFFF).neg_().add_(0x7FFFFFFF)
