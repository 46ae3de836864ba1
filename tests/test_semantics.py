"""What a call means apart from its numbers: validity, reductions, who gets a gradient, graphs, shapes and strides."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from conftest import require
from oracle import DIVERGENCES, ONE_OF_EACH, check, dense_loss, make_labels, make_side, name_of, run, to_dtype
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence

pytestmark = pytest.mark.usefixtures("poison")

SIDES = [(8, 12), (8, None), (None, 12), (None, None)]  # hidden sizes; None: logits
sides = pytest.mark.parametrize("dims", SIDES, ids=["head/head", "head/dense", "dense/head", "dense/dense"])
REDUCTIONS = ("mean", "sum", "none")
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def pair(
    dims: tuple[int | None, int | None] = (8, 12), leading: tuple[int, ...] = (6,), vocab: int = 33, device: str = "cpu", **kw: Any
) -> tuple[Any, Any]:
    return tuple(make_side(leading, vocab, d, seed=i, device=device, **kw) for i, d in enumerate(dims))


def tensors(side: kd.LMHead | Tensor) -> list[Tensor]:
    if isinstance(side, Tensor):
        return [side]
    return [t for t in (side.hidden, side.weight, side.bias) if t is not None]


# ---- no valid token


@sides
@reductions
@pytest.mark.parametrize("why", ["all ignored", "no rows", "no rows, no labels"])
def test_nothing_valid(dims: tuple[int | None, int | None], reduction: str, why: str, any_backend: str, device: str) -> None:
    """0.0 that backpropagates zeros of the right shapes, whatever the hidden states hold."""
    leading = (2, 3) if why == "all ignored" else (2, 0)
    student, teacher = pair(dims, leading, device=device, bias=True)
    for t in (tensors(student)[0], tensors(teacher)[0]):
        t.fill_(float("nan"))
    student = to_dtype(student, None, requires_grad=True)
    labels = None if why.endswith("labels") else torch.full(leading, -100, device=device)
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
def test_one_valid_row(dims: tuple[int | None, int | None], reduction: str, backend: str, device: str) -> None:
    labels = torch.full((5,), -100, device=device)
    labels[3] = 7
    student, teacher = pair(dims, (5,), device=device, bias=True)
    check(backend, student, teacher, {"labels": labels, "ce_weight": 0.5, "reduction": reduction, "temperature": 2.0})


@sides
def test_ignored_rows_are_as_if_absent(dims: tuple[int | None, int | None], engine_backend: str, device: str) -> None:
    student, teacher = pair(dims, (7,), device=device)
    labels = make_labels((7,), 33, device)
    keep = labels != -100

    def cut(side: Any) -> Any:
        return side[keep] if isinstance(side, Tensor) else kd.LMHead(side.hidden[keep], side.weight)

    options = {"ce_weight": 0.5, "backend": engine_backend, "divergence": kd.JSD()}
    whole = run(kd.distillation_loss, student, teacher, {**options, "labels": labels})
    part = run(kd.distillation_loss, cut(student), cut(teacher), {**options, "labels": labels[keep]})
    for name, value in part.items():
        got = whole[name]
        if name in ("d_hidden", "d_logits"):
            assert (got[~keep] == 0).all()
            got = got[keep]
        torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-8)


def test_ignore_index_may_be_a_token(any_backend: str, device: str) -> None:
    """Padding with token 0 is common: a label inside the vocabulary can be the ignored one, and -100 is then out of range."""
    student, teacher = pair(device=device)
    labels = torch.tensor([0, 3, 0, 5, 32, 0], device=device)
    kwargs = {"ce_weight": 1.0, "reduction": "none", "backend": any_backend}
    loss = kd.distillation_loss(student, teacher, labels=labels, ignore_index=0, **kwargs)
    assert (loss == 0).tolist() == (labels == 0).tolist()
    with pytest.raises(ValueError, match="labels contain -100"):
        kd.distillation_loss(student, teacher, labels=labels.masked_fill(labels == 0, -100), ignore_index=0, **kwargs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_integer_labels(dtype: torch.dtype, any_backend: str, device: str) -> None:
    student, teacher = pair(device=device)
    labels = make_labels((6,), 33, device)
    expected = kd.distillation_loss(student, teacher, labels=labels, ce_weight=1.0)
    got = kd.distillation_loss(student, teacher, labels=labels.to(dtype), ce_weight=1.0, backend=any_backend)
    torch.testing.assert_close(got, expected)


def test_unsigned_labels(any_backend: str, device: str) -> None:
    """-100 is not a uint8, so nothing is ignored; 156, which is -100 modulo 256, is a token like any other."""
    student, teacher = pair(vocab=200, device=device)
    labels = torch.tensor([156, 3, 199, 0, 156, 7], device=device)
    expected = kd.distillation_loss(student, teacher, labels=labels, ce_weight=1.0, reduction="none", backend=any_backend)
    got = kd.distillation_loss(student, teacher, labels=labels.to(torch.uint8), ce_weight=1.0, reduction="none", backend=any_backend)
    torch.testing.assert_close(got, expected)


# ---- reductions


@sides
def test_reductions_agree(dims: tuple[int | None, int | None], any_backend: str, device: str) -> None:
    require(any_backend, device, torch.float32)
    student, teacher = pair(dims, (2, 4), device=device)
    labels = make_labels((2, 4), 33, device)
    weights = torch.rand(2, 4, device=device)
    options = {"labels": labels, "ce_weight": 0.5, "token_weights": weights, "backend": any_backend}
    none, total, mean, fixed = (
        kd.distillation_loss(student, teacher, **options, **how)
        for how in ({"reduction": "none"}, {"reduction": "sum"}, {}, {"num_items": torch.tensor(5, device=device)})
    )
    torch.testing.assert_close(none.sum(), total)
    torch.testing.assert_close(total / (labels != -100).sum(), mean)  # by valid tokens, not by the sum of weights
    torch.testing.assert_close(total / 5, fixed)
    assert (none[labels == -100] == 0).all()


@pytest.mark.parametrize(
    "items", [5, torch.tensor(5), torch.tensor([5]), torch.tensor(5.0, dtype=torch.float64), torch.tensor(5, dtype=torch.int32)]
)
def test_num_items_changes_no_dtype(items: int | Tensor, any_backend: str) -> None:
    """The loss is float32, whatever the count comes in (a float64 count after an all-reduce, say)."""
    student, teacher = pair()
    total = kd.distillation_loss(student, teacher, reduction="sum", backend=any_backend)
    loss = kd.distillation_loss(student, teacher, num_items=items, backend=any_backend)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss, total / 5)


@pytest.mark.parametrize("items", [0, torch.tensor(0)])
def test_num_items_zero_is_no_division_by_zero(items: int | Tensor) -> None:
    student, teacher = pair()
    loss = kd.distillation_loss(student, teacher, labels=torch.full((6,), -100), num_items=items)
    assert loss.item() == 0.0


@sides
def test_micro_batches_with_num_items_equal_one_batch(dims: tuple[int | None, int | None], device: str) -> None:
    student, teacher = pair(dims, (9,), device=device, dtype=torch.float64)
    labels = make_labels((9,), 33, device)
    options = {"ce_weight": 0.5, "temperature": 2.0, "num_items": int((labels != -100).sum()), "backend": "torch"}
    whole = run(kd.distillation_loss, student, teacher, {**options, "labels": labels})
    accumulated = to_dtype(student, None, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start, stop in ((0, 2), (2, 3), (3, 9)):

        def cut(side: Any, rows: slice = slice(start, stop)) -> Any:
            return side[rows] if isinstance(side, Tensor) else kd.LMHead(side.hidden[rows], side.weight)

        loss = kd.distillation_loss(cut(accumulated), cut(teacher), labels=labels[start:stop], **options)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole["loss"], rtol=1e-12, atol=1e-12)
    for t, name in zip(tensors(accumulated), list(whole)[1:], strict=True):
        torch.testing.assert_close(t.grad, whole[name], rtol=1e-12, atol=1e-12)


# ---- who gets a gradient, and what it costs

WANTED = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("wanted", WANTED, ids=lambda w: "".join("hwb"[i] if x else "-" for i, x in enumerate(w)))
@reductions
def test_no_gradient_work_that_nobody_wants(
    wanted: tuple[bool, bool, bool], reduction: str, engine_backend: str, device: str, calls: dict[str, int]
) -> None:
    student, teacher = pair(device=device, bias=True)
    labels = make_labels((6,), 33, device)
    options = {"labels": labels, "reduction": reduction, "divergence": kd.ReverseKL()}
    expected = run(dense_loss, student, teacher, options)
    hidden, weight, bias = wanted
    for t, want in zip(tensors(student), wanted, strict=True):
        t.requires_grad_(want)
    loss = kd.distillation_loss(student, teacher, **options, backend=engine_backend)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.sum().backward()
    for name, t, want in zip(("d_hidden", "d_weight", "d_bias"), tensors(student), wanted, strict=True):
        assert (t.grad is not None) == want
        if want:
            torch.testing.assert_close(t.grad, expected[name], rtol=1e-4, atol=1e-5)
    again = reduction == "none" and (weight or bias)  # the head's gradient takes the rows once more
    assert calls == {"logits": 4 if again else 2, "grad_hidden": int(hidden), "add_grad_weight": int(weight)}


@sides
@reductions
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_loss_alone(
    dims: tuple[int | None, int | None], reduction: str, context: Any, any_backend: str, device: str, calls: dict[str, int]
) -> None:
    student, teacher = pair(dims, device=device)
    student = to_dtype(student, None, requires_grad=True)
    expected = kd.distillation_loss(student, teacher, reduction=reduction, backend=any_backend)
    before = dict(calls)
    with context():
        got = kd.distillation_loss(student, teacher, reduction=reduction, backend=any_backend)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected)
    assert calls["grad_hidden"] == before["grad_hidden"]
    assert calls["add_grad_weight"] == before["add_grad_weight"]


def test_inference_tensors(backend: str, device: str) -> None:
    """Hidden states that were made under inference_mode, as a generation loop makes them."""
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


def test_no_other_warnings(any_backend: str) -> None:
    student, teacher = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(kd.distillation_loss, student, teacher, {"labels": make_labels((6,), 33), "backend": any_backend})
        with torch.no_grad():  # here a teacher that requires grad costs nothing
            kd.distillation_loss(student, to_dtype(teacher, None, requires_grad=True), backend=any_backend)


def test_self_distillation_of_one_tensor(any_backend: str) -> None:
    """The same logits on both sides: the student's gradient flows, the teacher's does not."""
    logits = torch.randn(4, 9, requires_grad=True)
    other = torch.randn(4, 9)
    with pytest.warns(UserWarning, match="detached"):
        kd.distillation_loss(logits + other, logits, backend=any_backend).backward()
    again = logits.detach().clone().requires_grad_()
    dense_loss(again + other, logits.detach()).backward()
    torch.testing.assert_close(logits.grad, again.grad)


# ---- graphs


@pytest.mark.parametrize("divergence", ONE_OF_EACH, ids=name_of)
@pytest.mark.parametrize("kind", ["head", "dense"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(divergence: Divergence, kind: str, reduction: str) -> None:
    """Central differences in float64: the one check that owes nothing to any formula of ours."""
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
def test_upstream_gradients_of_any_sign(dims: tuple[int | None, int | None], any_backend: str, device: str) -> None:
    student, teacher = pair(dims, (2, 4), device=device, bias=True)
    upstream = torch.tensor([[-1.5, 0.0, 2.0, 1e-3], [0.0, -30.0, 1.0, 0.5]], device=device)
    options = {"reduction": "none", "labels": make_labels((2, 4), 33, device), "ce_weight": 0.5, "token_weights": upstream.abs()}
    check(any_backend, student, teacher, options, upstream=upstream)


@sides
def test_loss_in_a_larger_graph(dims: tuple[int | None, int | None], any_backend: str, device: str) -> None:
    """Inputs that are no leaves, and a nonlinear function of the per-token losses after them."""
    student, teacher = pair(dims, (6,), device=device)

    def total(loss_fn: Any, side: Any, **kw: Any) -> Tensor:
        first = torch.tanh(tensors(side)[0]) * 2
        side = first if isinstance(side, Tensor) else kd.LMHead(first, side.weight * 1.5)
        return (loss_fn(side, teacher, reduction="none", **kw) ** 2).mean()

    ours, theirs = (to_dtype(student, None, requires_grad=True) for _ in range(2))
    total(kd.distillation_loss, ours, backend=any_backend).backward()
    total(dense_loss, theirs).backward()
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
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
    other = torch.autograd.grad(loss, tensors(student), 3 * upstream, retain_graph=True)
    second = torch.autograd.grad(loss, tensors(student), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, tensors(student), upstream)


@sides
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_derivatives_raise(dims: tuple[int | None, int | None], reduction: str, engine_backend: str, device: str) -> None:
    """They are not implemented. Zeros without a word would be worse."""
    student, teacher = pair(dims, device=device)
    student = to_dtype(student, None, requires_grad=True)
    loss = kd.distillation_loss(student, teacher, reduction=reduction, backend=engine_backend).sum()
    grads = torch.autograd.grad(loss, tensors(student), create_graph=True)
    with pytest.raises(RuntimeError, match=r"kdkernels.distillation_loss has no second derivative: .*reference"):
        torch.autograd.grad(sum((g**2).sum() for g in grads), tensors(student))


@reductions
def test_changed_inputs_are_noticed(reduction: str, engine_backend: str) -> None:
    """Backward may read the logits again: if they were overwritten meanwhile, autograd has to say so."""
    student = torch.randn(4, 9, requires_grad=True)
    logits = student * 1.0
    loss = kd.distillation_loss(logits, torch.randn(4, 9), reduction=reduction, backend=engine_backend).sum()
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@sides
def test_inputs_are_not_written_to(dims: tuple[int | None, int | None], any_backend: str, device: str) -> None:
    student, teacher = pair(dims, device=device, bias=True, softcap=5.0)
    student = to_dtype(student, None, requires_grad=True)
    before = [t.detach().clone() for t in tensors(student) + tensors(teacher)]
    labels, weights = make_labels((6,), 33, device), torch.rand(6, device=device)
    kept = labels.clone(), weights.clone()
    kd.distillation_loss(student, teacher, labels=labels, token_weights=weights, temperature=2.0, backend=any_backend).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(student) + tensors(teacher), strict=True))
    assert torch.equal(labels, kept[0])
    assert torch.equal(weights, kept[1])


@sides
@reductions
def test_deterministic(dims: tuple[int | None, int | None], reduction: str, engine_backend: str, device: str) -> None:
    student, teacher = pair(dims, (9,), device=device, bias=True)
    options = {
        "labels": make_labels((9,), 33, device),
        "reduction": reduction,
        "chunk_rows": 2,
        "backend": engine_backend,
        "divergence": kd.JSD(),
    }
    one, two = (run(kd.distillation_loss, student, teacher, options) for _ in range(2))
    assert all(torch.equal(one[n], two[n]) for n in one)


# ---- shapes and strides


def strided(kind: str, side: Any) -> Any:
    """A side with the same values, in awkward memory."""

    def awkward(t: Tensor) -> Tensor:
        if kind == "cut in time":  # hidden[:, :-1], as every causal shift makes it: no single row stride
            return torch.cat([t, torch.full_like(t[:, :1], float("nan"))], 1)[:, :-1]
        if kind == "transposed in time":  # [T, B, D] memory
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        if kind == "transposed":  # columns strided
            return t.mT.contiguous().mT
        if kind == "every other column":
            return torch.stack([t, torch.full_like(t, float("nan"))], -1).flatten(-2)[..., ::2]
        return t

    if isinstance(side, Tensor):
        return awkward(side)
    weight = side.weight.t().contiguous().t() if "transposed" in kind else side.weight
    return kd.LMHead(awkward(side.hidden), weight, side.bias)


@sides
@pytest.mark.parametrize("kind", ["cut in time", "transposed in time", "transposed", "every other column"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strides(dims: tuple[int | None, int | None], kind: str, masked: bool, reduction: str, engine_backend: str, device: str) -> None:
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
def test_expanded_logits(expanded: str, reduction: str, engine_backend: str, device: str) -> None:
    """Stride 0: the gradient must not be written through it."""
    base = make_side((1,) if expanded == "rows" else (4,), 33 if expanded == "rows" else 1, None, device=device)
    other = make_side((4,), 33, None, device=device, seed=3)
    for order in (1, -1):
        ours, theirs = (base.clone().requires_grad_() for _ in range(2))
        for loss_fn, leaf, kw in ((kd.distillation_loss, ours, {"backend": engine_backend}), (dense_loss, theirs, {})):
            student, teacher = (leaf.expand(4, 33), other)[::order]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = loss_fn(student, teacher, reduction=reduction, **kw)
            if order == 1:
                loss.sum().backward()
        if order == 1:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
            assert ours.grad.abs().sum() > 0 or expanded == "columns"


@sides
def test_row_permutation(dims: tuple[int | None, int | None], engine_backend: str, device: str) -> None:
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
def test_student_equal_to_teacher(divergence: Divergence, dtype: torch.dtype, dim: int | None, backend: str, device: str) -> None:
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


def test_module_is_the_function(any_backend: str) -> None:
    student, teacher = pair()
    labels, weights = make_labels((6,), 33), torch.rand(6)
    options = {"divergence": "jsd", "temperature": 2.0, "ce_weight": 0.5, "reduction": "sum", "backend": any_backend}
    module = kd.DistillationLoss(**options)
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())
    got = module(student, teacher, labels=labels, token_weights=weights)
    torch.testing.assert_close(got, kd.distillation_loss(student, teacher, labels=labels, token_weights=weights, **options))
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
    ],
)
def test_module_checks_its_options_early(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kd.DistillationLoss(**options)
