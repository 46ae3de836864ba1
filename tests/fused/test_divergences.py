"""Divergences without a loss: the oracle against hand-derived gradients, then the package's two forms against the oracle."""

from __future__ import annotations

import dataclasses
import decimal
import math

import pytest
import torch
from conftest import require
from hypothesis import given
from hypothesis import strategies as st
from oracle import DIVERGENCES, NEGATIVE, ONE_OF_EACH, closed_form, divergence, name_of, run, truth_of
from torch import Tensor

import kdkernels as kd
from kdkernels import divergences, reference
from kdkernels.divergences import REGISTRY, Divergence

every = pytest.mark.parametrize("d", DIVERGENCES, ids=name_of)
one_of_each = pytest.mark.parametrize("d", ONE_OF_EACH, ids=name_of)


def pair(seed: int = 0, rows: int = 7, vocab: int = 31, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, u = (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    return x, u


def value_and_gradient(d: Divergence, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return D ``[N]`` and ``T * dD/dz_s [N, V]``, computed from ``terms`` as the kernels do."""
    log_q, log_p = reference.normalize(x, u, d), reference.normalize(u, x, d)
    value, slope = d.terms(log_q.clone(), log_p.clone(), log_q.exp(), log_p.exp())
    total = slope.sum(-1, keepdim=True) if d.slope_sum is None else torch.full_like(slope[:, :1], d.slope_sum)
    gradient = slope - torch.softmax(x, -1) * total if d.normalizer == "softmax" else slope
    return value.sum(-1), gradient


@every
def test_oracle_gradient_equals_the_closed_form(d: Divergence) -> None:
    """The two forms in oracle.py were written independently of each other."""
    x, u = pair()
    x.requires_grad_()
    divergence(d, x, u).sum().backward()
    torch.testing.assert_close(x.grad, closed_form(d, x.detach(), u), rtol=1e-9, atol=1e-12)


@every
def test_reference_equals_the_oracle(d: Divergence) -> None:
    x, u = pair(1)
    columns = d.reference(reference.normalize(x, u, d), reference.normalize(u, x, d))
    assert columns.shape == x.shape
    torch.testing.assert_close(columns.sum(-1), divergence(d, x, u), rtol=1e-11, atol=1e-13)


@every
@pytest.mark.parametrize("spread", [1e-3, 2.0, 8.0])
def test_terms_give_value_and_gradient(d: Divergence, spread: float) -> None:
    x, u = pair(2, spread=spread)
    value, gradient = value_and_gradient(d, x, u)
    # The oracle subtracts sums near 1, so its error is relative to 1 even for a small divergence. Ours is not, see below.
    torch.testing.assert_close(value, divergence(d, x, u), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(gradient, closed_form(d, x, u), rtol=1e-9, atol=1e-13 * max(1.0, float(value.max())))


@every
def test_declared_slope_sum_is_the_sum_of_slopes(d: Divergence) -> None:
    """Kernels skip a sweep over a row if the sum is declared."""
    if d.slope_sum is None or d.normalizer != "softmax":
        pytest.skip("not declared")
    log_q, log_p = (torch.log_softmax(t, -1) for t in pair(3))
    _, slope = d.terms(log_q.clone(), log_p.clone(), log_q.exp(), log_p.exp())
    torch.testing.assert_close(slope.sum(-1), torch.full((7,), d.slope_sum, dtype=torch.float64))


@every
def test_columns_of_a_value_are_not_negative(d: Divergence) -> None:
    """Then their sum loses no digits by cancellation and is not negative."""
    for dtype, spread in [(torch.float64, 2.0), (torch.float64, 1e-5), (torch.float32, 2.0), (torch.float32, 1e-4)]:
        x, u = (t.to(dtype) for t in pair(4, spread=spread))
        log_q, log_p = reference.normalize(x, u, d), reference.normalize(u, x, d)
        value, _ = d.terms(log_q.clone(), log_p.clone(), log_q.exp(), log_p.exp())
        # Rounding of log q alone moves f off its quadratic minimum by eps * q.
        assert float(value.min()) >= -4 * torch.finfo(dtype).eps


@every
@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_close_pairs_keep_their_digits(d: Divergence, gap: float) -> None:
    """Near p = q a divergence is O(gap^2), and a naive float32 formula would return rounding noise."""
    x, u = pair(5, spread=1.0)
    x = u + gap * x
    x, u = x.float().double(), u.float().double()
    value, gradient = value_and_gradient(d, x.float(), u.float())
    true_value, true_gradient = value_and_gradient(d, x, u)  # float64, compared with the oracle above
    # log q - log p has an error of about eps in float32, which is eps / gap relative, and twice that in a square.
    relative = 2.0**-22 / gap
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=0, atol=32 * relative * float(true_gradient.abs().max()))
    if not isinstance(d, kd.TotalVariation):
        tolerance = 64 * max(relative, 2.0**-22 / gap**2)
        torch.testing.assert_close(value.double(), true_value, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    "d", [kd.JSD(0.999), kd.JSD(0.001), kd.SkewKL(0.999), kd.SkewReverseKL(0.001), kd.SkewReverseKL(0.999)], ids=name_of
)
def test_unequal_mixtures_keep_their_digits(d: Divergence) -> None:
    """log m must be accurate if m is mostly the smaller probability: 1 - 0.999 (1 - small) must not be a subtraction.

    Columns are compared one by one, float32 with float64 from the same rounded logarithms. The skewed forms are differences of terms
    of size (1 - alpha) max(p, q), which adds to their tolerance.
    """
    log_q = torch.linspace(-12, -0.01, 200).repeat(2)
    log_p = torch.cat([log_q[:200] - 9, log_q[:200] + 9])  # p and q differ by a factor of 8000
    log_q = torch.cat([log_q[:200], log_q[:200]])
    actual = d.terms(log_q.clone(), log_p.clone(), log_q.exp(), log_p.exp())
    wide = (log_q.double(), log_p.double())
    true = d.terms(wide[0].clone(), wide[1].clone(), wide[0].exp(), wide[1].exp())
    cancelled = 0.0 if isinstance(d, kd.JSD) else (1 - d.alpha) * torch.maximum(*wide).exp()
    for column, truth in zip(actual, true, strict=True):
        excess = (column.double() - truth).abs() - 2e-6 * truth.abs() - 2 * torch.finfo(torch.float32).eps * cancelled
        assert float(excess.max()) <= 0.0


POWERS = [d for d in DIVERGENCES if isinstance(d, (kd.AlphaDivergence, kd.ABDivergence))]
POWERS += [kd.AlphaDivergence(0.99), kd.ABDivergence(0.7, 0.2), kd.ABDivergence(1.0, -0.4), *NEGATIVE]
RATIOS = [sign * ratio for ratio in (1e-3, 0.1, 0.7, 1.5, 2.5, 5.0, 11.0, 20.0, 40.0, 69.0) for sign in (1, -1)]
"""Values of log(q / p), for q / p from 1e-30 to 1e30."""


def exact_terms(d: Divergence, log_q: float, log_p: float) -> tuple[float, float]:
    """Return value and slope of a column of a power divergence by the papers' formula, in 60 digits."""
    with decimal.localcontext(prec=60):
        a, b = (decimal.Decimal(x) for x in (d.parameters if isinstance(d, kd.ABDivergence) else (d.alpha, 1.0 - d.alpha)))
        lq, lp, s = decimal.Decimal(log_q), decimal.Decimal(log_p), a + b
        mean, q, p = (a * lp + b * lq).exp(), (s * lq).exp(), (s * lp).exp()
        return float(-(mean - a / s * p - b / s * q) / (a * b)), float((q - mean) / a)


@pytest.mark.parametrize("implementation", ["float32", "float64", "compiled"])
@pytest.mark.parametrize("d", POWERS, ids=name_of)
def test_power_columns_keep_their_digits(d: Divergence, implementation: str) -> None:
    """For any p / q, the error of a slope is a few ulp of the slope, not of the larger probability."""
    wide = implementation != "float32"
    dtype = torch.float64 if wide else torch.float32
    for ratio in RATIOS:
        larger = -0.5
        log_q, log_p = torch.tensor([larger + min(ratio, 0.0), larger - max(ratio, 0.0)], dtype=dtype)
        q, p = log_q.exp(), log_p.exp()
        true_value, true_slope = exact_terms(d, log_q.item(), log_p.item())
        if not wide and max(abs(true_value), abs(true_slope)) > 1e38:
            continue
        if implementation == "compiled":
            compiled = pytest.importorskip("kdkernels._C")
            actual = compiled.divergence_terms(d.id, log_q.item(), log_p.item(), q.item(), p.item(), *d.kernel_parameters)
        else:
            actual = [term.item() for term in d.terms(log_q[None].clone(), log_p[None].clone(), q[None], p[None])]
        # The argument x of exp has an error of half an ulp of x, which is the relative error of exp(x).
        exponents = max(1.0, *(abs(x) for x in (*d.parameters, d.kernel_parameters[1], sum(d.kernel_parameters))))
        # The slope q^s (1 - (p / q)^a) is small relative to q^s if a is small.
        digits = torch.finfo(dtype).eps * (8 + 2 * abs(ratio) * exponents) * max(1.0, 1 / abs(d.alpha))
        assert actual[1] == pytest.approx(true_slope, rel=digits, abs=1e-44), (ratio, "slope")
        if abs(ratio) >= 0.7:  # near p = q, or with a weight near 0 or 1, a value is a small difference
            assert actual[0] == pytest.approx(true_value, rel=512 * digits, abs=1e-44), (ratio, "value")


@every
def test_equal_logits_have_no_divergence(d: Divergence) -> None:
    x, _ = pair(6)
    for dtype in (torch.float64, torch.float32):
        value, gradient = value_and_gradient(d, x.to(dtype), x.to(dtype))
        assert float(value.abs().max()) == 0.0
        assert float(gradient.abs().max()) <= 4 * torch.finfo(dtype).eps


# ---- relations between divergences, which an error such as swapped arguments would break


def value_of(d: Divergence, x: Tensor, u: Tensor) -> Tensor:
    return value_and_gradient(d, x, u)[0]


def test_direction_of_forward_and_reverse() -> None:
    """Forward is KL(teacher || student): infinite if only the student excludes a token."""
    full, gap = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0.0, 0.0, -math.inf]], dtype=torch.float64)
    assert value_of(kd.ForwardKL(), x=gap, u=full).item() == math.inf
    assert value_of(kd.ForwardKL(), x=full, u=gap).item() == pytest.approx(math.log(3 / 2))
    assert value_of(kd.ReverseKL(), x=gap, u=full).item() == pytest.approx(math.log(3 / 2))
    assert value_of(kd.ReverseKL(), x=full, u=gap).item() == math.inf


