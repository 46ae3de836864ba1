"""Semantics of a call: ignored tokens, reductions, shapes and strides. test_gradients.py covers gradients."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import require
from oracle import DIVERGENCES, check, dense_loss, make_labels, make_side, name_of, run, to_dtype
from torch import Tensor
from two_sides import pair, reductions, sides, tensors

import kdkernels as kd
from kdkernels.divergences import Divergence

pytestmark = pytest.mark.usefixtures("poison")

# ---- no valid token


@sides
@reductions
@pytest.mark.parametrize("case", ["all ignored", "no rows", "no rows, no labels"])
def test_loss_without_valid_tokens_is_zero(
    dims: tuple[int | None, int | None], reduction: str, case: str, any_backend: str, device: str
) -> None:
    """It is 0.0 and backpropagates zeros, even if the hidden states are NaN."""
    leading = (2, 3) if case == "all ignored" else (2, 0)
    student, teacher = pair(dims, leading, device=device, bias=True)
    for t in (tensors(student)[0], tensors(teacher)[0]):
        t.fill_(float("nan"))
    student = to_dtype(student, None, requires_grad=True)
    labels = None if case.endswith("labels") else torch.full(leading, -100, device=device)
    ce = 0.0 if labels is None else 0.5
    loss, stats = kd.distillation_loss(
        student, teacher, labels=labels, ce_weight=ce, reduction=reduction, backend=any_backend, return_stats=True
    )
    assert loss.shape == (leading if reduction == "none" else ())
    assert (loss == 0).all()
    assert all((getattr(stats, n) == 0).all() and getattr(stats, n).shape == leading for n in vars(stats))
    loss.sum().backward()
    for t in tensors(student):
        assert t.grad is not None
        assert t.grad.shape == t.shape
        assert (t.grad == 0).all()


@sides
@reductions
def test_one_valid_row_equals_the_oracle(dims: tuple[int | None, int | None], reduction: str, backend: str, device: str) -> None:
    labels = torch.full((5,), -100, device=device)
    labels[3] = 7
    student, teacher = pair(dims, (5,), device=device, bias=True)
    check(backend, student, teacher, {"labels": labels, "ce_weight": 0.5, "reduction": reduction, "temperature": 2.0})


@sides
def test_ignored_rows_have_no_effect(dims: tuple[int | None, int | None], engine_backend: str, device: str) -> None:
    student, teacher = pair(dims, (7,), device=device)
    labels = make_labels((7,), 33, device)
    keep = labels != -100

    def cut(side: Any) -> Any:
        return side[keep] if isinstance(side, Tensor) else kd.LMHead(side.hidden[keep], side.weight)

    options = {"ce_weight": 0.5, "backend": engine_backend, "divergence": kd.JSD()}
    all_rows = run(kd.distillation_loss, student, teacher, {**options, "labels": labels})
    part = run(kd.distillation_loss, cut(student), cut(teacher), {**options, "labels": labels[keep]})
    for name, value in part.items():
        value_of_all = all_rows[name]
        if name in ("d_hidden", "d_logits"):
            assert (value_of_all[~keep] == 0).all()
            value_of_all = value_of_all[keep]
        torch.testing.assert_close(value_of_all, value, rtol=1e-6, atol=1e-8)


def test_ignore_index_may_be_a_token(any_backend: str, device: str) -> None:
    """Padding with token 0 is common. With ``ignore_index=0``, label 0 is ignored and -100 is out of range."""
    student, teacher = pair(device=device)
    labels = torch.tensor([0, 3, 0, 5, 32, 0], device=device)
    kwargs = {"ce_weight": 1.0, "reduction": "none", "backend": any_backend}
    loss = kd.distillation_loss(student, teacher, labels=labels, ignore_index=0, **kwargs)
    assert (loss == 0).tolist() == (labels == 0).tolist()
    with pytest.raises(ValueError, match="labels contain -100"):
        kd.distillation_loss(student, teacher, labels=labels.masked_fill(labels == 0, -100), ignore_index=0, **kwargs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_every_integer_dtype(dtype: torch.dtype, any_backend: str, device: str) -> None:
    student, teacher = pair(device=device)
    labels = make_labels((6,), 33, device)
    expected = kd.distillation_loss(student, teacher, labels=labels, ce_weight=1.0)
    loss = kd.distillation_loss(student, teacher, labels=labels.to(dtype), ce_weight=1.0, backend=any_backend)
    torch.testing.assert_close(loss, expected)


def test_unsigned_labels_are_never_ignored(any_backend: str, device: str) -> None:
    """uint8 can't hold -100, so no label is ignored. 156, which is -100 modulo 256, is an ordinary token."""
    student, teacher = pair(vocab=200, device=device)
    labels = torch.tensor([156, 3, 199, 0, 156, 7], device=device)
    expected = kd.distillation_loss(student, teacher, labels=labels, ce_weight=1.0, reduction="none", backend=any_backend)
    loss = kd.distillation_loss(student, teacher, labels=labels.to(torch.uint8), ce_weight=1.0, reduction="none", backend=any_backend)
    torch.testing.assert_close(loss, expected)


