"""The true results: the definitions, dense and in float64, written from the papers and independent of the package.

``divergence`` and ``closed_form`` are two independent forms of each of the ten divergences. test_divergences.py compares them with each
other; all other tests compare the package with them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence

DIVERGENCES: list[Divergence] = [
    kd.ForwardKL(),
    kd.ReverseKL(),
    kd.SymmetricKL(),
    kd.SymmetricKL(0.95),
    kd.JSD(),
    kd.JSD(1e-3),  # close to the ends of the range, where an implementation may switch to the limit
    kd.JSD(0.999),
    kd.SkewKL(),
    kd.SkewKL(0.99),
    kd.SkewReverseKL(),
    kd.SkewReverseKL(0.99),
    kd.TotalVariation(),
    kd.AlphaDivergence(),
    kd.AlphaDivergence(-1.0),  # half of Neyman's chi-square
    kd.AlphaDivergence(2.0),  # half of Pearson's chi-square
    kd.AlphaDivergence(0.01),
    kd.ABDivergence(),
    kd.ABDivergence(1.0, 1.0),  # half of the squared Euclidean distance of p and q
    kd.ABDivergence(-0.3, 1.0),  # one of alpha, beta negative
    kd.ABDivergence(0.8, -0.3),
    kd.LogitMSE(),
    kd.LogitMSE(centered=True),
]
NEGATIVE: list[Divergence] = [kd.ABDivergence(-0.5, -0.3), kd.ABDivergence(0.4, -1.0), kd.ABDivergence(-1.0, 0.4)]
"""Divergences with alpha + beta < 0, where unlikely tokens weigh most. Separate, since the definitions below give inf - inf at 0."""
ONE_OF_EACH: list[Divergence] = [
    kd.ForwardKL(), kd.ReverseKL(), kd.SymmetricKL(0.3), kd.JSD(0.3), kd.SkewKL(0.2), kd.SkewReverseKL(0.2), kd.TotalVariation(),
    kd.AlphaDivergence(0.4), kd.ABDivergence(), kd.LogitMSE(), kd.LogitMSE(centered=True),
]  # fmt: skip
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def name_of(value: object) -> str:
    """Return a test id."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value).replace(" ", "")


# ---- the ten definitions


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """Return weight * factor with 0 * anything = 0, in value and gradient."""
    zero = weight == 0
    return torch.where(zero, 0.0, weight * torch.where(zero, 0.0, factor))


def _log_mean(a: float, log_1: Tensor, log_2: Tensor) -> Tensor:
    """Return log(a * exp(log_1) + (1 - a) * exp(log_2))."""
    return torch.logaddexp(log_1 + math.log(a), log_2 + math.log(1 - a))


def divergence(d: Divergence, x: Tensor, u: Tensor) -> Tensor:
    """Return ``D [...]`` of student and teacher logits over T, ``[..., V]``, by the definition, differentiable in x."""
    if isinstance(d, kd.LogitMSE):
        gap = x - u
        if d.centered:
            gap = gap - gap.mean(-1, keepdim=True)
        return 0.5 * (gap * gap).sum(-1)
    lq, lp = torch.log_softmax(x, -1), torch.log_softmax(u, -1)
    q, p = lq.exp(), lp.exp()

    def kl(weight: Tensor, log_weight: Tensor, log_other: Tensor) -> Tensor:
        return _times(weight, log_weight - log_other).sum(-1)

    if isinstance(d, kd.ForwardKL):
        return kl(p, lp, lq)
    if isinstance(d, kd.ReverseKL):
        return kl(q, lq, lp)
    if isinstance(d, kd.SymmetricKL):
        return (1 - d.weight) * kl(p, lp, lq) + d.weight * kl(q, lq, lp)
    if isinstance(d, kd.JSD):
        lm = _log_mean(d.beta, lp, lq)
        return d.beta * kl(p, lp, lm) + (1 - d.beta) * kl(q, lq, lm)
    if isinstance(d, kd.SkewKL):
        return kl(p, lp, _log_mean(d.alpha, lp, lq))
    if isinstance(d, kd.SkewReverseKL):
        return kl(q, lq, _log_mean(d.alpha, lq, lp))
    if isinstance(d, kd.TotalVariation):
        return 0.5 * (p - q).abs().sum(-1)
    if isinstance(d, kd.AlphaDivergence):
        a = d.alpha
        return ((a * lp + (1 - a) * lq).exp().sum(-1) - 1) / (a * (a - 1))
    if isinstance(d, kd.ABDivergence):
        a, b = d.alpha, d.beta
        cross, pp, qq = (a * lp + b * lq).exp(), ((a + b) * lp).exp(), ((a + b) * lq).exp()
        return -(cross - a / (a + b) * pp - b / (a + b) * qq).sum(-1) / (a * b)
    raise AssertionError(f"no oracle for {d}")