def test_values_computed_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2)."""
    u, x = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2.0)
    expected = {
        kd.ForwardKL(): forward,
        kd.ReverseKL(): reverse,
        kd.SymmetricKL(0.25): 0.75 * forward + 0.25 * reverse,
        kd.TotalVariation(): 0.25,
        # m = 0.2 p + 0.8 q = (.55, .45)
        kd.SkewKL(0.2): 0.75 * math.log(0.75 / 0.55) + 0.25 * math.log(0.25 / 0.45),
        # m = 0.8 p + 0.2 q = (.7, .3)
        kd.SkewReverseKL(0.2): 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3),
        kd.JSD(0.2): 0.2 * (0.75 * math.log(0.75 / 0.55) + 0.25 * math.log(0.25 / 0.45))
        + 0.8 * (0.5 * math.log(0.5 / 0.55) + 0.5 * math.log(0.5 / 0.45)),
        kd.AlphaDivergence(2.0): ((0.75**2 + 0.25**2) / 0.5 - 1) / 2,
        kd.ABDivergence(1.0, 1.0): 0.5 * 2 * 0.25**2,
        kd.LogitMSE(): 0.5 * math.log(3.0) ** 2,
        kd.LogitMSE(centered=True): 0.25 * math.log(3.0) ** 2,
    }
    assert {type(d) for d in expected} == set(REGISTRY.values())
    for d, number in expected.items():
        assert value_of(d, x, u).item() == pytest.approx(number, rel=1e-12), d
        assert divergence(d, x, u).item() == pytest.approx(number, rel=1e-12), d


def test_mirrored_divergences_are_equal() -> None:
    x, u = pair(7)
    mirrored = [
        (kd.ForwardKL(), kd.ReverseKL()),
        (kd.SkewKL(0.3), kd.SkewReverseKL(0.3)),
        (kd.JSD(0.3), kd.JSD(0.7)),
        (kd.SymmetricKL(0.3), kd.SymmetricKL(0.7)),
        (kd.AlphaDivergence(0.3), kd.AlphaDivergence(0.7)),
        (kd.ABDivergence(0.2, 0.7), kd.ABDivergence(0.7, 0.2)),
        (kd.TotalVariation(), kd.TotalVariation()),
    ]
    for left, right in mirrored:
        torch.testing.assert_close(value_of(left, x, u), value_of(right, u, x), msg=lambda m, o=left: f"{o}: {m}")


def test_limits_of_parameters_are_other_divergences() -> None:
    """At the end of a parameter's range, a family tends to the divergence that the error message recommends."""
    x, u = pair(8, spread=1.0)
    e = 1e-7
    limits = [
        (kd.SymmetricKL(e), kd.ForwardKL(), 1.0),
        (kd.SymmetricKL(1 - e), kd.ReverseKL(), 1.0),
        (kd.SkewKL(e), kd.ForwardKL(), 1.0),
        (kd.SkewReverseKL(e), kd.ReverseKL(), 1.0),
        (kd.JSD(e), kd.ForwardKL(), e),  # vanishes like beta
        (kd.JSD(1 - e), kd.ReverseKL(), e),
        (kd.AlphaDivergence(1 - e), kd.ForwardKL(), 1.0),
        (kd.AlphaDivergence(e), kd.ReverseKL(), 1.0),
        (kd.ABDivergence(1.0, e), kd.ForwardKL(), 1.0),
        (kd.ABDivergence(e, 1.0), kd.ReverseKL(), 1.0),
        (kd.ABDivergence(0.3, 0.7), kd.AlphaDivergence(0.3), 1.0),  # equal, not only in the limit
    ]
    for near, limit, factor in limits:
        for actual, expected in zip(value_and_gradient(near, x, u), value_and_gradient(limit, x, u), strict=True):
            torch.testing.assert_close(actual, expected * factor, rtol=1e-4, atol=1e-5 * factor, msg=lambda m, n=near: f"{n}: {m}")


