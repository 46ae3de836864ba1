"""torch.compile without graph breaks, opcheck of the custom ops, and activation checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import make_labels, make_side, run
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels.fused import ops

REDUCTIONS = ("mean", "sum", "none")


@pytest.fixture(autouse=True)
def clean_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def samples() -> tuple[Tensor, Tensor, Tensor, kd.LMHead, Tensor]:
    head = make_side((2, 5), 31, 8, bias=True, seed=1)
    return head.hidden, head.weight, head.bias, make_side((2, 5), 31, 12, seed=2), make_labels((2, 5), 31)


def step(hidden: Tensor, weight: Tensor, bias: Tensor, teacher: kd.LMHead | Tensor, labels: Tensor, options: dict[str, Any]) -> Tensor:
    """Compute a loss with operations before and after it, so that a graph break gives two graphs."""
    student = kd.LMHead(torch.tanh(hidden), weight, bias, softcap=8.0)
    return 2 * kd.distillation_loss(student, teacher, labels=labels, temperature=2.0, **options)


def grads_of(function: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in args[:3]]
    loss = function(*leaves, *args[3:], **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("backend", ["torch", "auto"])  # the same ops for every backend; the reference has none
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
def test_compiles_into_one_graph(backend: str, reduction: str, ce_weight: float) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    options = {"reduction": reduction, "ce_weight": ce_weight, "backend": backend, "divergence": "jsd"}
    args = samples()
    for actual, expected in zip(grads_of(compiled, *args, options), grads_of(step, *args, options), strict=True):
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def dense(student: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return kd.distillation_loss(student * 2, teacher, labels=labels, token_weights=weights, divergence="reverse_kl", backend="torch")


def test_compiles_dense_logits_and_token_weights() -> None:
    student, teacher = (make_side((2, 5), 31, None, seed=s) for s in (1, 2))
    args = (teacher, make_labels((2, 5), 31), torch.rand(2, 5))
    results = []
    for function in (dense, torch.compile(dense, backend="aot_eager", fullgraph=True)):
        leaf = student.clone().requires_grad_()
        loss = function(leaf, *args)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(*results)


def test_compiles_dense_student_with_teacher_head() -> None:
    student, (*_, teacher, labels) = make_side((2, 5), 31, None, seed=1), samples()

    def loss(z: Tensor) -> Tensor:
        return kd.distillation_loss(z * 2, teacher, labels=labels, backend="torch")

    leaf = student.clone().requires_grad_()
    gradient = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(leaf), leaf)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0])


def test_compiles_statistics_and_module() -> None:
    hidden, weight, bias, teacher, labels = samples()
    module = kd.DistillationLoss(divergence="skew_kl", ce_weight=0.5, return_stats=True, backend="torch")

    def loss_and_statistics(h: Tensor) -> tuple[Tensor, Tensor]:
        loss, stats = module(kd.LMHead(h, weight, bias), teacher, labels=labels)
        return loss, stats.divergence + stats.student_entropy

    for actual, expected in zip(
        torch.compile(loss_and_statistics, backend="aot_eager", fullgraph=True)(hidden), loss_and_statistics(hidden), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_annealing_does_not_recompile() -> None:
    """Temperature and weights change every step. The first change makes them dynamic; later ones do not recompile."""
    hidden, weight, bias, teacher, labels = samples()
    counter = CompileCounterWithBackend("aot_eager")

    def annealed(h: Tensor, temperature: float, kd_weight: float, ce_weight: float) -> Tensor:
        student = kd.LMHead(h, weight, bias)
        return kd.distillation_loss(
            student, teacher, labels=labels, temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight, backend="torch"
        )

    compiled = torch.compile(annealed, backend=counter, fullgraph=True)
    frames = []
    for i in range(6):
        numbers = (4.0 - 0.5 * i, 1.0 - 0.1 * i, 0.25 + 0.1 * i)
        torch.testing.assert_close(compiled(hidden, *numbers), annealed(hidden, *numbers))
        frames.append(counter.frame_count)
    assert frames[-1] == frames[2], frames


def test_changed_number_of_tokens_does_not_recompile() -> None:
    """Batches of other lengths and numbers of ignored labels use dynamic shapes."""
    _, weight, bias, _, _ = samples()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True, dynamic=True)
    for length in (5, 6, 9, 12):
        student, teacher = (make_side((2, length), 31, d, seed=d) for d in (8, 12))
        args = (student.hidden, weight, bias, teacher, make_labels((2, length), 31))
        options = {"backend": "torch", "ce_weight": 0.5}
        for actual, expected in zip(grads_of(compiled, *args, options), grads_of(step, *args, options), strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 2


def test_compiles_with_a_num_items_tensor() -> None:
    args = samples()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for items in (torch.tensor(7), torch.tensor(9)):
        options = {"num_items": items, "backend": "torch"}
        torch.testing.assert_close(compiled(*args, options), step(*args, options))


def test_inductor_gives_equal_gradients() -> None:
    """The default compiler may fuse, reorder and reuse memory around the ops."""
    args = samples()
    options = {"reduction": "none", "ce_weight": 0.5, "backend": "torch"}
    compiled = torch.compile(step, fullgraph=True)
    for actual, expected in zip(grads_of(compiled, *args, options), grads_of(step, *args, options), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_invalid_labels_raise_when_compiled() -> None:
    hidden, weight, bias, teacher, labels = samples()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    labels[0, 0] = 31
    with pytest.raises(ValueError, match="labels contain 31"):
        compiled(hidden, weight, bias, teacher, labels, {"backend": "torch"})


# ---- the ops themselves

OP_CASES: dict[str, dict[str, Any]] = {
    "head, sum": {"reduction": "sum"},
    "head, none": {"reduction": "none"},
    "head, bfloat16": {"reduction": "none", "dtype": torch.bfloat16},
    "head, bfloat16, in chunks": {"reduction": "sum", "dtype": torch.bfloat16, "logits_dtype": torch.bfloat16, "chunk_rows": 4},
    "head, frozen": {"frozen": True, "reduction": "none"},
    "head, statistics": {"return_stats": True},
    "head / dense": {"dims": (8, None), "reduction": "none"},
    "dense / head": {"dims": (None, 12), "reduction": "none"},
    "dense / head, sum": {"dims": (None, 12), "token_weights": True},
    "dense / dense": {"dims": (None, None), "token_weights": True},
    "dense / dense, none": {"dims": (None, None), "reduction": "none", "return_stats": True},
    "float64": {"dtype": torch.float64, "divergence": "jsd"},
}


def captured(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the arguments that a real call passes to each op."""
    # Cross-entropy and no ignored labels: then every element of the saved state is defined, and opcheck can compare it.
    case = {"dims": (8, 12), "dtype": torch.float32, "frozen": False, "token_weights": False, "ce_weight": 0.5, **case}
    arguments: dict[str, tuple[Any, ...]] = {}
    for name in ("distill", "distill_backward"):
        op = getattr(ops, name)

        def recorded(*args: Any, op: Any = op, name: str = name) -> Any:
            arguments[name] = args
            return op(*args)

        monkeypatch.setattr(ops, name, recorded)
    student, teacher = (make_side((2, 3), 21, d, seed=i, dtype=case["dtype"], bias=True) for i, d in enumerate(case["dims"]))
    trained = [student] if isinstance(student, Tensor) else [student.hidden, *([] if case["frozen"] else [student.weight, student.bias])]
    for t in trained:
        t.requires_grad_()
    options = {k: case[k] for k in ("reduction", "ce_weight", "return_stats", "divergence", "logits_dtype", "chunk_rows") if k in case}
    if case["token_weights"]:
        options["token_weights"] = torch.rand(2, 3)
    labels = make_labels((2, 3), 21, masked=False)
    result = kd.distillation_loss(student, teacher, labels=labels, backend="torch", **options)
    loss = result[0] if isinstance(result, tuple) else result
    loss.sum().backward()
    return arguments["distill"], arguments["distill_backward"]


@pytest.mark.parametrize("case", OP_CASES)
def test_loss_passes_opcheck(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = captured(monkeypatch, OP_CASES[case])
    torch.library.opcheck(torch.ops.kdkernels.distill.default, forward)
    # Differentiating the gradient op raises by design.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    with torch.no_grad():
        backward = ([t.detach() for t in backward[0]], *backward[1:])
        torch.library.opcheck(torch.ops.kdkernels.distill_backward.default, backward, test_utils=tests)


# ---- activation checkpointing


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dims", [(8, 12), (8, None), (None, None)], ids=["head/head", "head/dense", "dense/dense"])
def test_activation_checkpointing_keeps_loss_and_gradients(backend: str, reduction: str, dims: tuple[int | None, int | None]) -> None:
    student, teacher = (make_side((6,), 31, d, seed=i) for i, d in enumerate(dims))
    options = {"labels": make_labels((6,), 31), "ce_weight": 0.5, "reduction": reduction, "backend": backend}

    def checkpointed(*sides: Any, **kwargs: Any) -> Tensor:
        return checkpoint(kd.distillation_loss, *sides, use_reentrant=False, **kwargs)

    expected = run(kd.distillation_loss, student, teacher, options)
    actual = run(checkpointed, student, teacher, options)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value)
