"""Loss and gradients of every backend against the definition in float64 and against torch in the same dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import interpreted, require
from oracle import DIVERGENCES, FLOATS, ONE_OF_EACH, all_pairs, check, make_labels, make_side, name_of, run, token_stats, truth_of

import kdkernels as kd
from kdkernels.divergences import Divergence

pytestmark = pytest.mark.usefixtures("poison")

SIDES = ("head/head", "head/dense", "dense/head", "dense/dense")

# Every pair of settings occurs in some case: about 115 cases, where the full product has 27 million. Dtype, sides and reduction
# together decide which code runs, so they have a full product of their own below.
PAIRS = all_pairs(
    {
        "divergence": DIVERGENCES,
        "reduction": ["mean", "mean/int", "mean/tensor", "sum", "none"],
        "dtype": FLOATS,
        "sides": SIDES,
        "temperature": [0.5, 1.0, 2.0, 8.0],
        "labels": ["absent", "given", "masked", "given + ce", "masked + ce"],
        "vocab_size": ["absent", "student", "both"],
        "bias": [False, True],
        "scale": [1.0, 0.25],
        "softcap": [None, 5.0],
        "token_weights": [False, True],
        "t_squared": [True, False],
        "kd_weight": [1.0, 0.3],
        "chunk_rows": [None, 2],
    }
)


def case_id(case: dict[str, Any]) -> str:
    return f"{name_of(case['divergence'])}-{name_of(case['dtype'])}-{case['sides']}-{case['reduction']}"


def random_upstream(leading: tuple[int, ...], device: str) -> torch.Tensor:
    """Return random upstream gradients of both signs, with one zero, as from a policy gradient or a mask outside the loss."""
    upstream = torch.randn(leading, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    upstream.view(-1)[0] = 0.0
    return upstream.to(device)


def options_of(case: dict[str, Any], leading: tuple[int, ...], vocab: int, device: str) -> tuple[dict[str, Any], Any]:
    """Return the loss's keyword arguments and the upstream gradient."""
    options: dict[str, Any] = {k: case[k] for k in ("divergence", "temperature", "t_squared", "kd_weight", "chunk_rows") if k in case}
    reduction, _, denominator = case.get("reduction", "mean").partition("/")
    options["reduction"] = reduction
    if denominator:
        options["num_items"] = 11 if denominator == "int" else torch.tensor(11, device=device)
    labels = case.get("labels", "absent")
    if labels != "absent":
        options["labels"] = make_labels(leading, vocab, device, masked="masked" in labels)
    if "ce" in labels:
        options["ce_weight"] = 0.7
    if case.get("token_weights"):
        weights = torch.rand(leading, generator=torch.Generator().manual_seed(3)) * 2
        weights.view(-1)[-1] = 0.0
        options["token_weights"] = weights.to(device)
    return options, random_upstream(leading, device) if reduction == "none" else 0.75


def sides_of(case: dict[str, Any], leading: tuple[int, ...], vocab: int, device: str, **more: Any) -> tuple[Any, Any]:
    kinds = case.get("sides", "head/head").split("/")
    cut = case.get("vocab_size", "absent")
    head = {k: case[k] for k in ("bias", "scale", "softcap") if k in case}
    common = {"dtype": case.get("dtype", torch.float32), "device": device, **head, **more}
    student = make_side(leading, vocab, 8 if kinds[0] == "head" else None, seed=1, pad=3 if cut != "absent" else None, **common)
    teacher = make_side(leading, vocab, 12 if kinds[1] == "head" else None, seed=2, pad=5 if cut == "both" else None, **common)
    return student, teacher


@pytest.mark.parametrize("case", PAIRS, ids=case_id)
def test_each_pair_of_settings_equals_the_oracle(case: dict[str, Any], backend: str, device: str) -> None:
    require(backend, device, case["dtype"])
    leading, vocab = (2, 4), 61
    options, upstream = options_of(case, leading, vocab, device)
    check(backend, *sides_of(case, leading, vocab, device), options, upstream)


# One setting at a time, so that a failure names its setting.
ALONE: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"scale": 0.25},
    {"scale": -1.5},
    {"softcap": 3.0},
    {"bias": True, "scale": 0.5, "softcap": 3.0},
    {"vocab_size": "both"},
    {"temperature": 0.5},
    {"temperature": 8.0},
    {"temperature": 4.0, "t_squared": False},
    {"kd_weight": 0.3},
    {"kd_weight": 0.0, "labels": "given + ce"},
    {"labels": "masked"},
    {"labels": "masked + ce", "temperature": 2.0},
    {"token_weights": True, "labels": "masked"},
    {"reduction": "mean/int"},
    {"reduction": "mean/tensor"},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"chunk_rows": 1},
]