logit = st.floats(-50, 50, allow_nan=False, width=32)


@given(st.lists(st.tuples(logit, logit), min_size=1, max_size=12), st.sampled_from(ONE_OF_EACH))
def test_values_are_within_bounds(rows: list[tuple[float, float]], d: Divergence) -> None:
    x, u = torch.tensor(rows, dtype=torch.float64).t()[:, None, :]
    value, gradient = value_and_gradient(d, x.contiguous(), u.contiguous())
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert value.item() >= -1e-15
    upper = {
        "total_variation": 1.0,
        "jsd": -0.3 * math.log(0.3) - 0.7 * math.log(0.7),
        "skew_kl": -math.log(0.2),
        "skew_reverse_kl": -math.log(0.2),
    }
    assert value.item() <= upper.get(d.name, math.inf) + 1e-12
    if d.normalizer != "none":  # a shift of all logits changes no probability
        assert abs(gradient.sum().item()) <= 1e-9 * max(1.0, float(gradient.abs().max()))


# ---- excluded columns


@one_of_each
def test_columns_that_both_exclude_are_skipped(d: Divergence) -> None:
    x, u = pair(9)
    with_gaps = [torch.cat([t, torch.full((7, 3), -math.inf, dtype=torch.float64)], 1) for t in (x, u)]
    value, gradient = value_and_gradient(d, *with_gaps)
    true_value, true_gradient = value_and_gradient(d, x, u)
    torch.testing.assert_close(value, true_value)
    torch.testing.assert_close(gradient[:, :31], true_gradient)
    assert (gradient[:, 31:] == 0).all()
    columns = d.reference(reference.normalize(*with_gaps, d), reference.normalize(*with_gaps[::-1], d))
    torch.testing.assert_close(columns.sum(-1), true_value)