def closed_form(d: Divergence, x: Tensor, u: Tensor) -> Tensor:
    """Return ``T * dD/dz_s [..., V]``, as derived by hand."""
    if isinstance(d, kd.LogitMSE):
        gap = x - u
        return gap - gap.mean(-1, keepdim=True) if d.centered else gap
    q, p = torch.softmax(x, -1), torch.softmax(u, -1)
    ratio = torch.log_softmax(x, -1) - torch.log_softmax(u, -1)

    def total(t: Tensor) -> Tensor:
        return t.sum(-1, keepdim=True)

    if isinstance(d, kd.ForwardKL):
        return q - p
    if isinstance(d, kd.ReverseKL):
        return q * (ratio - total(q * ratio))
    if isinstance(d, kd.SymmetricKL):
        return (1 - d.weight) * (q - p) + d.weight * q * (ratio - total(q * ratio))
    if isinstance(d, kd.JSD):
        h = (q / (d.beta * p + (1 - d.beta) * q)).log()
        return (1 - d.beta) * q * (h - total(q * h))
    if isinstance(d, kd.SkewKL):
        w = (1 - d.alpha) * p * q / (d.alpha * p + (1 - d.alpha) * q)
        return q * total(w) - w
    if isinstance(d, kd.SkewReverseKL):
        m = (1 - d.alpha) * p + d.alpha * q
        h = (q / m).log() - d.alpha * q / m
        return q * (h - total(q * h))
    if isinstance(d, kd.TotalVariation):
        s = torch.sign(q - p)
        return 0.5 * q * (s - total(q * s))
    if isinstance(d, kd.AlphaDivergence):
        mixed = p**d.alpha * q ** (1 - d.alpha)
        return (total(mixed) * q - mixed) / d.alpha
    if isinstance(d, kd.ABDivergence):
        h = (q ** (d.alpha + d.beta) - p**d.alpha * q**d.beta) / d.alpha
        return h - q * total(h)
    raise AssertionError(f"no closed form for {d}")


# ---- the loss, dense and eager


def dense_logits(side: kd.LMHead | Tensor) -> Tensor:
    """Return logits ``[..., V]`` in the side's dtype, as a model's forward returns them."""
    if isinstance(side, Tensor):
        return side
    rows = slice(side.vocab_size)
    z = side.hidden @ side.weight[rows].t()
    if side.bias is not None:
        z = z + side.bias[rows]
    z = z * side.scale
    return z if side.softcap is None else side.softcap * torch.tanh(z / side.softcap)


def dense_loss(
    student: kd.LMHead | Tensor,
    teacher: kd.LMHead | Tensor,
    *,
    divergence: Divergence | str = "forward_kl",
    temperature: float = 1.0,
    t_squared: bool = True,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    token_weights: Tensor | None = None,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    **no_effect: Any,
) -> Tensor:
    """Compute ``distillation_loss`` densely: logits in the model's dtype, softmaxes in float32 or wider.

    With float64 inputs this is the truth. With other dtypes it is the eager result that a fused kernel's error is compared with.
    """
    zs, zt = dense_logits(student), dense_logits(teacher).detach()
    wide = torch.promote_types(torch.promote_types(zs.dtype, zt.dtype), torch.float32)
    zs, zt = zs.to(wide), zt.to(wide)
    valid = torch.ones(zs.shape[:-1], dtype=torch.bool, device=zs.device) if labels is None else labels != ignore_index
    zs, zt = zs[valid], zt[valid]
    d = kd.divergences.resolve(divergence)
    per_token = kd_weight * globals()["divergence"](d, zs / temperature, zt / temperature)
    if t_squared:
        per_token = per_token * temperature**2
    if ce_weight:
        assert labels is not None
        per_token = per_token + ce_weight * torch.nn.functional.cross_entropy(zs, labels[valid].long(), reduction="none")
    if token_weights is not None:
        per_token = per_token * token_weights[valid].to(wide)
    if reduction == "none":
        return torch.zeros(valid.shape, dtype=wide, device=zs.device).masked_scatter(valid, per_token)
    total = per_token.sum()
    if reduction == "sum":
        return total
    return total / (valid.sum().clamp(min=1) if num_items is None else num_items)