@pytest.mark.parametrize("case", ALONE, ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "defaults")
def test_each_setting_alone_equals_the_oracle(case: dict[str, Any], any_backend: str, device: str) -> None:
    leading, vocab = (2, 3), 40
    options, upstream = options_of(case, leading, vocab, device)
    check(any_backend, *sides_of(case, leading, vocab, device), options, upstream)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_each_dtype_side_and_reduction_equals_the_oracle(dtype: torch.dtype, sides: str, reduction: str, backend: str, device: str) -> None:
    """Sides, dtype and reduction decide products, buffers, and whether gradients come from forward or are recomputed in backward."""
    require(backend, device, dtype)
    leading, vocab = (5,), 61
    case = {"sides": sides, "dtype": dtype, "reduction": reduction, "labels": "masked + ce", "token_weights": True}
    options, upstream = options_of({**case, "divergence": kd.JSD(0.3), "temperature": 2.0, "chunk_rows": 2}, leading, vocab, device)
    check(backend, *sides_of({**case, "bias": True, "softcap": 6.0}, leading, vocab, device), options, upstream)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
def test_each_divergence_equals_the_oracle(divergence: Divergence, any_backend: str, device: str) -> None:
    """With dense sides only the row kernel runs. With a head, the gradient is computed in forward."""
    options = {"divergence": divergence, "temperature": 1.5}
    check(any_backend, *sides_of({"sides": "dense/dense"}, (6,), 200, device), {**options, "reduction": "sum"})
    check(any_backend, *sides_of({"sides": "head/dense"}, (6,), 200, device), {**options, "reduction": "mean"})


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("gap", [1e-1, 1e-3])
def test_close_student_keeps_accuracy(divergence: Divergence, gap: float, backend: str, device: str) -> None:
    """Late in training, p is close to q and terms cancel. float32 logits of 8 have an error of 5e-7, and so have gradients."""
    teacher = make_side((12,), 150, None, device=device, seed=1)
    student = teacher + gap * make_side((12,), 150, None, device=device, seed=2)
    # Floors: probabilities are below 1/4 here and logits below 8. The error of a value is that of a gradient times the gap.
    size = 0.25 if divergence.normalizer == "softmax" else 1.0
    options = {"divergence": divergence, "reduction": "none"}  # 12 losses, since the error of a single one varies
    check(backend, student, teacher, options, scales={"d_logits": size / 8, "loss": size * gap / 2})


# V = 127: odd, below every tile. 4097: one column in a second block. 50257 (GPT-2): odd. 151937: odd, and large enough for errors of
# float32 sums over the row. N and D are small, since only the length of a row matters.
@pytest.mark.parametrize("vocab", [1, 2, 127, 4097, 50257, 151937])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_vocabulary_of_any_size_equals_the_oracle(vocab: int, dtype: torch.dtype, backend: str, device: str) -> None:
    if interpreted(backend, device) and vocab > 5000:
        pytest.skip("large vocabularies take the interpreter minutes")
    for divergence in (kd.ForwardKL(), kd.JSD()):
        case = {"divergence": divergence, "dtype": dtype, "labels": "given + ce", "temperature": 2.0, "bias": True, "vocab_size": "student"}
        options, upstream = options_of(case, (3,), vocab, device)
        check(backend, *sides_of(case, (3,), vocab, device), options, upstream)


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
def test_rows_of_several_blocks_equal_the_oracle(divergence: Divergence, backend: str, device: str) -> None:
    """A kernel that reads a row in blocks must carry its sums. The last block here has one column."""
    case = {"divergence": divergence, "labels": "given + ce", "sides": "dense/dense", "reduction": "none"}
    options, upstream = options_of(case, (2,), 8193, device)
    # In a rising row every block raises the running maximum. In a falling row only the first does.
    slope = torch.linspace(-4, 4, 8193, device=device) * torch.tensor([[1.0], [-1.0]], device=device)
    student, teacher = (side + slope for side in sides_of(case, (2,), 8193, device))
    check(backend, student, teacher, options, upstream)


