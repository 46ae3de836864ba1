"""The divergences between a teacher p and a student q, one frozen dataclass each.

Per token, ``u = z_teacher / T``, ``x = z_student / T``, ``p = softmax(u)``, ``q = softmax(x)``. Most divergences are a sum over
the vocabulary of a function ``f(log q, log p)`` of one column. With ``g = df / d log q``,

    T * dD/dz_student = g - q * sum(g)

so such a divergence is the pair (value, slope) = (f, g), and the rest of the package does not depend on which divergence it is. In
general a divergence has three parts: at most four sums over the columns (``terms``), a function from these sums to the value and the
row's coefficients (``finish``), and the slope of a column given the coefficients (``slope``).

Adding ``c * q`` to every slope does not change the gradient. Each form below uses this freedom, and adds terms to f that sum to zero, so
that no digits are lost near p = q: every column of a value is then >= 0.

Columns with p = 0 or q = 0 contribute their limit (``0 log 0 = 0``). Columns where both are 0 are skipped. If q = 0 and p > 0 in a column,
ForwardKL is infinite, as its definition says.
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .support.ratios import choose, log_mix, log_ratio, mixture, safe_product, zero_where

__all__ = [
    "ABDivergence",
    "AlphaDivergence",
    "Divergence",
    "ForwardKL",
    "JSD",
    "LogitMSE",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SymmetricKL",
    "TotalVariation",
    "of_beta",
    "parse",
    "resolve",
    "spelled",
]

Normalizer = Literal["softmax", "mean", "none"]
Tail = Literal["bucket", "renorm", "zero", "sampled"]


def _number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Check that a parameter is a finite number in the open interval (low, high)."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and low < value < high
    if not ok:
        bounds = "a finite number" if math.isinf(low) else f"in the open interval ({low:g}, {high:g})"
        raise ValueError(f"{name} must be {bounds}, got {value!r}")


@dataclass(frozen=True)
class Divergence:
    """Base class of all divergences. ``name`` is its string form in arguments; ``id`` is its number in compiled code."""

    name: ClassVar[str]
    id: ClassVar[int]
    slope_sum: ClassVar[float | None] = None
    """``sum(g)`` if it is a known constant, else None. With None, kernels need one more sweep."""
    slope_jumps: ClassVar[bool] = False
    """The slope is not a continuous function of q and p, so backward must sum the same slopes that it writes."""
    unbounded_slopes: ClassVar[bool] = False
    """The slopes are not bounded by a few units, so float16 gradients need more headroom."""
    tails: ClassVar[tuple[Tail, ...]] = ()
    """Sparse teachers that the divergence supports: tails of ``TopK``, and ``"sampled"`` for ``Sampled``."""
    normalizer: ClassVar[Normalizer] = "softmax"
    """Quantity that is subtracted from x and u to get the two arguments: their log-sum-exp, their mean, or nothing."""

    @property
    def parameters(self) -> tuple[float, ...]:
        """Numeric parameters, in field order (they come before the flags)."""
        return tuple(getattr(self, name) for name, f in self.__dataclass_fields__.items() if f.type == "float")

    @property
    def flags(self) -> dict[str, bool]:
        """Boolean parameters, by name."""
        return {name: bool(getattr(self, name)) for name, f in self.__dataclass_fields__.items() if f.type == "bool"}

    @property
    def kernel_parameters(self) -> tuple[float, float]:
        """``(a, b)`` as passed to kernels: the two parameters, or a single one and ``1 - a``.

        ``1 - a`` is computed here in float64, because float32 would lose digits for a close to 1.
        """
        parameters = self.parameters
        first = parameters[0] if parameters else 0.0
        return first, parameters[1] if len(parameters) == 2 else 1.0 - first

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return f for each column, ``[..., V]``, as written in the papers; differentiable. All other forms must agree with it."""
        raise NotImplementedError

    def reference_value(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Return the divergence ``[...]`` of arguments ``[..., V]``: the sum of ``reference``, unless it is another function of sums."""
        return self.reference(log_q, log_p).sum(-1)

    @property
    def num_sums(self) -> int:
        """Number of leading ``terms`` that are summed over the columns: 1 to 4."""
        return 2 if self.slope_sum is None else 1

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, ...]:
        """Return the columns' (value, slope), ``[..., V]`` each, from the logarithms and their exponentials, accurate near p = q.

        Divergences that override ``finish`` or ``slope`` return the terms that these need.
        """
        raise NotImplementedError

    def finish(self, sums: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the value of a row and its coefficients from the ``num_sums`` sums. The first coefficient is the sum of the slopes."""
        return sums[0], (sums[1] if self.slope_sum is None else torch.full_like(sums[0], self.slope_sum),)

    def slope(self, terms: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
        """Return the columns' slopes ``[..., V]`` from ``terms`` and the row's coefficients ``[..., 1]``."""
        return terms[1]


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """``KL(p || q) = sum p (log p - log q)``, the loss of Hinton et al. 2015 (arXiv:1503.02531), with the teacher's entropy."""

    name = "forward_kl"
    id = 0
    slope_sum = -1.0
    tails = ("bucket", "renorm", "zero", "sampled")

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return safe_product(log_p.exp(), -log_ratio(log_q, log_p))

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        value = zero_where(p == 0, (log_p - log_q).mul_(p))
        return value.add_(q).sub_(p), -p


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """``KL(q || p) = sum q (log q - log p)``: mode-seeking; MiniLLM (arXiv:2306.08543), GKD (arXiv:2306.13649)."""

    name = "reverse_kl"
    id = 1
    tails = ("bucket",)

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return safe_product(log_q.exp(), log_ratio(log_q, log_p))

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        slope = zero_where(q == 0, (log_q - log_p).mul_(q))
        return slope - q + p, slope


@dataclass(frozen=True)
class SymmetricKL(Divergence):
    """``(1 - weight) KL(p || q) + weight KL(q || p)`` with ``0 < weight < 1``; 0.5 is half of Jeffreys' divergence."""

    weight: float = 0.5
    name = "symmetric_kl"
    id = 2

    def __post_init__(self) -> None:
        _number("SymmetricKL(weight)", self.weight, 0.0, 1.0)

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        w = self.weight
        return (1 - w) * ForwardKL().reference(log_q, log_p) + w * ReverseKL().reference(log_q, log_p)

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        w = self.weight
        ratio = log_q - log_p
        reverse = zero_where(q == 0, ratio * q).mul_(w)
        forward = zero_where(p == 0, ratio.mul_(p)).mul_(w - 1)
        value = forward.add_(reverse).add_(q - p, alpha=1 - 2 * w)
        return value, reverse.sub_(p, alpha=1 - w)


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon divergence ``b KL(p || m) + (1 - b) KL(q || m)``, ``m = b p + (1 - b) q``, ``0 < b < 1``.

    b as in GKD (arXiv:2306.13649). The divergence tends to 0 for b -> 0 and b -> 1, so these values raise: use ForwardKL or ReverseKL.
    """

    beta: float = 0.5
    name = "jsd"
    id = 3
    tails = ("bucket", "renorm")

    def __post_init__(self) -> None:
        if self.beta in (0, 1):
            other = "ForwardKL()" if self.beta == 0 else "ReverseKL()"
            raise ValueError(
                f"JSD(beta) must be in the open interval (0, 1), got {self.beta!r}: the divergence is 0 there. "
                f"Libraries that accept it mean {other} (beta = 0 is ForwardKL, beta = 1 is ReverseKL)"
            )
        _number("JSD(beta)", self.beta, 0.0, 1.0)

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        b = self.beta
        log_m = log_mix(b, log_p, log_q)
        return b * safe_product(log_p.exp(), log_ratio(log_p, log_m)) + (1 - b) * safe_product(log_q.exp(), log_ratio(log_q, log_m))

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        log_qm, log_pm = mixture(1 - self.beta, self.beta, log_q, log_p)
        slope = zero_where(q == 0, log_qm.mul_(q)).mul_(1 - self.beta)
        value = zero_where(p == 0, log_pm.mul_(p)).mul_(self.beta).add_(slope)
        return value, slope


@dataclass(frozen=True)
class SkewKL(Divergence):
    """``KL(p || m)``, ``m = a p + (1 - a) q``, ``0 < a < 1``: skew KL of DistiLLM (arXiv:2402.03898), which uses a = 0.1."""

    alpha: float = 0.1
    name = "skew_kl"
    id = 4

    def __post_init__(self) -> None:
        _number("SkewKL(alpha)", self.alpha, 0.0, 1.0)

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return safe_product(log_p.exp(), log_ratio(log_p, log_mix(self.alpha, log_p, log_q)))

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        _, log_pm = mixture(1 - self.alpha, self.alpha, log_q, log_p)
        # q (p/m - 1) instead of q p/m: the slopes then vanish at p = q instead of cancelling in the sum.
        slope = zero_where(q == 0, torch.expm1(log_pm).mul_(q)).mul_(self.alpha - 1)
        value = zero_where(p == 0, log_pm.mul_(p)).add_(q - p, alpha=1 - self.alpha)
        return value, slope


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """``KL(q || m)``, ``m = (1 - a) p + a q``, ``0 < a < 1``: skew reverse KL of DistiLLM (arXiv:2402.03898)."""

    alpha: float = 0.1
    name = "skew_reverse_kl"
    id = 5

    def __post_init__(self) -> None:
        _number("SkewReverseKL(alpha)", self.alpha, 0.0, 1.0)

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return safe_product(log_q.exp(), log_ratio(log_q, log_mix(self.alpha, log_q, log_p)))

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alpha
        log_qm, _ = mixture(a, 1 - a, log_q, log_p)
        empty = q == 0
        value = zero_where(empty, log_qm * q)
        # 1 - q/m instead of -q/m: the slopes then vanish at p = q instead of cancelling in the sum.
        slope = zero_where(empty, torch.expm1(log_qm).mul_(q)).mul_(-a).add_(value)
        return value.add_(p - q, alpha=1 - a), slope


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """``1/2 sum |p - q|``; f-DISTILL (arXiv:2307.15190). Its slope is undefined at p = q; kdkernels uses 0."""

    name = "total_variation"
    id = 6
    slope_jumps = True

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return 0.5 * (log_p.exp() - log_q.exp()).abs()

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        difference = q - p
        slope = torch.sign(difference).mul_(q).mul_(0.5)
        return difference.abs_().mul_(0.5), slope


APART = -1.0
"""Threshold for log(q / p), or for the log-ratio of their powers, in the slope of a power divergence.

Below it, the slope is the plain difference of its two parts: q is so much smaller that nothing cancels. Above it, both parts are written
as differences from p, which is accurate near p = q but would leave only rounding errors for small q.
"""


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """``(sum p^a q^(1-a) - 1) / (a (a - 1))``, a != 0, 1 (Amari 1985). The limits at 0 and 1 are ReverseKL and ForwardKL."""

    alpha: float = 0.5
    name = "alpha_divergence"
    id = 7
    unbounded_slopes = True

    def __post_init__(self) -> None:
        _number("AlphaDivergence(alpha)", self.alpha)
        if self.alpha in (0, 1):
            other = "ReverseKL()" if self.alpha == 0 else "ForwardKL()"
            raise ValueError(f"AlphaDivergence(alpha) must not be 0 or 1, got {self.alpha!r}: the limit there is {other}")

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        # (p^a q^(1-a) - a p - (1-a) q) / (a (a-1)): the subtracted terms sum to 1, as in the definition.
        a = self.alpha
        skipped = (log_q == -math.inf) & (log_p == -math.inf)
        lq, lp = (torch.where(skipped, torch.zeros_like(x), x) for x in (log_q, log_p))
        column = ((a * lp + (1 - a) * lq).exp() - a * lp.exp() - (1 - a) * lq.exp()) / (a * (a - 1))
        return torch.where(skipped, torch.zeros_like(column), column)

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        a = self.alpha
        ratio = log_q - log_p
        q_larger = ratio >= 0
        larger = torch.maximum(q, p)
        size = ratio.abs().neg_()  # log(smaller / larger)
        weight = choose(q_larger, a, 1 - a, ratio)  # exponent of the smaller one in p^a q^(1-a)
        power = weight * size
        grown, shrunk = torch.expm1(power), torch.expm1(size)
        empty = larger == 0
        value = zero_where(empty, (grown - weight * shrunk).mul_(larger)).div_(a * (a - 1))
        # p^a q^(1-a) - q
        slope = torch.where(ratio < APART, power.exp_().mul_(larger) - q, torch.where(q_larger, grown, grown - shrunk).mul_(larger))
        return value, zero_where(empty, slope).div_(-a)


@dataclass(frozen=True)
class ABDivergence(Divergence):
    """``-1/(ab) sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]``; a, b and a + b must not be 0.

    Cichocki et al. 2011; for distillation ABKD (arXiv:2505.04560), whose recommended pair is the default.
    """

    alpha: float = 0.2
    beta: float = 0.7
    name = "ab_divergence"
    id = 8
    unbounded_slopes = True

    def __post_init__(self) -> None:
        _number("ABDivergence(alpha)", self.alpha)
        _number("ABDivergence(beta)", self.beta)
        # Kernels add alpha and beta in float32, where a sum this small is 0.
        if 0 in (self.alpha, self.beta) or math.isclose(self.alpha, -self.beta, rel_tol=1e-6):
            raise ValueError(
                f"ABDivergence: alpha, beta and alpha + beta must not be 0, got alpha={self.alpha!r}, beta={self.beta!r}; "
                "for the limits (1, 0) and (0, 1) use ForwardKL() and ReverseKL()"
            )

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        s = a + b
        no_q, no_p = log_q == -math.inf, log_p == -math.inf
        # A negative power of 0 makes its column infinite: the largest of the column's terms is positive.
        excluded = no_q | no_p if s < 0 else no_q & no_p
        lq, lp = (torch.where(excluded, torch.zeros_like(x), x) for x in (log_q, log_p))
        column = ((a * lp + b * lq).exp() - a / s * (s * lp).exp() - b / s * (s * lq).exp()) / (-a * b)
        return torch.where(excluded, choose(no_q & no_p, 0.0, math.inf, column), column)

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.alpha, self.beta
        s = a + b
        # "Larger" and "smaller" refer to the powers: for a + b < 0, the smaller probability has the larger power.
        ratio = (log_q - log_p).mul_(s)
        q_larger = ratio >= 0
        larger = torch.exp(torch.maximum(s * log_q, s * log_p))
        size = ratio.abs().neg_()  # log(smaller / larger)
        weight = choose(q_larger, a / s, b / s, ratio)  # exponent of the smaller one in p^a q^b
        power = weight * size
        grown, shrunk = torch.expm1(power), torch.expm1(size)
        # From the logarithms: if q and p underflow, their small powers are still above 0.
        empty = (log_q == -math.inf) & (log_p == -math.inf)
        value = zero_where(empty, (grown - weight * shrunk).mul_(larger)).div_(-a * b)
        # (p^a q^b - q^(a+b)) / larger
        slope = torch.where(ratio < APART, power.exp_() - size.exp_(), torch.where(q_larger, grown, grown - shrunk))
        return value, zero_where(empty, slope.mul_(larger)).div_(-a)


@dataclass(frozen=True)
class LogitMSE(Divergence):
    """``1/2 sum (x - u)^2`` of the logits over T; with ``centered`` each row's mean is subtracted first.

    Logit matching: Ba & Caruana 2014 (arXiv:1312.6184); Kim et al. 2021 (arXiv:2105.08919).
    """

    centered: bool = False
    name = "logit_mse"
    id = 9
    slope_sum = 0.0  # centred slopes sum to 0; uncentred slopes are not projected
    unbounded_slopes = True

    def __post_init__(self) -> None:
        if not isinstance(self.centered, bool):
            raise ValueError(f"LogitMSE(centered) must be True or False, got {self.centered!r}")

    @property
    def normalizer(self) -> Normalizer:  # type: ignore[override]
        return "mean" if self.centered else "none"

    def reference(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return 0.5 * log_ratio(log_q, log_p) ** 2

    def terms(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        skipped = (log_q == -math.inf) & (log_p == -math.inf)
        slope = zero_where(skipped, log_q - log_p)
        return slope.square().mul_(0.5), slope


REGISTRY: dict[str, type[Divergence]] = {
    cls.name: cls
    for cls in (
        ForwardKL, ReverseKL, SymmetricKL, JSD, SkewKL, SkewReverseKL, TotalVariation, AlphaDivergence, ABDivergence, LogitMSE,
    )
}  # fmt: skip


def defined_for(tail: str) -> tuple[str, ...]:
    """Return the sorted names of the divergences that support a sparse teacher with this tail."""
    return tuple(sorted(name for name, cls in REGISTRY.items() if tail in cls.tails))


def resolve(divergence: object) -> Divergence:
    """Return the divergence for a snake-case name, with default parameters. An instance is returned unchanged.

    Raises:
        ValueError: unknown name; the message lists the valid names.
        TypeError: the argument is neither a string nor a divergence.
    """
    if isinstance(divergence, Divergence):
        return divergence
    if isinstance(divergence, str):
        if divergence not in REGISTRY:
            raise ValueError(f"divergence {divergence!r} is unknown; valid names: {', '.join(REGISTRY)}")
        return REGISTRY[divergence]()
    if isinstance(divergence, type) and issubclass(divergence, Divergence):
        raise TypeError(f"divergence must be an instance: write {divergence.__name__}() instead of {divergence.__name__}")
    raise TypeError(f"divergence must be a name or a kdkernels divergence, got {type(divergence).__name__}")


def of_beta(beta: float) -> Divergence:
    """Return the generalized JSD of GKD, TRL and Liger: forward KL for ``beta`` = 0, reverse KL for 1, the JSD between them."""
    if beta == 0:
        return ForwardKL()
    return ReverseKL() if beta == 1 else JSD(beta=beta)


def parse(value: object) -> Divergence:
    """Return the divergence for an instance, a name, text such as ``"jsd(beta=0.3)"``, or a mapping ``{"name": "jsd", "beta": 0.3}``.

    Raises:
        ValueError: unknown name or parameter, or a parameter out of range; the message lists what is valid.
        TypeError: the argument has another type.
    """
    if isinstance(value, Mapping):
        parameters = dict(value)
        name = parameters.pop("name", None)
    elif isinstance(value, str) and "(" in value:
        name, parameters = _call(value)
    else:
        return resolve(value)
    cls = type(resolve(name))
    names = [f.name for f in dataclasses.fields(cls)]
    if unknown := [p for p in parameters if p not in names]:
        raise ValueError(f"divergence {name!r} has no parameter {unknown[0]!r}; it has: {', '.join(names) or 'none'}")
    return cls(**parameters)


def _call(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``"jsd(beta=0.3)"`` as ``("jsd", {"beta": 0.3})``."""
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args and all(k.arg for k in call.keywords)):
            raise ValueError
        return call.func.id, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise ValueError(
            f"divergence {text!r} cannot be parsed: write a name, or a name with parameters such as 'jsd(beta=0.3)'; "
            f"names: {', '.join(REGISTRY)}"
        ) from None


def spelled(divergence: Divergence) -> str:
    """Return the divergence as text, so that arguments can be saved as JSON: the inverse of ``parse``."""
    values = dataclasses.asdict(divergence)
    changed = {k: v for k, v in values.items() if v != getattr(type(divergence)(), k)}
    return divergence.name + (f"({', '.join(f'{k}={v!r}' for k, v in changed.items())})" if changed else "")
