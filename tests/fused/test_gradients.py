"""Gradients: which inputs get one, how many matrix products they need, and use inside larger graphs."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from conftest import require
from oracle import ONE_OF_EACH, check, dense_loss, make_labels, make_side, name_of, run, to_dtype
from torch import Tensor
from two_sides import SIDES, pair, reductions, sides, tensors

import kdkernels as kd
from kdkernels.divergences import Divergence

pytestmark = pytest.mark.usefixtures("poison")

# ---- which inputs get a gradient, and its cost

TRAINED = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("trained", TRAINED, ids=lambda w: "".join("hwb"[i] if x else "-" for i, x in enumerate(w)))
@reductions
def test_unneeded_gradients_are_not_computed(
    trained: tuple[bool, bool, bool], reduction: str, engine_backend: str, device: str, calls: dict[str, int]
) -> None:
    student, teacher = pair(device=device, bias=True)
    labels = make_labels((6,), 33, device)
    options = {"labels": labels, "reduction": reduction, "divergence": kd.ReverseKL()}
    expected = run(dense_loss, student, teacher, options)
    hidden, weight, bias = trained
    for t, trains in zip(tensors(student), trained, strict=True):
        t.requires_grad_(trains)
    loss = kd.distillation_loss(student, teacher, **options, backend=engine_backend)
    assert loss.requires_grad == any(trained)
    if any(trained):
        loss.sum().backward()
    for name, t, trains in zip(("d_hidden", "d_weight", "d_bias"), tensors(student), trained, strict=True):
        assert (t.grad is not None) == trains
        if trains:
            torch.testing.assert_close(t.grad, expected[name], rtol=1e-4, atol=1e-5)
    recomputed = reduction == "none" and (weight or bias)  # the head's gradient needs the logits again
    assert calls == {"logits": 4 if recomputed else 2, "grad_hidden": int(hidden), "add_grad_weight": int(weight)}


@sides
@reductions
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_loss_without_gradients_needs_no_gradient_products(
    dims: tuple[int | None, int | None], reduction: str, context: Any, any_backend: str, device: str, calls: dict[str, int]
) -> None:
    student, teacher = pair(dims, device=device)
    student = to_dtype(student, None, requires_grad=True)
    expected = kd.distillation_loss(student, teacher, reduction=reduction, backend=any_backend)
    before = dict(calls)
    with context():
        loss = kd.distillation_loss(student, teacher, reduction=reduction, backend=any_backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    assert calls["grad_hidden"] == before["grad_hidden"]
    assert calls["add_grad_weight"] == before["add_grad_weight"]


def test_inference_tensors_are_accepted(backend: str, device: str) -> None:
    """A generation loop makes hidden states under inference_mode."""
    with torch.inference_mode():
        student, teacher = pair(device=device)
        loss = kd.distillation_loss(student, teacher, labels=make_labels((6,), 33, device), backend=backend, return_stats=True)[0]
    assert torch.isfinite(loss)


def test_teacher_that_requires_grad_is_detached(any_backend: str, device: str) -> None:
    for dims in SIDES:
        student, teacher = pair(dims, device=device)
        student, teacher = (to_dtype(side, None, requires_grad=True) for side in (student, teacher))
        with pytest.warns(UserWarning, match="teacher requires grad: it is detached"):
            loss = kd.distillation_loss(student, teacher, backend=any_backend)
        loss.backward()
        assert all(t.grad is None for t in tensors(teacher))
        assert all(t.grad is not None for t in tensors(student))


def test_usual_calls_do_not_warn(any_backend: str) -> None:
    student, teacher = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(kd.distillation_loss, student, teacher, {"labels": make_labels((6,), 33), "backend": any_backend})
        with torch.no_grad():  # no gradient is computed, so no warning
            kd.distillation_loss(student, to_dtype(teacher, None, requires_grad=True), backend=any_backend)


def test_self_distillation_of_one_tensor(any_backend: str) -> None:
    """The same logits are teacher and part of the student. Only the student's gradient flows."""
    logits = torch.randn(4, 9, requires_grad=True)
    change = torch.randn(4, 9)
    with pytest.warns(UserWarning, match="detached"):
        kd.distillation_loss(logits + change, logits, backend=any_backend).backward()
    expected = logits.detach().clone().requires_grad_()
    dense_loss(expected + change, logits.detach()).backward()
    torch.testing.assert_close(logits.grad, expected.grad)