SOFTMAX_ONLY = [d for d in DIVERGENCES if d.normalizer == "softmax"]


@pytest.mark.parametrize("d", SOFTMAX_ONLY, ids=name_of)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_columns_that_one_side_excludes_follow_the_definition(d: Divergence, side: str) -> None:
    """Both forms give the value of the definition, finite or infinite, and never NaN."""
    x, u = pair(10)
    (x if side == "student" else u)[:, 5] = -math.inf
    value, _ = value_and_gradient(d, x, u)
    truth = divergence(d, x, u)
    assert not truth.isnan().any()
    torch.testing.assert_close(value, truth)
    torch.testing.assert_close(d.reference(reference.normalize(x, u, d), reference.normalize(u, x, d)).sum(-1), truth)


@pytest.mark.parametrize("d", NEGATIVE, ids=name_of)
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_negative_powers_of_zero_are_infinite(d: Divergence, side: str) -> None:
    """With alpha + beta < 0 an excluded column has two or three infinite terms. The largest is positive."""
    x, u = pair(10)
    truth = divergence(d, x, u)
    torch.testing.assert_close(value_and_gradient(d, x, u)[0], truth)
    (x if side == "student" else u)[3, 5] = -math.inf
    truth[3] = math.inf
    torch.testing.assert_close(value_and_gradient(d, x, u)[0], truth)
    torch.testing.assert_close(d.reference(reference.normalize(x, u, d), reference.normalize(u, x, d)).sum(-1), truth)