def token_stats(student: kd.LMHead | Tensor, teacher: kd.LMHead | Tensor, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the five statistics in float64, in the leading shape; 0 at ignored positions."""
    zs, zt = dense_logits(to_dtype(student, torch.float64)), dense_logits(to_dtype(teacher, torch.float64))
    temperature, labels = options.get("temperature", 1.0), options.get("labels")
    x, u = zs / temperature, zt / temperature
    ce = torch.full(zs.shape[:-1], math.nan, dtype=torch.float64, device=zs.device)
    if labels is not None:
        ce = -torch.log_softmax(zs, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    stats = {
        "divergence": divergence(kd.divergences.resolve(options.get("divergence", "forward_kl")), x, u),
        "cross_entropy": ce,
        "student_entropy": torch.distributions.Categorical(logits=x).entropy(),
        "teacher_entropy": torch.distributions.Categorical(logits=u).entropy(),
        "top1_agreement": (zs.argmax(-1) == zt.argmax(-1)).double(),
    }
    if labels is not None:
        stats = {name: torch.where(labels == -100, 0.0, value) for name, value in stats.items()}
    return stats


# ---- samples


def to_dtype(side: kd.LMHead | Tensor, dtype: torch.dtype | None, requires_grad: bool = False) -> kd.LMHead | Tensor:
    """Return a detached copy whose tensors are leaves of a new graph, in ``dtype`` (None: unchanged)."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().clone().to(dtype or t.dtype).requires_grad_(requires_grad)

    if isinstance(side, Tensor):
        return leaf(side)
    return kd.LMHead(
        leaf(side.hidden), leaf(side.weight), None if side.bias is None else leaf(side.bias), side.scale, side.softcap, side.vocab_size
    )


def make_side(
    leading: Sequence[int],
    vocab: int,
    dim: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    bias: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    pad: int | None = None,
    spread: float = 2.0,
) -> kd.LMHead | Tensor:
    """Return random logits of standard deviation ``spread``: an LMHead of hidden size ``dim``, or a tensor if ``dim`` is None.

    Args:
        pad: number of rows of the head beyond the vocabulary. They are NaN, since they must not be read. None: no ``vocab_size``.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if dim is None:
        return (randn(*leading, vocab) * spread).to(device, dtype)
    hidden, weight = randn(*leading, dim), randn(vocab, dim) * (spread / math.sqrt(dim) / scale)
    offset = randn(vocab) * 0.5 if bias else None
    if pad is not None:
        weight = torch.cat([weight, torch.full((pad, dim), math.nan, dtype=weight.dtype)])
        offset = None if offset is None else torch.cat([offset, torch.full((pad,), math.nan, dtype=weight.dtype)])
    return kd.LMHead(
        hidden.to(device, dtype),
        weight.to(device, dtype),
        None if offset is None else offset.to(device, dtype),
        scale,
        softcap,
        None if pad is None else vocab,
    )


def make_labels(leading: Sequence[int], vocab: int, device: str = "cpu", masked: bool = True) -> Tensor:
    """Return random labels, of which every third is ignored if ``masked``."""
    labels = torch.randint(vocab, tuple(leading), generator=torch.Generator().manual_seed(5))
    if masked:
        flat = labels.view(-1)
        flat[1::3] = -100
    return labels.to(device)


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return cases in which every two values of two different factors occur together.

    Nearly all faults need one or two settings (Kuhn et al. 2004). The full product would have millions of cases; this has a few more
    than the product of the two longest factors. Chosen greedily, from a fixed seed.
    """
    rng = random.Random(0)
    names = list(factors)
    index = {n: range(len(factors[n])) for n in names}
    missing = {(a, i, b, j) for a, b in itertools.combinations(names, 2) for i in index[a] for j in index[b]}

    def pairs(case: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)}

    cases = []
    while missing:
        seed = min(missing)
        tries = []
        for _ in range(20):
            case = {n: rng.choice(index[n]) for n in names}
            case[seed[0]], case[seed[2]] = seed[1], seed[3]
            tries.append(case)
        best = max(tries, key=lambda c: len(pairs(c) & missing))
        missing -= pairs(best)
        cases.append({n: factors[n][i] for n, i in best.items()})
    return cases


# ---- comparison

Loss = Callable[..., Tensor]


