"""Ensembles of teachers against the dense average in float64, with twice the error of torch in the same dtype allowed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import interpreted, require
from oracle import FLOATS, ONE_OF_EACH, all_pairs, assert_close_2x, dense_logits, make_labels, make_side, name_of, to_dtype
from oracle import dense_loss as loss_of_one
from torch import Tensor

import kdkernels as kd

pytestmark = pytest.mark.usefixtures("poison")
loss = kd.distillation_loss

VOCAB = 301
MODES = ("probs", "logits")


def make_ensemble(
    leading: tuple[int, ...], mode: Any, kind: str = "heads", dtype: torch.dtype = torch.float32, device: str = "cpu", vocab: int = VOCAB
) -> kd.Ensemble:
    """Build an ensemble of three teachers with different hidden sizes, dtypes, biases, scales and softcaps."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dense = [make_side(leading, vocab, None, dtype=d, device=device, seed=s) for s, d in ((11, dtype), (12, wide), (13, dtype))]
    heads = [
        make_side(leading, vocab, 8, dtype=dtype, device=device, seed=21),
        make_side(leading, vocab, 12, dtype=dtype, device=device, seed=22, bias=True, softcap=6.0, pad=5),
        make_side(leading, vocab, 5, dtype=wide, device=device, seed=23, bias=True, scale=0.5),
    ]
    teachers = {"heads": heads, "logits": dense, "mixed": [dense[0], heads[1], heads[2]]}[kind]
    return kd.Ensemble(teachers, [1.0, 2.0, 0.5], mode=mode)