@pytest.mark.parametrize("d", [kd.ABDivergence(0.05, 0.05), kd.ABDivergence(0.02, -0.01), kd.ABDivergence(-0.02, 0.01)], ids=name_of)
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_small_powers_of_tiny_probabilities_count(d: Divergence, backend: str) -> None:
    """exp(-120) is 0 in float32, but exp(-120)^(1/20) is not."""
    require(backend, "cpu")
    x, u = (35 * t.float() for t in pair(11))
    options = {"divergence": d, "reduction": "sum"}
    actual, truth = run(kd.distillation_loss, x, u, {**options, "backend": backend}), truth_of(x, u, options)
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-5, atol=1e-6 * float(truth[name].abs().max()))


# ---- names and parameters


def test_registry_is_complete() -> None:
    assert len(REGISTRY) == 10
    assert sorted(cls.id for cls in REGISTRY.values()) == list(range(10))
    for name, cls in REGISTRY.items():
        assert divergences.resolve(name) == cls()
        assert getattr(kd, cls.__name__) is cls
        assert len(cls().parameters) + len(cls().flags) == len(dataclasses.fields(cls)) <= 2
        assert cls(*cls().parameters, **cls().flags) == cls()
        assert all(isinstance(v, float) for v in cls().parameters)
        with pytest.raises(dataclasses.FrozenInstanceError):
            cls().name = "other"


def test_resolve_accepts_names_and_instances() -> None:
    mine = kd.JSD(0.3)
    assert divergences.resolve(mine) is mine
    with pytest.raises(ValueError, match=r"'kl' is unknown; valid names: forward_kl, .*logit_mse"):
        divergences.resolve("kl")
    with pytest.raises(TypeError, match=r"write JSD\(\) instead of JSD"):
        divergences.resolve(kd.JSD)
    with pytest.raises(TypeError, match="got int"):
        divergences.resolve(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kd.JSD(0), "beta.*ForwardKL"),
        (lambda: kd.JSD(0.0), "beta.*ForwardKL"),
        (lambda: kd.JSD(1), "beta.*ReverseKL"),
        (lambda: kd.JSD(-0.1), r"JSD\(beta\).*-0\.1"),
        (lambda: kd.JSD(1.5), r"JSD\(beta\).*1\.5"),
        (lambda: kd.JSD(math.nan), r"JSD\(beta\).*nan"),
        (lambda: kd.JSD("half"), r"JSD\(beta\).*'half'"),
        (lambda: kd.JSD(True), "beta"),
        (lambda: kd.SymmetricKL(0.0), r"SymmetricKL\(weight\).*0\.0"),
        (lambda: kd.SymmetricKL(1.0), r"SymmetricKL\(weight\).*1\.0"),
        (lambda: kd.SkewKL(0.0), r"SkewKL\(alpha\).*0\.0"),
        (lambda: kd.SkewKL(1.0), r"SkewKL\(alpha\).*1\.0"),
        (lambda: kd.SkewReverseKL(1.0), r"SkewReverseKL\(alpha\).*1\.0"),
        (lambda: kd.SkewReverseKL(-1), r"SkewReverseKL\(alpha\).*-1"),
        (lambda: kd.AlphaDivergence(0), r"AlphaDivergence\(alpha\).*ReverseKL"),
        (lambda: kd.AlphaDivergence(1.0), r"AlphaDivergence\(alpha\).*ForwardKL"),
        (lambda: kd.AlphaDivergence(math.inf), r"AlphaDivergence\(alpha\).*inf"),
        (lambda: kd.ABDivergence(0, 1), "alpha=0"),
        (lambda: kd.ABDivergence(1, 0.0), r"beta=0\.0"),
        (lambda: kd.ABDivergence(0.5, -0.5), r"alpha \+ beta.*0\.5"),
        (lambda: kd.ABDivergence(0.1 + 0.2, -0.3), r"alpha \+ beta.*-0\.3"),  # 5.6e-17
        (lambda: kd.ABDivergence(math.nan, 1.0), r"ABDivergence\(alpha\).*nan"),
        (lambda: kd.ABDivergence(1.0, math.inf), r"ABDivergence\(beta\).*inf"),
        (lambda: kd.LogitMSE(1), r"LogitMSE\(centered\).*1"),
    ],
)
def test_invalid_parameters_raise(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
