"""A kind of teacher defined only in this file works, and the flat form of a call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from oracle import make_labels
from torch import Tensor

import kdkernels as kd
from kdkernels.divergences import Divergence
from kdkernels.fused.call import Call, Tensors, flat, flatten, restore
from kdkernels.fused.work import Form
from kdkernels.sides.ensemble import EnsembleForm, Member
from kdkernels.sides.head import HeadForm
from kdkernels.sides.logits import DenseForm, LogitsForm
from kdkernels.sides.side import Checked, TeacherKind
from kdkernels.sides.topk import TopKForm


@dataclass(frozen=True)
class Unigram(TeacherKind):
    """A teacher that gives every token the same logits ``[V]``, times ``sharpness``."""

    row: Tensor
    sharpness: float = 1.0

    def check(self, student: Checked, divergence: Divergence, temperature: float) -> Checked:
        form = UnigramForm(dtype=self.row.dtype, sharpness=self.sharpness)
        return Checked(form, {"row": self.row}, student.leading, student.device, student.vocab)


@flat
@dataclass(frozen=True)
class UnigramForm(DenseForm):
    sharpness: float = 1.0

    def teacher_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> UnigramRows:
        return UnigramRows(tensors["row"] * self.sharpness)

    def reference_logits(self, call: Call, tensors: Tensors, valid: Tensor | None) -> Tensor:
        return (tensors["row"] * self.sharpness).expand(2, 3, -1)


class UnigramRows:
    bias = None
    bytes_per_row = 0

    def __init__(self, row: Tensor) -> None:
        self.row = row

    def allocate(self, rows: int, name: str) -> None:
        return

    def release(self) -> None:
        return

    def logits(self, start: int, stop: int) -> Tensor:
        return self.row.expand(stop - start, -1).contiguous()


@pytest.mark.parametrize("backend", ["torch", "auto", "reference"])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_new_kind_of_teacher_works_without_other_changes(backend: str, chunk_rows: int | None) -> None:
    hidden, weight, row = torch.randn(2, 3, 8), torch.randn(21, 8), torch.randn(21)
    options = {"labels": make_labels((2, 3), 21), "divergence": "jsd", "backend": backend, "chunk_rows": chunk_rows, "temperature": 1.5}
    results = []
    for teacher in (Unigram(row, 1.5), (row * 1.5).expand(2, 3, 21)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = kd.distillation_loss(kd.LMHead(*leaves), teacher, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


CALLS = [
    Call(kd.ForwardKL(), 7),
    Call(kd.JSD(0.3), 11, temperature=2.5, student=HeadForm(2.0, 30.0, torch.bfloat16), teacher=LogitsForm(dtype=torch.float64)),
    Call(kd.LogitMSE(centered=True), 7, chunk_rows=3, memory_budget=10**12, logits_dtype=torch.bfloat16, backend="native"),
    Call(kd.ABDivergence(0.25, 0.5), 7, teacher=TopKForm(tail="renorm"), kd_weight=0.0, ce_weight=0.5, has_labels=True, ignore_index=-1),
    Call(
        kd.ReverseKL(),
        7,
        teacher=EnsembleForm(mode="logits", members=(Member(0.25, HeadForm(0.5, None, torch.float16)), Member(0.75, LogitsForm()))),
    ),
    Call(kd.ForwardKL(), 7, quantity="topk", count=5, wants_input=True, per_token=True, return_stats=True, t_squared=False),
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_call_survives_its_flat_form(call: Call) -> None:
    arguments = {"student.input": torch.zeros(2, 3), "labels": torch.zeros(2)}
    flat_form = flatten(call, Tensors(arguments))
    restored, tensors = restore(*flat_form)
    assert restored == call
    assert tensors.named.keys() == arguments.keys()
    assert all(tensors[name] is tensor for name, tensor in arguments.items())


def test_numbers_and_sizes_are_not_in_the_text_of_the_flat_form() -> None:
    """Otherwise torch.compile would recompile for another temperature or batch size."""
    call = Call(kd.JSD(0.3), 7, temperature=2.0, chunk_rows=4, student=HeadForm(2.0, 30.0))
    with_other_numbers = Call(kd.JSD(0.7), 9, temperature=3.0, chunk_rows=8, student=HeadForm(1.0, 20.0))
    assert flatten(call, Tensors({}))[3] == flatten(with_other_numbers, Tensors({}))[3]
    for changed in (replace(call, chunk_rows=None), replace(call, divergence=kd.ForwardKL()), replace(call, student=Form())):
        assert flatten(changed, Tensors({}))[3] != flatten(call, Tensors({}))[3]


def test_tensors_of_a_side_are_selected_by_prefix() -> None:
    tensors = Tensors({name: torch.empty(0) for name in ("student.input", "teacher.0.input", "teacher.0.bias", "teacher.1.input")})
    assert list(tensors.of("teacher").of("0").named) == ["input", "bias"]
    assert tensors.of("teacher").get("input") is None