# ---- graphs


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("kind", ["head", "dense"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_loss_passes_gradcheck(divergence: Divergence, kind: str, reduction: str) -> None:
    """Compare with central differences in float64, which need no formula of the package."""
    labels = torch.tensor([3, -100, 0])
    options = {
        "divergence": divergence, "temperature": 1.5, "labels": labels, "ce_weight": 0.3, "token_weights": torch.tensor([0.5, 1.0, 2.0]),
        "reduction": reduction, "chunk_rows": 2, "backend": "torch",
    }  # fmt: skip
    teacher = make_side((3,), 7, 4, dtype=torch.float64, seed=2)
    if kind == "dense":
        logits = make_side((3,), 7, None, dtype=torch.float64, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(lambda z: kd.distillation_loss(z, teacher.hidden @ teacher.weight.t(), **options), logits)
        return
    head = to_dtype(make_side((3,), 7, 5, dtype=torch.float64, bias=True, seed=1), None, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kd.distillation_loss(kd.LMHead(hidden, weight, bias, scale=0.7, softcap=4.0), teacher, **options)

    assert torch.autograd.gradcheck(loss, (head.hidden, head.weight, head.bias))


@sides
def test_upstream_gradients_may_have_any_sign(dims: tuple[int | None, int | None], any_backend: str, device: str) -> None:
    student, teacher = pair(dims, (2, 4), device=device, bias=True)
    upstream = torch.tensor([[-1.5, 0.0, 2.0, 1e-3], [0.0, -30.0, 1.0, 0.5]], device=device)
    options = {"reduction": "none", "labels": make_labels((2, 4), 33, device), "ce_weight": 0.5, "token_weights": upstream.abs()}
    check(any_backend, student, teacher, options, upstream=upstream)


@sides
def test_loss_in_a_larger_graph(dims: tuple[int | None, int | None], any_backend: str, device: str) -> None:
    """The inputs are not leaves, and a nonlinear function of the per-token losses follows."""
    student, teacher = pair(dims, (6,), device=device)

    def total(loss_fn: Any, side: Any, **kw: Any) -> Tensor:
        first = torch.tanh(tensors(side)[0]) * 2
        side = first if isinstance(side, Tensor) else kd.LMHead(first, side.weight * 1.5)
        return (loss_fn(side, teacher, reduction="none", **kw) ** 2).mean()

    fused, dense = (to_dtype(student, None, requires_grad=True) for _ in range(2))
    total(kd.distillation_loss, fused, backend=any_backend).backward()
    total(dense_loss, dense).backward()
    for a, b in zip(tensors(fused), tensors(dense), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@sides
@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_second_backward_is_identical(
    dims: tuple[int | None, int | None], reduction: str, dtype: torch.dtype, engine_backend: str, device: str
) -> None:
    require(engine_backend, device, dtype)
    student, teacher = pair(dims, device=device, dtype=dtype, bias=True)
    student = to_dtype(student, None, requires_grad=True)
    loss = kd.distillation_loss(student, teacher, labels=make_labels((6,), 33, device), reduction=reduction, backend=engine_backend)
    upstream = torch.full_like(loss, -0.7)
    first = torch.autograd.grad(loss, tensors(student), upstream, retain_graph=True)
    scaled = torch.autograd.grad(loss, tensors(student), 3 * upstream, retain_graph=True)
    second = torch.autograd.grad(loss, tensors(student), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, scaled, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors(student), upstream)


@sides
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_derivatives_raise(dims: tuple[int | None, int | None], reduction: str, engine_backend: str, device: str) -> None:
    """Second derivatives are not implemented, and must not be silently zero."""
    student, teacher = pair(dims, device=device)
    student = to_dtype(student, None, requires_grad=True)
    loss = kd.distillation_loss(student, teacher, reduction=reduction, backend=engine_backend).sum()
    grads = torch.autograd.grad(loss, tensors(student), create_graph=True)
    with pytest.raises(RuntimeError, match=r"kdkernels.distillation_loss has no second derivative: .*reference"):
        torch.autograd.grad(sum((g**2).sum() for g in grads), tensors(student))


@reductions
def test_inputs_changed_before_backward_raise(reduction: str, engine_backend: str) -> None:
    """Backward may read the logits again. If they were overwritten, autograd must raise."""
    student = torch.randn(4, 9, requires_grad=True)
    logits = student * 1.0
    loss = kd.distillation_loss(logits, torch.randn(4, 9), reduction=reduction, backend=engine_backend).sum()
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@sides
def test_inputs_are_not_modified(dims: tuple[int | None, int | None], any_backend: str, device: str) -> None:
    student, teacher = pair(dims, device=device, bias=True, softcap=5.0)
    student = to_dtype(student, None, requires_grad=True)
    before = [t.detach().clone() for t in tensors(student) + tensors(teacher)]
    labels, weights = make_labels((6,), 33, device), torch.rand(6, device=device)
    copies = labels.clone(), weights.clone()
    kd.distillation_loss(student, teacher, labels=labels, token_weights=weights, temperature=2.0, backend=any_backend).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(student) + tensors(teacher), strict=True))
    assert torch.equal(labels, copies[0])
    assert torch.equal(weights, copies[1])


@sides
@reductions
def test_loss_and_gradients_are_deterministic(
    dims: tuple[int | None, int | None], reduction: str, engine_backend: str, device: str
) -> None:
    student, teacher = pair(dims, (9,), device=device, bias=True)
    options = {
        "labels": make_labels((9,), 33, device),
        "reduction": reduction,
        "chunk_rows": 2,
        "backend": engine_backend,
        "divergence": kd.JSD(),
    }
    first, second = (run(kd.distillation_loss, student, teacher, options) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)