@pytest.mark.parametrize("leading", [(7,), (2, 3), (2, 1, 3), (1,)])
@pytest.mark.parametrize("sides", SIDES)
def test_loss_keeps_the_leading_shape(leading: tuple[int, ...], sides: str, engine_backend: str, device: str) -> None:
    case = {"sides": sides, "reduction": "none", "labels": "masked + ce", "token_weights": True}
    options, upstream = options_of(case, leading, 33, device)
    result = check(engine_backend, *sides_of(case, leading, 33, device), options, upstream)
    assert result["loss"].shape == leading


# ---- mixed dtypes

MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float64),
]


@pytest.mark.parametrize(("student_dtype", "teacher_dtype"), MIXED, ids=name_of)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sides_of_different_dtypes_equal_the_oracle(
    student_dtype: torch.dtype, teacher_dtype: torch.dtype, sides: str, reduction: str, any_backend: str, device: str
) -> None:
    require(any_backend, device, student_dtype, teacher_dtype)
    case = {"sides": sides, "reduction": reduction, "labels": "masked + ce", "bias": True, "temperature": 2.0}
    options, upstream = options_of(case, (6,), 50, device)
    student, _ = sides_of({**case, "dtype": student_dtype}, (6,), 50, device)
    _, teacher = sides_of({**case, "dtype": teacher_dtype}, (6,), 50, device)
    result = check(any_backend, student, teacher, options, upstream)
    assert result["loss"].dtype == (torch.float64 if torch.float64 in (student_dtype, teacher_dtype) else torch.float32)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_bfloat16_logits_are_as_accurate_as_eager_ones(reduction: str, backend: str, device: str) -> None:
    """bfloat16 logits halve the memory and are as accurate as eager bfloat16."""
    require(backend, device, torch.bfloat16)
    case = {"dtype": torch.bfloat16, "reduction": reduction, "labels": "masked", "bias": True}
    options, upstream = options_of(case, (8,), 61, device)
    options["chunk_rows"] = 3
    check(backend, *sides_of(case, (8,), 61, device), {**options, "logits_dtype": torch.bfloat16}, upstream)
    check(backend, *sides_of(case, (8,), 61, device), {**options, "logits_dtype": torch.float32}, upstream)


def test_default_logits_are_not_rounded(backend: str, device: str) -> None:
    """float32 logits from bfloat16 operands are far more accurate than eager's rounded ones."""
    require(backend, device, torch.float32)
    case = {"dtype": torch.bfloat16, "reduction": "none", "divergence": kd.JSD()}
    student, teacher = sides_of(case, (8,), 61, device, spread=8.0)
    options, upstream = options_of(case, (8,), 61, device)
    truth = truth_of(student, teacher, options, upstream=upstream)["loss"]
    narrow, default = (
        float((run(kd.distillation_loss, student, teacher, {**options, "logits_dtype": d, "backend": backend})["loss"] - truth).abs().max())
        for d in (torch.bfloat16, None)
    )
    assert default < 1e-5 < 1e-3 < narrow


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_gives_float32_gradients_near_the_truth(sides: str, reduction: str, backend: str, device: str) -> None:
    """Autocast of float32 parameters computes products in bfloat16 and gives float32 gradients near the truth."""
    require(backend, device, torch.float32)
    case = {"sides": sides, "reduction": reduction, "labels": "masked + ce", "bias": True, "softcap": 8.0}
    options, upstream = options_of(case, (6,), 50, device)
    student, teacher = sides_of(case, (6,), 50, device)
    truth = truth_of(student, teacher, options, upstream=upstream)

    def under_autocast(*args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return kd.distillation_loss(*args, **kwargs)

    result = run(under_autocast, student, teacher, {**options, "backend": backend}, upstream=upstream)
    for name, value in result.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value.double(), truth[name], rtol=0.03, atol=0.03 * float(truth[name].abs().max()))
    if "head" in sides:  # equal losses would mean that autocast was ignored
        full = run(kd.distillation_loss, student, teacher, {**options, "backend": backend}, upstream=upstream)
        assert not torch.equal(full["loss"], result["loss"])


def test_autocast_accepts_heads_of_mixed_dtypes(device: str) -> None:
    """Under autocast, hidden states can be float32 (after a LayerNorm) with a bfloat16 head, or the reverse."""
    student, teacher = sides_of({}, (4,), 30, device)
    mixed = kd.LMHead(student.hidden.bfloat16(), student.weight)
    with torch.autocast(device, torch.bfloat16):
        mixed_loss = kd.distillation_loss(mixed, teacher)
        expected = kd.distillation_loss(student, teacher)
    torch.testing.assert_close(mixed_loss, expected)


