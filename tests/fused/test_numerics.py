"""NaN and infinities stay in their rows; excluded columns, extreme logits, float16 ranges and padded vocabularies."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import interpreted, require
from hypothesis import given
from hypothesis import strategies as st
from oracle import (
    DIVERGENCES,
    NEGATIVE,
    ONE_OF_EACH,
    assert_close_2x,
    check,
    dense_loss,
    divergence,
    error,
    make_labels,
    make_side,
    name_of,
    run,
    truth_of,
)
from torch import Tensor

import kdkernels as kd
from kdkernels.backends import selection
from kdkernels.divergences import Divergence
from kdkernels.sides.head import HeadRows

pytestmark = pytest.mark.usefixtures("poison")

one_of_each = pytest.mark.parametrize("d", ONE_OF_EACH, ids=name_of)
NAN, INF = math.nan, math.inf


def heads(leading: tuple[int, ...] = (6,), vocab: int = 40, device: str = "cpu", **kw: Any) -> tuple[Any, Any]:
    return make_side(leading, vocab, 8, seed=1, device=device, **kw), make_side(leading, vocab, 12, seed=2, device=device, **kw)


def logits(leading: tuple[int, ...] = (6,), vocab: int = 40, device: str = "cpu", **kw: Any) -> tuple[Any, Any]:
    return make_side(leading, vocab, None, seed=1, device=device, **kw), make_side(leading, vocab, None, seed=2, device=device, **kw)


# ---- bad rows stay in their rows


@one_of_each
@pytest.mark.parametrize("kind", ["head", "dense"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bad_rows_stay_in_their_rows(d: Divergence, kind: str, side: str, reduction: str, any_backend: str, device: str) -> None:
    if interpreted(any_backend, device) and (kind == "head" or reduction == "sum"):
        pytest.skip("the row kernel gets the same rows: not in the interpreter")
    student, teacher = heads(device=device) if kind == "head" else logits(device=device)
    options = {"divergence": d, "temperature": 2.0, "chunk_rows": 4, "backend": any_backend}
    clean = run(kd.distillation_loss, student, teacher, {**options, "reduction": "none"})
    chosen = student if side == "student" else teacher
    rows = chosen if isinstance(chosen, Tensor) else chosen.hidden
    rows[2, 3], rows[4, 1] = NAN, INF  # in the first chunk and in the second
    actual = run(kd.distillation_loss, student, teacher, {**options, "reduction": reduction})
    others = torch.tensor([0, 1, 3, 5], device=device)
    if reduction == "none":
        assert torch.equal(actual["loss"][others], clean["loss"][others])
        assert actual["loss"][2].isnan()
        assert kind == "head" or not torch.isfinite(actual["loss"][4])
    name = "d_hidden" if kind == "head" else "d_logits"
    assert torch.equal(actual[name][others], clean[name][others])


@pytest.mark.parametrize("kind", ["head", "dense"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_contribute_nothing(kind: str, bad: float, reduction: str, any_backend: str, device: str) -> None:
    """A NaN in an ignored row must not reach the head's gradient as 0 * NaN."""
    student, teacher = heads(device=device, bias=True) if kind == "head" else logits(device=device)
    labels = make_labels((6,), 40, device)
    options = {
        "labels": labels,
        "ce_weight": 0.5,
        "reduction": reduction,
        "backend": any_backend,
        "token_weights": torch.rand(6, device=device),
    }
    clean = run(kd.distillation_loss, student, teacher, options)
    for side in (student, teacher):
        (side if isinstance(side, Tensor) else side.hidden)[labels == -100] = bad
    options["token_weights"][labels == -100] = bad
    actual = run(kd.distillation_loss, student, teacher, options)
    for name, value in clean.items():
        assert torch.equal(actual[name], value), name


def test_ignored_rows_in_statistics(any_backend: str, device: str) -> None:
    student, teacher = heads(device=device)
    labels = make_labels((6,), 40, device)
    student.hidden[labels == -100] = NAN
    teacher.hidden[labels == -100] = NAN
    _, stats = kd.distillation_loss(student, teacher, labels=labels, return_stats=True, backend=any_backend)
    for value in vars(stats).values():
        assert torch.isfinite(value).all()
        assert (value[labels == -100] == 0).all()