# ---- reductions


@sides
def test_reductions_agree(dims: tuple[int | None, int | None], any_backend: str, device: str) -> None:
    require(any_backend, device, torch.float32)
    student, teacher = pair(dims, (2, 4), device=device)
    labels = make_labels((2, 4), 33, device)
    weights = torch.rand(2, 4, device=device)
    options = {"labels": labels, "ce_weight": 0.5, "token_weights": weights, "backend": any_backend}
    none, total, mean, fixed = (
        kd.distillation_loss(student, teacher, **options, **reduction)
        for reduction in ({"reduction": "none"}, {"reduction": "sum"}, {}, {"num_items": torch.tensor(5, device=device)})
    )
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(total / (labels != -100).sum(), mean)  # divided by the number of valid tokens, not by the sum of weights
    torch.testing.assert_close(total / 5, fixed)
    assert (none[labels == -100] == 0).all()


@pytest.mark.parametrize(
    "items", [5, torch.tensor(5), torch.tensor([5]), torch.tensor(5.0, dtype=torch.float64), torch.tensor(5, dtype=torch.int32)]
)
def test_num_items_does_not_change_the_dtype(items: int | Tensor, any_backend: str) -> None:
    """The loss is float32 for a count of any dtype, such as a float64 count from an all-reduce."""
    student, teacher = pair()
    total = kd.distillation_loss(student, teacher, reduction="sum", backend=any_backend)
    loss = kd.distillation_loss(student, teacher, num_items=items, backend=any_backend)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss, total / 5)


@pytest.mark.parametrize("items", [0, torch.tensor(0)])
def test_num_items_zero_does_not_divide_by_zero(items: int | Tensor) -> None:
    student, teacher = pair()
    loss = kd.distillation_loss(student, teacher, labels=torch.full((6,), -100), num_items=items)
    assert loss.item() == 0.0


@sides
def test_micro_batches_with_num_items_equal_one_batch(dims: tuple[int | None, int | None], device: str) -> None:
    student, teacher = pair(dims, (9,), device=device, dtype=torch.float64)
    labels = make_labels((9,), 33, device)
    options = {"ce_weight": 0.5, "temperature": 2.0, "num_items": int((labels != -100).sum()), "backend": "torch"}
    one_batch = run(kd.distillation_loss, student, teacher, {**options, "labels": labels})
    accumulated = to_dtype(student, None, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start, stop in ((0, 2), (2, 3), (3, 9)):

        def cut(side: Any, rows: slice = slice(start, stop)) -> Any:
            return side[rows] if isinstance(side, Tensor) else kd.LMHead(side.hidden[rows], side.weight)

        loss = kd.distillation_loss(cut(accumulated), cut(teacher), labels=labels[start:stop], **options)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, one_batch["loss"], rtol=1e-12, atol=1e-12)
    for t, name in zip(tensors(accumulated), list(one_batch)[1:], strict=True):
        torch.testing.assert_close(t.grad, one_batch[name], rtol=1e-12, atol=1e-12)


# ---- shapes and strides


def strided(kind: str, side: Any) -> Any:
    """Return a side with the same values and other strides."""

    def restride(t: Tensor) -> Tensor:
        if kind == "cut in time":  # hidden[:, :-1], as in a causal shift: no single row stride
            return torch.cat([t, torch.full_like(t[:, :1], float("nan"))], 1)[:, :-1]
        if kind == "transposed in time":  # [T, B, D] memory
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if kind == "transposed":  # columns strided
            return t.mT.contiguous().mT
        if kind == "every other column":
            return torch.stack([t, torch.full_like(t, float("nan"))], -1).flatten(-2)[..., ::2]
        return t

    if isinstance(side, Tensor):
        return restride(side)
    weight = side.weight.t().contiguous().t() if "transposed" in kind else side.weight
    return kd.LMHead(restride(side.hidden), weight, side.bias)