def average(teacher: kd.Ensemble, temperature: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return the ensemble's dense logits ``[..., V]``, computed in ``dtype`` (None: float32 or wider)."""
    logits = [dense_logits(t if dtype is None else to_dtype(t, dtype)) for t in teacher.teachers]
    logits = [z.to(torch.promote_types(z.dtype, torch.float32)) for z in logits]
    weights = teacher.weights or [1.0] * len(logits)
    shares = [w / sum(weights) for w in weights]
    if teacher.mode == "logits":
        return sum(w * z for w, z in zip(shares, logits, strict=True))  # type: ignore[return-value]
    terms = [torch.log_softmax(z / temperature, -1) + math.log(w) for w, z in zip(shares, logits, strict=True)]
    return temperature * torch.logsumexp(torch.stack(terms), 0)


def run(student: Any, teacher: Any, options: dict[str, Any], loss_fn: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    student = to_dtype(student, dtype, requires_grad=True)
    loss = loss_fn(student, teacher, **options)
    loss.backward(torch.linspace(0.5, 2.0, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape))
    tensors = {"logits": student} if isinstance(student, Tensor) else vars(student)
    return {"loss": loss.detach(), **{f"d_{n}": t.grad for n, t in tensors.items() if isinstance(t, Tensor)}}


def check(backend: str, student: Any, teacher: kd.Ensemble, options: dict[str, Any]) -> dict[str, Tensor]:
    temperature = options.get("temperature", 1.0)
    result = run(student, teacher, {**options, "backend": backend}, kd.distillation_loss)
    eager = run(student, average(teacher, temperature), options, loss_of_one)
    truth = run(student, average(teacher, temperature, torch.float64), options, loss_of_one, torch.float64)
    for name, value in result.items():
        # The gradient is rounded twice: stored in the student's dtype in forward, multiplied by the upstream gradient in backward.
        scale = 2 * float(truth[name].abs().max()) if name == "d_logits" else None
        assert_close_2x(name, value, eager[name], truth[name], scale)
    return result


CASES = all_pairs(
    {
        "divergence": ONE_OF_EACH,
        "mode": MODES,
        "kind": ("heads", "logits", "mixed"),
        "student": (None, 8),
        "dtype": FLOATS,
        "temperature": (1.0, 2.0, 0.5),
        "reduction": ("mean", "none"),
        "chunk_rows": (None, 3),
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda c: ",".join(name_of(v) for v in c.values()))
def test_ensemble_equals_one_averaged_teacher(case: dict[str, Any], any_backend: str, device: str) -> None:
    require(any_backend, device, case["dtype"])
    leading = (2, 4)
    student = make_side(leading, VOCAB, case["student"], dtype=case["dtype"], device=device)
    teacher = make_ensemble(leading, case["mode"], case["kind"], case["dtype"], device)
    options = {n: case[n] for n in ("divergence", "temperature", "reduction", "chunk_rows")}
    labels = make_labels(leading, VOCAB, device)
    check(any_backend, student, teacher, {**options, "labels": labels, "ce_weight": 0.4})


@pytest.mark.parametrize("mode", MODES)
def test_ensemble_of_one_teacher_equals_that_teacher(mode: Any, any_backend: str, device: str) -> None:
    student, teacher = (make_side((5,), VOCAB, 8, device=device, seed=s) for s in (0, 1))
    results = [
        run(student, t, {"temperature": 2.0, "backend": any_backend}, kd.distillation_loss)
        for t in (teacher, kd.Ensemble([teacher], mode=mode))
    ]
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=2e-5, atol=1e-6)


def test_modes_differ_and_weights_are_normalised() -> None:
    student, first, second = (make_side((5,), VOCAB, None, seed=s) for s in (0, 1, 2))
    results = [
        float(kd.distillation_loss(student, kd.Ensemble([first, second], weights, mode=mode)))
        for mode, weights in (("probs", None), ("logits", None), ("probs", [3, 3]), ("logits", [0.1, 0.1]))
    ]
    assert results[2:] == pytest.approx(results[:2])
    assert abs(results[0] - results[1]) > 0.1


@pytest.mark.parametrize("mode", MODES)
def test_columns_that_some_or_all_teachers_exclude(mode: Any, any_backend: str, device: str) -> None:
    """With averaged logits, a column excluded by one teacher has probability 0. With averaged probabilities, only one excluded by all."""
    if interpreted(any_backend, device):
        pytest.skip("the row kernel gets a plain teacher")
    student, *teachers = (make_side((4,), 40, None, device=device, seed=s) for s in range(3))
    for t in teachers:
        t[:, 30:] = -math.inf
    teachers[0][:, 20:30] = -math.inf
    for divergence in (kd.ForwardKL(), kd.JSD(0.3)):
        result = check(any_backend, student, kd.Ensemble(teachers, mode=mode), {"divergence": divergence})
        assert all(torch.isfinite(v).all() for v in result.values())
        # A column that the student excludes too has no effect.
        short = student.clone()
        short[:, 37:] = -math.inf
        results = [
            run(x, kd.Ensemble([t[:, :n] for t in teachers], mode=mode), {"divergence": divergence, "backend": any_backend}, loss)
            for n, x in ((40, short), (37, short[:, :37]))
        ]
        torch.testing.assert_close(results[0]["loss"], results[1]["loss"])
        torch.testing.assert_close(results[0]["d_logits"][:, :37], results[1]["d_logits"])
        assert (results[0]["d_logits"][:, 37:] == 0).all()


def test_tiny_probabilities_of_all_teachers_are_not_lost(any_backend: str, device: str) -> None:
    """exp(-100) is 0 in float32. An average of such probabilities would make the reverse KL infinite."""
    student, *teachers = (make_side((3,), 20, None, device=device, seed=s) for s in range(3))
    for t in teachers:
        t[:, 0] += 200
    loss = kd.distillation_loss(student, kd.Ensemble(teachers, mode="probs"), divergence="reverse_kl", backend=any_backend)
    assert torch.isfinite(loss)


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_row_and_ignored_rows_are_zero(mode: Any, any_backend: str, device: str) -> None:
    student = to_dtype(make_side((5,), 40, 8, device=device), None, requires_grad=True)
    teacher = make_ensemble((5,), mode, device=device, vocab=40)
    labels = torch.tensor([1, -100, 2, 3, 4], device=device)
    for t in teacher.teachers:
        t.hidden[1] = math.nan
    teacher.teachers[2].hidden[3] = math.nan
    loss = kd.distillation_loss(student, teacher, labels=labels, reduction="none", backend=any_backend, chunk_rows=2)
    assert loss.isnan().tolist() == [False, False, False, True, False]
    assert loss[1] == 0
    loss[[0, 1, 2, 4]].sum().backward()
    assert isinstance(student, kd.LMHead)
    assert (student.hidden.grad[1] == 0).all()


@pytest.mark.parametrize("kind", ["heads", "logits", "mixed"])
@pytest.mark.parametrize("dim", [None, 8])
def test_result_does_not_depend_on_chunks_or_a_second_backward(kind: str, dim: int | None, engine_backend: str, device: str) -> None:
    student = to_dtype(make_side((11,), VOCAB, dim, device=device), None, requires_grad=True)
    leaves = [student] if isinstance(student, Tensor) else [student.hidden, student.weight]
    teacher = make_ensemble((11,), "probs", kind, device=device)
    results = []
    for options in ({}, {"chunk_rows": 3}, {"chunk_rows": 1, "reduction": "none"}, {"memory_budget": 9000}):
        loss = kd.distillation_loss(student, teacher, **{"reduction": "sum", **options}, backend=engine_backend).sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, leaves), strict=True))
        results.append((loss, *first))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ensemble_passes_gradcheck(mode: Any, reduction: str) -> None:
    teacher = make_ensemble((3,), mode, "mixed", torch.float64, vocab=11)
    hidden, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (11, 4)))

    def loss(h: Tensor, w: Tensor) -> Tensor:
        return kd.distillation_loss(kd.LMHead(h, w), teacher, divergence="jsd", temperature=1.3, reduction=reduction, chunk_rows=2)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_each_head_is_multiplied_once(calls: dict[str, int]) -> None:
    """Three teachers and the student have one product each, and backward one for each gradient."""
    student = to_dtype(make_side((6,), 23, 4), None, requires_grad=True)
    loss = kd.distillation_loss(student, make_ensemble((6,), "probs", vocab=23), backend="torch")
    loss.backward()
    assert calls == {"logits": 4, "grad_hidden": 1, "add_grad_weight": 1}