# ---- statistics


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("sides", ["head/head", "dense/dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
def test_statistics_equal_the_oracle(divergence: Divergence, sides: str, dtype: torch.dtype, any_backend: str, device: str) -> None:
    require(any_backend, device, dtype)
    case = {
        "divergence": divergence, "sides": sides, "dtype": dtype, "labels": "masked + ce", "temperature": 2.0, "kd_weight": 0.3,
        "token_weights": True, "bias": True, "chunk_rows": 3,
    }  # fmt: skip
    leading = (2, 5)
    options, _ = options_of(case, leading, 45, device)
    student, teacher = sides_of(case, leading, 45, device)
    loss, stats = kd.distillation_loss(student, teacher, return_stats=True, backend=any_backend, **options)
    torch.testing.assert_close(loss, kd.distillation_loss(student, teacher, backend=any_backend, **options), rtol=1e-5, atol=1e-6)
    expected = token_stats(student, teacher, options)
    for name, truth in expected.items():
        value = getattr(stats, name)
        assert value.shape == leading
        assert value.dtype == torch.float32
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert (value[options["labels"] == -100] == 0).all()


def test_statistics_without_labels(any_backend: str, device: str) -> None:
    student, teacher = sides_of({"sides": "dense/dense"}, (4,), 30, device)
    teacher[2:] = student[2:]  # top-1 agreement is 1 for these rows
    student[0] = -teacher[0]
    _, stats = kd.distillation_loss(student, teacher, return_stats=True, backend=any_backend)
    assert stats.cross_entropy.isnan().all()
    assert stats.top1_agreement.tolist()[0] == 0.0
    assert stats.top1_agreement.tolist()[2:] == [1.0, 1.0]
    assert (stats.divergence[2:].abs() < 1e-6).all()


def test_statistics_with_labels_but_no_ce_weight(any_backend: str, device: str) -> None:
    """Cross-entropy is reported even if its weight is 0."""
    options, _ = options_of({"labels": "masked", "divergence": kd.LogitMSE()}, (6,), 30, device)
    student, teacher = sides_of({}, (6,), 30, device)
    loss, stats = kd.distillation_loss(student, teacher, return_stats=True, backend=any_backend, **options)
    torch.testing.assert_close(stats.cross_entropy.double(), token_stats(student, teacher, options)["cross_entropy"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, kd.distillation_loss(student, teacher, backend=any_backend, **options))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_do_not_change_gradients(reduction: str, backend: str, device: str) -> None:
    case = {"labels": "masked + ce", "reduction": reduction, "divergence": kd.ForwardKL()}
    options, upstream = options_of(case, (6,), 30, device)
    student, teacher = sides_of(case, (6,), 30, device)
    plain = run(kd.distillation_loss, student, teacher, {**options, "backend": backend}, upstream=upstream)

    def first(*args: Any, **kwargs: Any) -> torch.Tensor:
        return kd.distillation_loss(*args, return_stats=True, **kwargs)[0]

    with_stats = run(first, student, teacher, {**options, "backend": backend}, upstream=upstream)
    for name, value in plain.items():
        torch.testing.assert_close(with_stats[name], value, rtol=1e-5, atol=1e-7)


# ---- conventions


def test_t_squared_multiplies_only_the_divergence(any_backend: str, device: str) -> None:
    student, teacher = sides_of({}, (6,), 30, device)
    options, _ = options_of({"labels": "given + ce", "temperature": 3.0}, (6,), 30, device)
    at = {**options, "backend": any_backend}
    on = run(kd.distillation_loss, student, teacher, at)
    off = run(kd.distillation_loss, student, teacher, {**at, "t_squared": False})
    ce = run(kd.distillation_loss, student, teacher, {**at, "kd_weight": 0.0})
    for name in on:
        torch.testing.assert_close(on[name] - ce[name], 9 * (off[name] - ce[name]), rtol=1e-4, atol=1e-5)


def test_defaults_are_forward_kl_per_valid_token(any_backend: str, device: str) -> None:
    """The default equals ``F.kl_div(log q, p, reduction="sum") / valid tokens``."""
    student, teacher = sides_of({"sides": "dense/dense"}, (2, 3), 30, device)
    labels = make_labels((2, 3), 30, device)
    valid = labels != -100
    log_q, p = torch.log_softmax(student[valid].double(), -1), torch.softmax(teacher[valid].double(), -1)
    expected = torch.nn.functional.kl_div(log_q, p, reduction="sum") / valid.sum()
    loss = kd.distillation_loss(student, teacher, labels=labels, backend=any_backend)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert not math.isclose(loss.item(), expected.item() / 2, rel_tol=1e-3)