# ---- excluded columns (-inf)

FINITE_WITHOUT_TEACHER = [  # finite for p = 0 < q
    d for d in DIVERGENCES
    if isinstance(d, (kd.ForwardKL, kd.JSD, kd.SkewKL, kd.SkewReverseKL, kd.TotalVariation))
    or (isinstance(d, kd.AlphaDivergence) and d.alpha > 0) or (isinstance(d, kd.ABDivergence) and d.alpha > 0 and d.alpha + d.beta > 0)
]  # fmt: skip
INFINITE_WITHOUT_TEACHER = [d for d in (*DIVERGENCES, *NEGATIVE) if d not in FINITE_WITHOUT_TEACHER and not isinstance(d, kd.LogitMSE)]
FINITE_WITHOUT_STUDENT = [  # finite for q = 0 < p
    d for d in DIVERGENCES
    if isinstance(d, (kd.ReverseKL, kd.JSD, kd.SkewKL, kd.SkewReverseKL, kd.TotalVariation))
    or (isinstance(d, kd.AlphaDivergence) and d.alpha < 1) or (isinstance(d, kd.ABDivergence) and d.beta > 0 and d.alpha + d.beta > 0)
]  # fmt: skip
INFINITE_WITHOUT_STUDENT = [d for d in (*DIVERGENCES, *NEGATIVE) if d not in FINITE_WITHOUT_STUDENT and not isinstance(d, kd.LogitMSE)]


@pytest.mark.parametrize("d", FINITE_WITHOUT_TEACHER, ids=name_of)
def test_columns_excluded_by_the_teacher_are_finite(d: Divergence, any_backend: str, device: str) -> None:
    """A grammar, a top-k filter or an unused token gives p = 0."""
    student, teacher = logits(device=device)
    teacher[:, 3:9] = -INF
    teacher[1, :] = -INF
    teacher[1, 4] = 0.0  # a single token has probability 1
    result = check(any_backend, student, teacher, {"divergence": d, "temperature": 2.0, "reduction": "none"})
    assert all(torch.isfinite(v).all() for v in result.values())


@pytest.mark.parametrize("d", INFINITE_WITHOUT_TEACHER, ids=name_of)
def test_columns_excluded_by_the_teacher_are_infinite(d: Divergence, any_backend: str, device: str) -> None:
    """The loss is +inf as in the definition, not NaN, and other rows do not change."""
    student, teacher = logits(device=device)
    options = {"divergence": d, "reduction": "none", "backend": any_backend}
    clean = run(kd.distillation_loss, student, teacher, options)
    teacher[2, 3:9] = -INF
    actual = run(kd.distillation_loss, student, teacher, options)
    assert actual["loss"][2].item() == INF
    others = torch.tensor([0, 1, 3, 4, 5], device=device)
    assert torch.equal(actual["loss"][others], clean["loss"][others])
    assert torch.equal(actual["d_logits"][others], clean["d_logits"][others])


@pytest.mark.parametrize("d", FINITE_WITHOUT_STUDENT, ids=name_of)
def test_columns_excluded_by_the_student_are_finite(d: Divergence, any_backend: str, device: str) -> None:
    student, teacher = logits(device=device)
    student[:, 3:9] = -INF
    result = check(any_backend, student, teacher, {"divergence": d, "reduction": "none"})
    assert all(torch.isfinite(v).all() for v in result.values())


@pytest.mark.parametrize("d", INFINITE_WITHOUT_STUDENT, ids=name_of)
def test_columns_excluded_by_the_student_are_infinite(d: Divergence, any_backend: str, device: str) -> None:
    student, teacher = logits(device=device)
    options = {"divergence": d, "reduction": "none", "backend": any_backend}
    clean = run(kd.distillation_loss, student, teacher, options)
    student[2, 5] = -INF
    actual = run(kd.distillation_loss, student, teacher, options)
    assert actual["loss"][2].item() == INF
    others = torch.tensor([0, 1, 3, 4, 5], device=device)
    assert torch.equal(actual["loss"][others], clean["loss"][others])
    assert torch.equal(actual["d_logits"][others], clean["d_logits"][others])
    if isinstance(d, kd.ForwardKL):  # its gradient q - p is finite here too
        assert not actual["d_logits"].isnan().any()
        torch.testing.assert_close(actual["d_logits"][2], torch.softmax(student[2], -1) - torch.softmax(teacher[2], -1))