def run(
    loss_fn: Loss,
    student: kd.LMHead | Tensor,
    teacher: kd.LMHead | Tensor,
    options: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    upstream: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    """Return the loss and every gradient of the student, from new leaves in ``dtype``."""
    student, teacher = to_dtype(student, dtype, requires_grad=True), to_dtype(teacher, dtype)
    loss = loss_fn(student, teacher, **options)
    loss.backward(torch.as_tensor(upstream, dtype=loss.dtype, device=loss.device).expand(loss.shape))
    tensors = {"logits": student} if isinstance(student, Tensor) else vars(student)
    grads = {f"d_{n}": t.grad for n, t in tensors.items() if isinstance(t, Tensor)}
    assert all(g is not None for g in grads.values())
    return {"loss": loss.detach(), **grads}


def truth_of(student: kd.LMHead | Tensor, teacher: kd.LMHead | Tensor, options: Mapping[str, Any], **kw: Any) -> dict[str, Tensor]:
    """Return the float64 result from the same (rounded) inputs."""
    return run(dense_loss, student, teacher, options, dtype=torch.float64, **kw)


def error(actual: Tensor, truth: Tensor) -> float:
    """Return the largest absolute difference, or infinity if infinities and NaN are at different places."""
    actual = actual.detach().to(truth.dtype)
    assert actual.shape == truth.shape, f"shape {list(actual.shape)}, expected {list(truth.shape)}"
    finite = torch.isfinite(truth)
    if not torch.equal(torch.where(finite, 0.0, actual).nan_to_num(123.0), torch.where(finite, 0.0, truth).nan_to_num(123.0)):
        return math.inf
    gap = (actual - truth)[finite].abs()
    return float(gap.nan_to_num(nan=math.inf).max()) if gap.numel() else 0.0


# Tolerance relative to the largest value. 16 bits: one ulp. float32: 64 ulp, since logits up to 30 (T = 0.5) cause an error of 16 ulp in
# log q - log p, and eager torch's error may be almost 0 by chance. float64: eager torch is the truth, so only this tolerance counts.
FLOOR = {torch.float64: 1e-12, torch.float32: 2.0**-17, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def errors(kernel: Tensor, same_dtype_torch: Tensor, truth: Tensor, scale: float | None = None) -> tuple[float, float, float]:
    """Return ``err(kernel), err(same-dtype torch), floor`` against float64; ``scale`` as in ``assert_close_2x``."""
    finite = truth[torch.isfinite(truth)].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    floor = FLOOR[kernel.dtype] * max(scale or 0.0, largest, 1e-30)
    return error(kernel, truth), error(same_dtype_torch, truth), floor


def assert_close_2x(name: str, kernel: Tensor, same_dtype_torch: Tensor, truth: Tensor, scale: float | None = None) -> None:
    """``err(kernel) <= 2 * err(same-dtype torch) + floor`` against float64, with both errors in the message.

    Args:
        scale: the floor is relative to this, if it is larger than the largest true value.
    """
    kernel_error, torch_error, floor = errors(kernel, same_dtype_torch, truth, scale)
    assert kernel_error <= 2 * torch_error + floor, (
        f"{name} ({kernel.dtype}): error {kernel_error:.3e}, same-dtype torch {torch_error:.3e}, floor {floor:.1e}"
    )


def check(
    backend: str,
    student: kd.LMHead | Tensor,
    teacher: kd.LMHead | Tensor,
    options: Mapping[str, Any],
    upstream: Tensor | float = 1.0,
    scales: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """Compare a backend's loss and gradients with float64 and with eager torch in the same dtype. Return them."""
    result = run(kd.distillation_loss, student, teacher, {**options, "backend": backend}, upstream=upstream)
    eager = run(dense_loss, student, teacher, options, upstream=upstream)
    truth = truth_of(student, teacher, options, upstream=upstream)
    assert result.keys() == truth.keys()
    scales = dict(scales or {})
    if isinstance(student, Tensor) and isinstance(teacher, kd.LMHead) and student.dtype != torch.float16:
        # The gradient is rounded twice: stored in the student's dtype in forward, multiplied by the upstream gradient in backward.
        scales.setdefault("d_logits", 2 * float(truth["d_logits"].abs().nan_to_num(posinf=0.0).max()))
    for name, value in result.items():
        assert value.dtype == eager[name].dtype, f"{name}: {value.dtype}, expected {eager[name].dtype}"
        assert_close_2x(name, value, eager[name], truth[name], scales.get(name))
    return result