@sides
@pytest.mark.parametrize("kind", ["cut in time", "transposed in time", "transposed", "every other column"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strides_do_not_change_results(
    dims: tuple[int | None, int | None], kind: str, masked: bool, reduction: str, engine_backend: str, device: str
) -> None:
    student, teacher = pair(dims, (3, 4), device=device, bias=True)
    labels = strided("transposed", make_labels((3, 4), 33, device, masked=masked))
    options = {"labels": labels, "ce_weight": 0.5, "reduction": reduction, "backend": engine_backend, "chunk_rows": 5}
    options["token_weights"] = torch.linspace(0, 1, 12, device=device).view(4, 3).t()
    expected = run(kd.distillation_loss, student, teacher, options)
    leaves = to_dtype(student, None, requires_grad=True)
    loss = kd.distillation_loss(strided(kind, leaves), strided(kind, teacher), **options)
    torch.testing.assert_close(loss, expected["loss"])
    grads = torch.autograd.grad(loss.sum(), tensors(leaves))
    for g, name in zip(grads, list(expected)[1:], strict=True):
        torch.testing.assert_close(g, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("expanded", ["rows", "columns"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_expanded_logits_get_their_gradient(expanded: str, reduction: str, engine_backend: str, device: str) -> None:
    """The gradient must not be written through a stride of 0."""
    base = make_side((1,) if expanded == "rows" else (4,), 33 if expanded == "rows" else 1, None, device=device)
    plain = make_side((4,), 33, None, device=device, seed=3)
    for order in (1, -1):
        fused, dense = (base.clone().requires_grad_() for _ in range(2))
        for loss_fn, leaf, kw in ((kd.distillation_loss, fused, {"backend": engine_backend}), (dense_loss, dense, {})):
            student, teacher = (leaf.expand(4, 33), plain)[::order]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = loss_fn(student, teacher, reduction=reduction, **kw)
            if order == 1:
                loss.sum().backward()
        if order == 1:
            torch.testing.assert_close(fused.grad, dense.grad, rtol=1e-4, atol=1e-6)
            assert fused.grad.abs().sum() > 0 or expanded == "columns"


@sides
def test_permuted_rows_give_permuted_results(dims: tuple[int | None, int | None], engine_backend: str, device: str) -> None:
    student, teacher = pair(dims, (9,), device=device)
    order = torch.tensor([4, 8, 0, 3, 7, 1, 2, 6, 5], device=device)
    labels = make_labels((9,), 33, device)

    def permuted(side: Any) -> Any:
        return side[order] if isinstance(side, Tensor) else kd.LMHead(side.hidden[order], side.weight)

    options = {"ce_weight": 0.5, "reduction": "none", "chunk_rows": 4, "backend": engine_backend}
    plain = run(kd.distillation_loss, student, teacher, {**options, "labels": labels})
    mixed = run(kd.distillation_loss, permuted(student), permuted(teacher), {**options, "labels": labels[order]})
    for name, value in plain.items():
        expected = value if name == "d_weight" else value[order]
        torch.testing.assert_close(mixed[name], expected, rtol=1e-5, atol=1e-6)


# ---- equality of the two sides


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("dim", [16, None], ids=["head", "dense"])
def test_student_equal_to_teacher_has_no_loss(
    divergence: Divergence, dtype: torch.dtype, dim: int | None, backend: str, device: str
) -> None:
    require(backend, device, dtype)
    teacher = make_side((6,), 90, dim, dtype=dtype, device=device)
    result = run(
        kd.distillation_loss, teacher, teacher, {"divergence": divergence, "temperature": 2.0, "reduction": "none", "backend": backend}
    )
    assert float(result["loss"].abs().max()) <= 1e-5
    assert float(result["loss"].min()) >= -1e-6, "a divergence is not negative"
    for name in list(result)[1:]:
        assert float(result[name].abs().max()) <= 1e-5, name


# ---- the module form


def test_module_equals_the_function(any_backend: str) -> None:
    student, teacher = pair()
    labels, weights = make_labels((6,), 33), torch.rand(6)
    options = {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.5, "reduction": "sum", "backend": any_backend}
    module = kd.DistillationLoss(**options)
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())
    loss_of_module = module(student, teacher, labels=labels, token_weights=weights)
    torch.testing.assert_close(loss_of_module, kd.distillation_loss(student, teacher, labels=labels, token_weights=weights, **options))
    torch.testing.assert_close(module(student, teacher, labels), kd.distillation_loss(student, teacher, labels=labels, **options))
    mean = kd.DistillationLoss(backend=any_backend)
    torch.testing.assert_close(mean(student, teacher, num_items=3), 2 * mean(student, teacher))
    assert "temperature=2.0" in repr(module)
    assert "JSD(beta=0.5)" in repr(module)
    loss, stats = kd.DistillationLoss(return_stats=True)(student, teacher)
    assert isinstance(stats, kd.TokenStats)
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temprature": 2.0}, TypeError, "temprature.*takes.*temperature"),
        ({"labels": torch.zeros(3)}, TypeError, "labels.*belong in the call"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"divergence": "nope"}, ValueError, "nope.*forward_kl"),
        ({"reduction": "batchmean"}, ValueError, "batchmean"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows"),
        ({"ce_weight": -1.0}, ValueError, "ce_weight"),
        ({"backend": "jax"}, ValueError, "backend 'jax' is unknown"),
        ({"ignore_index": None}, TypeError, "ignore_index"),
        ({"t_squared": "no"}, TypeError, "t_squared"),
    ],
)
def test_module_checks_its_options_early(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kd.DistillationLoss(**options)
