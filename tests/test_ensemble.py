"""Several teachers as one: against the dense average in float64, with torch in the same dtype as the yardstick."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import require
from oracle import FLOATS, assert_close_2x, dense_logits, dense_loss, make_labels, make_side, name_of, run, to_dtype
from torch import Tensor

import kdkernels as kd

VOCAB = 211
WEIGHTS = (1.0, 2.0, 5.0)


def make_teachers(leading: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", vocab: int = VOCAB) -> list[kd.LMHead | Tensor]:
    """A padded head with everything, logits, a plain head: of three hidden sizes."""
    return [
        make_side(leading, vocab, 12, dtype=dtype, device=device, seed=11, bias=True, scale=0.5, softcap=9.0, pad=5),
        make_side(leading, vocab, None, dtype=dtype, device=device, seed=12),
        make_side(leading, vocab, 20, dtype=dtype, device=device, seed=13),
    ]


def average(teachers: list[Any], mode: str, temperature: float, weights: tuple[float, ...] | None = WEIGHTS) -> Tensor:
    """The logits of one teacher that is all of them, ``[..., V]``."""
    shares = [w / sum(weights) for w in weights] if weights else [1 / len(teachers)] * len(teachers)
    logits = [dense_logits(t) for t in teachers]
    wide = torch.promote_types(logits[0].dtype, torch.float32)
    if mode == "logits":
        return sum(s * z.to(wide) for s, z in zip(shares, logits, strict=True))  # type: ignore[return-value]
    return temperature * sum(s * torch.softmax(z.to(wide) / temperature, -1) for s, z in zip(shares, logits, strict=True)).log()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("mode", ["probs", "logits"])
@pytest.mark.parametrize("dim", [None, 16], ids=["logits", "head"])
def test_is_the_loss_against_the_average(any_backend: str, device: str, dim: int | None, mode: Any, dtype: torch.dtype) -> None:
    require(any_backend, device, dtype)
    leading = (2, 4)
    student, teachers = make_side(leading, VOCAB, dim, dtype=dtype, device=device), make_teachers(leading, dtype, device)
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        options = {"divergence": divergence, "temperature": 2.0, "labels": make_labels(leading, VOCAB, device), "ce_weight": 0.2}

        def loss(s: Any, _: Any, **options: Any) -> Tensor:
            return kd.distillation_loss(s, kd.Ensemble(teachers, WEIGHTS, mode=mode), backend=any_backend, chunk_rows=3, **options)

        ours = run(loss, student, teachers[1], options)
        eager = run(dense_loss, student, average(teachers, mode, 2.0), options)
        doubled = average([to_dtype(t, torch.float64) for t in teachers], mode, 2.0)
        truth = run(dense_loss, to_dtype(student, torch.float64), doubled, options)
        for name, value in ours.items():
            # A dense student's gradient beside a head is rounded twice: written in forward, multiplied in backward.
            scale = 2 * float(truth[name].abs().max()) if dim is None and name == "d_logits" else None
            assert_close_2x(f"{divergence} {name}", value, eager[name].to(value.dtype), truth[name], scale)


def test_the_modes_differ_and_have_no_default() -> None:
    teachers = make_teachers((4,), torch.float32)
    student = make_side((4,), VOCAB, None)
    values = [float(kd.distillation_loss(student, kd.Ensemble(teachers, mode=mode))) for mode in ("probs", "logits")]  # type: ignore[arg-type]
    assert abs(values[0] - values[1]) > 0.01
    with pytest.raises(TypeError, match="mode"):
        kd.Ensemble(teachers)  # type: ignore[call-arg]


@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_of_one_is_that_one(mode: Any, engine_backend: str, device: str) -> None:
    student, teacher = make_side((4,), VOCAB, 8, device=device), make_side((4,), VOCAB, 12, device=device, seed=2)
    one = kd.distillation_loss(student, kd.Ensemble([teacher], mode=mode), temperature=1.5, backend=engine_backend)
    torch.testing.assert_close(one, kd.distillation_loss(student, teacher, temperature=1.5, backend=engine_backend))


@pytest.mark.parametrize("mode", ["probs", "logits"])
def test_minus_infinity_and_nan_stay_where_they_are(mode: Any, engine_backend: str, device: str) -> None:
    teachers = [torch.randn(4, 20, device=device) for _ in range(2)]
    for t in teachers:
        t[:, 3] = -torch.inf  # neither gives it anything
    teachers[0][1, 5] = torch.nan
    student = torch.randn(4, 20, device=device)
    student[:, 3] = -torch.inf
    loss = kd.distillation_loss(student, kd.Ensemble(teachers, mode=mode), reduction="none", backend=engine_backend)
    assert torch.isnan(loss).tolist() == [False, True, False, False]


def test_compiles_gives_the_teachers_no_gradient_and_can_go_back_twice(engine_backend: str) -> None:
    teachers = make_teachers((5,), torch.float32)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(VOCAB, 8, requires_grad=True)

    def step(h: Tensor, w: Tensor, *members: Tensor) -> Tensor:
        together = kd.Ensemble([members[0], kd.LMHead(members[1], members[2])], mode="probs")
        return kd.distillation_loss(kd.LMHead(h, w), together, reduction="none", backend=engine_backend).sum()

    assert isinstance(teachers[2], kd.LMHead)
    tensors = (dense_logits(teachers[1]), teachers[2].hidden, teachers[2].weight)
    expected = torch.autograd.grad(step(hidden, weight, *tensors), (hidden, weight))
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight, *tensors)
    for _ in range(2):
        for found, truth in zip(torch.autograd.grad(loss, (hidden, weight), retain_graph=True), expected, strict=True):
            torch.testing.assert_close(found, truth)
    tensors[0].requires_grad_()
    with pytest.warns(UserWarning, match="teacher requires grad"):
        step(hidden, weight, *tensors).backward()
    assert tensors[0].grad is None


def test_plan_counts_the_average_and_the_largest_member() -> None:
    teachers = make_teachers((64,), torch.float32)
    student = make_side((64,), VOCAB, 16)
    one, three = (kd.plan(student, t, backend="torch") for t in (teachers[2], kd.Ensemble(teachers, mode="probs")))
    assert three.buffer_bytes == pytest.approx(one.buffer_bytes * 3 / 2, rel=0.01)
    assert three.dense_bytes == one.dense_bytes + 64 * VOCAB * 4


def test_bad_input() -> None:
    z = torch.randn(3, 10)
    with pytest.raises(ValueError, match="empty"):
        kd.Ensemble([], mode="probs")
    with pytest.raises(TypeError, match="must be a list"):
        kd.Ensemble(z, mode="probs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mode must be one of 'probs', 'logits', got 'mean'"):
        kd.Ensemble([z], mode="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one per teacher, 2, got 1"):
        kd.Ensemble([z, z], [1.0], mode="probs")
    with pytest.raises(ValueError, match="weights must be finite and > 0, got 0"):
        kd.Ensemble([z, z], [1.0, 0.0], mode="probs")
    with pytest.raises(ValueError, match=r"student 10, teacher.teachers\[1\] 11"):
        kd.distillation_loss(z, kd.Ensemble([z, torch.randn(3, 11)], mode="probs"))
    with pytest.raises(ValueError, match=r"teacher.teachers\[1\] has leading shape \[4\]"):
        kd.distillation_loss(z, kd.Ensemble([z, torch.randn(4, 10)], mode="probs"))