def test_no_gradient_reaches_a_teacher() -> None:
    student = torch.randn(3, 10, requires_grad=True)
    teachers = [torch.randn(3, 10, requires_grad=True) for _ in range(2)]
    with pytest.warns(UserWarning, match="the teacher requires grad"):
        loss = kd.distillation_loss(student, kd.Ensemble(teachers, mode="logits"))
    loss.backward()
    assert student.grad is not None
    assert all(t.grad is None for t in teachers)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ensemble_compiles_into_one_graph(reduction: str, engine_backend: str) -> None:
    student = to_dtype(make_side((6,), 40, 8), None, requires_grad=True)
    teacher = make_ensemble((6,), "probs", "mixed", vocab=40)
    assert isinstance(student, kd.LMHead)
    leaves = [student.hidden, student.weight]

    def step(h: Tensor, w: Tensor, first: Tensor) -> Tensor:
        ensemble = kd.Ensemble([first, *teacher.teachers[1:]], [1.0, 2.0, 0.5], mode="probs")
        return kd.distillation_loss(kd.LMHead(h, w), ensemble, temperature=2.0, reduction=reduction, backend=engine_backend).sum()

    plain = torch.autograd.grad(step(*leaves, teacher.teachers[0]), leaves)
    fused = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves, teacher.teachers[0])
    for _ in range(2):
        for a, b in zip(plain, torch.autograd.grad(fused, leaves, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_equals_bfloat16_operands(engine_backend: str, device: str) -> None:
    student = make_side((6,), 40, 8, device=device)
    teacher = make_ensemble((6,), "logits", device=device, vocab=40)
    half = kd.Ensemble([to_dtype(t, torch.bfloat16) for t in teacher.teachers], teacher.weights, mode="logits")
    with torch.autocast(device, torch.bfloat16):
        mixed = kd.distillation_loss(student, teacher, backend=engine_backend)
    exact = kd.distillation_loss(to_dtype(student, torch.bfloat16), half, backend=engine_backend)
    torch.testing.assert_close(mixed, exact, rtol=2e-3, atol=1e-4)  # only one of the two rounds the biases


def test_plan_counts_two_teacher_buffers() -> None:
    """The two teacher buffers hold the average and one head's logits, for any number of teachers."""
    head = kd.LMHead(torch.randn(8, 4), torch.randn(1024, 4))
    one, two, six = (kd.plan(head, t, backend="torch") for t in (head, *(kd.Ensemble([head] * n, mode="probs") for n in (2, 6))))
    row = 1024 * 4
    assert (one.buffer_bytes, two.buffer_bytes, six.buffer_bytes) == (8 * row * 2, 8 * row * 3, 8 * row * 3)
    assert six.dense_bytes == 8 * row * (1 + 6)
    meta = kd.LMHead(torch.empty(64, 4, device="meta"), torch.empty(1024, 4, device="meta"))
    assert kd.plan(meta, kd.Ensemble([meta, meta], mode="logits"), memory_budget=8 * row * 3).rows_per_chunk == 8


def test_statistics_equal_those_of_the_average(any_backend: str, device: str) -> None:
    student = make_side((6,), VOCAB, 8, device=device)
    teacher = make_ensemble((6,), "probs", device=device)
    options = {"labels": make_labels((6,), VOCAB, device), "temperature": 2.0, "return_stats": True, "backend": any_backend}
    _, stats = kd.distillation_loss(student, teacher, **options)
    _, expected = kd.distillation_loss(student, average(teacher, 2.0), **options)
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(stats, name), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: kd.Ensemble([z, z]), TypeError, "mode"),
        (lambda z: kd.Ensemble([z, z], mode="mean"), ValueError, "Ensemble.mode must be one of 'probs', 'logits', got 'mean'"),
        (lambda z: kd.Ensemble([], mode="probs"), ValueError, "Ensemble.teachers is empty"),
        (lambda z: kd.Ensemble(z, mode="probs"), TypeError, "Ensemble.teachers must be a list .* got Tensor"),
        (lambda z: loss(z, kd.Ensemble([z, "z"], mode="probs")), TypeError, r"teacher.teachers\[1\] must be an LMHead or .* got str"),
        (lambda z: loss(z, kd.Ensemble([kd.topk_logprobs(z, 2)], mode="probs")), TypeError, r"teachers\[0\] .* got TopK"),
        (lambda z: kd.Ensemble([z, z], [1.0], mode="probs"), ValueError, "one per teacher, 2, got 1"),
        (lambda z: kd.Ensemble([z, z], [1.0, 0.0], mode="probs"), ValueError, "Ensemble.weights must be finite and > 0, got 0.0"),
        (lambda z: kd.Ensemble([z], ["1"], mode="probs"), TypeError, "Ensemble.weights must be Python numbers, got str"),
        (lambda z: kd.Ensemble([z], [math.nan], mode="probs"), ValueError, "weights must be finite and > 0, got nan"),
        (lambda z: kd.Ensemble([z], torch.ones(1), mode="probs"), TypeError, "Ensemble.weights must be a list of numbers, got Tensor"),
        (lambda z: loss(z, kd.Ensemble([z, z[:, :9]], mode="probs")), ValueError, r"10, teacher.teachers\[1\] 9.*vocab_size"),
        (lambda z: loss(z, kd.Ensemble([z, z[:2]], mode="probs")), ValueError, r"teacher.teachers\[1\] has leading shape \[2\]"),
        (lambda z: loss(z, kd.Ensemble([z, z.long()], mode="probs")), TypeError, r"teachers\[1\] must be float16, bfloat16"),
        (lambda z: loss(z, kd.Ensemble([z, z.to("meta")], mode="probs")), ValueError, r"teachers\[1\] is on meta"),
        (lambda z: loss(kd.Ensemble([z], mode="probs"), z), TypeError, "student must be an LMHead or a tensor"),
    ],
)  # fmt: skip
def test_invalid_ensembles_raise(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(3, 10))