@one_of_each
def test_columns_that_both_exclude_are_skipped(d: Divergence, any_backend: str, device: str) -> None:
    """They have no effect, also not on the mean that centered LogitMSE subtracts."""
    student, teacher = logits(device=device)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[0, 7, 8, 39]] = False
    options = {"divergence": d, "temperature": 2.0, "reduction": "none", "labels": torch.full((6,), 5, device=device), "ce_weight": 0.5}
    truth = run(
        kd.distillation_loss, student[:, keep], teacher[:, keep], {**options, "backend": any_backend, "labels": options["labels"] - 1}
    )
    student[:, ~keep] = -INF
    teacher[:, ~keep] = -INF
    actual = run(kd.distillation_loss, student, teacher, {**options, "backend": any_backend})
    torch.testing.assert_close(actual["loss"], truth["loss"])
    torch.testing.assert_close(actual["d_logits"][:, keep], truth["d_logits"])
    assert (actual["d_logits"][:, ~keep] == 0).all()


@one_of_each
def test_infinite_divergence_of_weight_0_is_ignored(d: Divergence, any_backend: str, device: str) -> None:
    """``kd_weight=0`` gives cross-entropy only, as at the end of an annealing schedule."""
    student, teacher = logits(device=device)
    teacher[:, 3] = -INF
    student[:, 9] = -INF
    options = {"divergence": d, "kd_weight": 0.0, "ce_weight": 1.0, "labels": torch.full((6,), 5, device=device)}
    actual = run(kd.distillation_loss, student, teacher, {**options, "backend": any_backend})
    leaf = student.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, options["labels"])
    expected.backward()
    torch.testing.assert_close(actual["loss"], expected.detach())
    torch.testing.assert_close(actual["d_logits"], leaf.grad)
    zero = run(kd.distillation_loss, student, teacher, {"divergence": d, "kd_weight": 0.0, "backend": any_backend})
    assert all((value == 0).all() for value in zero.values())


def test_statistics_with_empty_columns(any_backend: str, device: str) -> None:
    student, teacher = logits(device=device)
    teacher[:, 3:9] = -INF
    student[:, 3:5] = -INF
    _, stats = kd.distillation_loss(student, teacher, return_stats=True, backend=any_backend)
    for value, z in ((stats.student_entropy, student), (stats.teacher_entropy, teacher)):
        p = torch.softmax(z.double(), -1)
        torch.testing.assert_close(value.double(), torch.special.entr(p).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [-INF])
def test_bias_of_minus_infinity_excludes_a_token(bias: float, any_backend: str, device: str) -> None:
    """A bias of -inf in both heads excludes a token."""
    student, teacher = heads(device=device, bias=True)
    plain = {"divergence": kd.JSD(), "reduction": "none", "backend": any_backend}
    keep = torch.arange(40, device=device) != 7

    def cut(side: Any) -> Any:
        return kd.LMHead(side.hidden, side.weight[keep], side.bias[keep])

    expected = run(kd.distillation_loss, cut(student), cut(teacher), plain)
    student.bias[7] = teacher.bias[7] = bias
    actual = run(kd.distillation_loss, student, teacher, plain)
    torch.testing.assert_close(actual["loss"], expected["loss"])
    torch.testing.assert_close(actual["d_hidden"], expected["d_hidden"])
    torch.testing.assert_close(actual["d_weight"][keep], expected["d_weight"])
    assert (actual["d_weight"][~keep] == 0).all()


# ---- extreme but finite

BOUNDED = [  # value and gradient are finite in float32 for all finite float32 logits
    kd.ForwardKL(), kd.ReverseKL(), kd.SymmetricKL(0.3), kd.JSD(0.3), kd.SkewKL(0.2), kd.SkewReverseKL(0.2), kd.TotalVariation(),
    kd.AlphaDivergence(0.4), kd.ABDivergence(), kd.LogitMSE(), kd.LogitMSE(centered=True),
]  # fmt: skip
extreme = st.sampled_from([0.0, 1.0, -1.0, 1e-4, 88.0, -88.0, 104.0, 1e4, -1e4, 60000.0, -60000.0])


def check_extreme(
    backend: str, device: str, rows: list[tuple[float, float]], d: Divergence, dtype: torch.dtype, temperature: float
) -> None:
    student, teacher = torch.tensor(rows, dtype=torch.float64).t()[:, None, :].to(device, dtype)
    options = {"divergence": d, "temperature": temperature, "reduction": "none"}
    truth = truth_of(student, teacher, options)
    result = run(kd.distillation_loss, student, teacher, {**options, "backend": backend})
    assert torch.isfinite(truth["loss"]).all()
    # A logit has an error of half an ulp, and the loss is linear in it (quadratic for LogitMSE, whose value is large).
    size = float(max(student.abs().max(), teacher.abs().max())) * max(1.0, temperature)
    eager = run(dense_loss, student, teacher, options)
    assert_close_2x("loss", result["loss"], eager["loss"].nan_to_num(0.0), truth["loss"], scale=size)
    if dtype == torch.float32 or float(truth["d_logits"].abs().max()) < 6e4:
        assert_close_2x("d_logits", result["d_logits"], eager["d_logits"].nan_to_num(0.0), truth["d_logits"], scale=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
@given(
    rows=st.lists(st.tuples(extreme, extreme), min_size=1, max_size=9),
    d=st.sampled_from(BOUNDED),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
def test_random_extreme_logits_keep_accuracy(
    dtype: torch.dtype, rows: list[tuple[float, float]], d: Divergence, temperature: float
) -> None:
    for backend in ("torch", "native"):
        if selection.unavailable(backend, "cpu", (dtype, dtype)) is None:
            check_extreme(backend, "cpu", rows, d, dtype, temperature)


@pytest.mark.parametrize("d", BOUNDED, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_fixed_extreme_logits_keep_accuracy(d: Divergence, dtype: torch.dtype, backend: str, device: str) -> None:
    """Use fixed rows for every backend, since hypothesis is too slow on a GPU or in an interpreter."""
    require(backend, device, dtype)
    for row in (
        [(1e4, -1e4), (-1e4, 1e4), (0.0, 0.0)],
        [(60000.0, -60000.0), (-60000.0, 60000.0), (0.0, 0.0)],
        [(-60000.0, -60000.0), (-60000.0, -59968.0)],
        [(104.0, 0.0), (0.0, 104.0), (-104.0, -88.0)],
        [(60000.0, 60000.0), (59968.0, 60000.0), (-60000.0, 60000.0)],
    ):
        check_extreme(backend, device, row, d, dtype, 1.0)


SOFTMAX_DIVERGENCES = [d for d in ONE_OF_EACH if d.normalizer == "softmax"]


@pytest.mark.parametrize("d", SOFTMAX_DIVERGENCES, ids=name_of)
@pytest.mark.parametrize("kind", ["head", "dense"])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e3, 1e4])
def test_common_offset_of_logits_keeps_accuracy(d: Divergence, kind: str, offset: float, backend: str, device: str) -> None:
    """A softmax does not change if a number is added to all logits of a row, and its accuracy must not change either.

    With the log-sum-exp as a single number, the error would be half an ulp of the offset, 6e-5 at 1e3.
    """
    if interpreted(backend, device) and not isinstance(d, (kd.ForwardKL, kd.JSD)):
        pytest.skip("the slow interpreter runs one divergence with a declared slope sum and one without")
    student, teacher = heads(device=device, bias=True) if kind == "head" else logits(device=device)
    (student if kind == "dense" else student.bias).add_(offset)
    (teacher if kind == "dense" else teacher.bias).sub_(offset)
    labels = make_labels((6,), 40, device, masked=False)
    for more in ({}, {"temperature": 2.0, "labels": labels, "ce_weight": 0.5}):
        options = {"divergence": d, "reduction": "none", **more}
        result = run(kd.distillation_loss, student, teacher, {**options, "backend": backend})
        eager, truth = run(dense_loss, student, teacher, options), truth_of(student, teacher, options)
        for name, value in result.items():
            floor = 2.0**-19 * float(truth[name].abs().max())
            kernel_error, torch_error = error(value, truth[name]), error(eager[name], truth[name])
            assert kernel_error <= 2 * torch_error + floor, (
                f"{name}: error {kernel_error:.3e}, same-dtype torch {torch_error:.3e}, floor {floor:.1e}"
            )


@pytest.mark.parametrize(
    "d",
    [kd.AlphaDivergence(0.5), kd.AlphaDivergence(0.2), kd.AlphaDivergence(0.8), kd.AlphaDivergence(2.0), kd.ABDivergence()],
    ids=name_of,
)
def test_power_gradients_keep_their_digits_in_every_column(d: Divergence, backend: str, device: str) -> None:
    """In a row with q / p from 1e-30 to 1e30, each gradient has a relative error below 1e-4 of its parts, slope and ``q * sum(slopes)``."""
    x = torch.linspace(-34.5, 34.5, 139, device=device)[None]
    u = -x
    actual = run(kd.distillation_loss, x, u, {"divergence": d, "reduction": "none", "backend": backend})["d_logits"].double()
    log_q, log_p = (torch.log_softmax(t.double(), -1) for t in (x, u))
    q = log_q.exp()
    _, slope = d.terms(log_q.clone(), log_p.clone(), q, log_p.exp())  # float64, compared with 60 digits in test_divergences.py
    center = q * slope.sum(-1, keepdim=True)
    parts = slope.abs() + center.abs()
    representable = parts > 1e-35
    assert representable.sum() > 100
    worst = ((actual - (slope - center)).abs() / parts)[representable].max()
    assert worst <= 1e-4


finite = st.floats(-80, 80, width=32)


@given(
    rows=st.integers(1, 3).flatmap(
        lambda n: st.integers(1, 9).flatmap(lambda v: st.lists(st.lists(finite, min_size=2 * v, max_size=2 * v), min_size=n, max_size=n))
    ),
    d=st.sampled_from(BOUNDED),
)
def test_random_shapes_and_values_equal_the_oracle(rows: list[list[float]], d: Divergence) -> None:
    pairs = torch.tensor(rows, dtype=torch.float32)
    student, teacher = pairs.chunk(2, -1)
    for backend in ("torch", "native"):
        if selection.unavailable(backend, "cpu", (torch.float32,) * 2) is None:
            result = run(kd.distillation_loss, student, teacher, {"divergence": d, "reduction": "none", "backend": backend})
            truth = divergence(d, student.double(), teacher.double())
            assert error(result["loss"], truth) <= 1e-5 * max(1.0, float(pairs.abs().max()), float(truth.max()))
            assert float(result["loss"].min()) >= -1e-6


@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
def test_small_gradients_of_float16_survive(loss_scale: float, backend: str, device: str) -> None:
    """A large vocabulary has probabilities below the smallest float16. With a gradient scaler they must not be lost."""
    require(backend, device, torch.float16)
    student, teacher = heads((4,), 3000, device, dtype=torch.float16)
    check(backend, student, teacher, {"reduction": "mean", "num_items": 1000}, upstream=loss_scale)


@pytest.mark.parametrize("device_layout", [False, True])
@pytest.mark.parametrize("d", [kd.ForwardKL(), kd.JSD(), kd.LogitMSE()], ids=name_of)
@pytest.mark.parametrize(
    ("sides", "options", "upstream"),
    [
        ({}, {"token_weights": 4000.0, "num_items": 4000}, 1.0),
        ({}, {"token_weights": 1e-6}, 1e6),
        ({}, {"kd_weight": 5e3, "num_items": 5000}, 1.0),
        ({}, {"kd_weight": 1e-4, "num_items": 1}, 1e3),
        ({}, {"temperature": 8.0, "ce_weight": 2e3, "labels": 7, "num_items": 1000}, 1.0),
        ({"scale": 512.0}, {"num_items": 500}, 1.0),
        ({}, {"reduction": "none", "token_weights": 2.0}, 600.0),
        ({}, {"reduction": "none"}, 1e-6),
    ],
)  # fmt: skip
def test_weights_and_scales_do_not_overflow_float16(
    sides: dict[str, Any], options: dict[str, Any], upstream: float, d: Divergence, device_layout: bool, engine_backend: str, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On a GPU, logit gradients are float16 in the matrix products. ``device_layout`` does the same on a CPU."""
    require(engine_backend, device, torch.float16)
    if device_layout:
        monkeypatch.setattr(HeadRows, "dz_dtype", property(lambda head: head.dtype))
    student, teacher = heads((6,), 300, device, dtype=torch.float16, **sides)
    more: dict[str, Any] = {"divergence": d, "chunk_rows": 4, **options}
    if "token_weights" in more:  # ten to one
        more["token_weights"] = more["token_weights"] * torch.linspace(0.1, 1.0, 6, device=device)
    if "labels" in more:
        more["labels"] = torch.full((6,), more["labels"], device=device)
    result = check(engine_backend, student, teacher, more, upstream=upstream)
    if not isinstance(d, kd.LogitMSE):  # its gradient may exceed float16, in eager torch too
        assert all(torch.isfinite(value).all() for value in result.values())


@pytest.mark.parametrize(
    ("options", "upstream"),
    [
        ({"kd_weight": 1e6, "num_items": 100_000}, 1.0),
        ({"token_weights": 1e6, "reduction": "none"}, 1e-5),
        ({"temperature": 300.0, "kd_weight": 300.0, "num_items": 1000}, 1.0),
        ({"reduction": "sum"}, 2.0**14),  # as from a gradient scaler
        ({"reduction": "none", "token_weights": 1e-4}, 2.0**14),
    ],
)
def test_gradient_of_float16_logits_does_not_overflow_or_vanish(
    options: dict[str, Any], upstream: float, backend: str, device: str
) -> None:
    """The gradient fits in float16 only after all factors have been multiplied."""
    require(backend, device, torch.float16)
    student = make_side((4,), 3000, None, seed=1, device=device, dtype=torch.float16)
    teacher = make_side((4,), 3000, 12, seed=2, device=device, dtype=torch.float16)
    options = dict(options)
    if "token_weights" in options:
        options["token_weights"] = torch.full((4,), options["token_weights"], device=device)
    result = check(backend, student, teacher, options, upstream=upstream)
    assert torch.isfinite(result["d_logits"]).all()
    assert (result["d_logits"] != 0).float().mean() > 0.9


def test_saturated_softcap_is_as_accurate_as_eager(any_backend: str, device: str) -> None:
    """Near saturation 1 - tanh^2 loses digits, but not more than in eager torch."""
    student, teacher = heads(device=device, softcap=2.0, spread=12.0)
    check(any_backend, student, teacher, {"reduction": "none"})


# ---- padded vocabularies


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_rows_beyond_vocab_size_have_no_effect(reduction: str, dtype: torch.dtype, any_backend: str, device: str) -> None:
    """Rows of the head beyond ``vocab_size`` are not read, so they may be NaN. Their gradient is zero."""
    require(any_backend, device, dtype)
    student, teacher = heads(device=device, bias=True, dtype=dtype)
    options = {"labels": make_labels((6,), 40, device), "ce_weight": 0.5, "reduction": reduction, "backend": any_backend, "chunk_rows": 2}
    plain = run(kd.distillation_loss, student, teacher, options)

    def padded(side: Any, by: int) -> Any:
        def pad(t: Tensor) -> Tensor:
            return torch.cat([t, torch.full((by, *t.shape[1:]), NAN, dtype=t.dtype, device=t.device)])

        return kd.LMHead(side.hidden, pad(side.weight), pad(side.bias), vocab_size=40)

    actual = run(kd.distillation_loss, padded(student, 24), padded(teacher, 5), options)
    for name, value in plain.items():
        cut = name in ("d_weight", "d_bias")
        # A BLAS may sum in another order for another leading dimension.
        torch.testing.assert_close(
            actual[name][:40] if cut else actual[name], value, rtol=2e-6 if dtype == torch.float32 else 8e-3, atol=1e-6
        )
        if cut:
            assert (actual[name][40:] == 0).all()


def test_labels_in_the_padding_are_out_of_range(any_backend: str) -> None:
    student, teacher = heads(pad=3)
    with pytest.raises(ValueError, match=r"labels contain 41 .*\[0, 40\)"):
        kd.distillation_loss(student, teacher, labels=torch.full((6,), 41), backend=any_backend)
