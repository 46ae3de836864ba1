"""Check the public arguments and build a ``Call`` and its ``Tensors``. All checks run before any computation."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import divergences
from ..backends import selection
from ..divergences import Divergence
from ..sides import Side, Teacher, check_number, check_side, check_teacher
from ..sides.side import Checked
from .call import SMALLEST_TEMPERATURE, Call, Quantity, Tensors
from .ops import refuse_tangents
from .work import Form


@dataclass(frozen=True)
class Options:
    """Options of a loss or another quantity, before checking. ``distillation_loss`` documents them."""

    divergence: Divergence | str = "forward_kl"
    temperature: float = 1.0
    t_squared: bool = True
    ignore_index: int = -100
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    reduction: str = "mean"
    memory_budget: int | None = None
    chunk_rows: int | None = None
    logits_dtype: torch.dtype | None = None
    backend: str = "auto"
    return_stats: bool = False

    def check(self) -> Divergence:
        """Check the options that do not depend on tensors, and return the divergence."""
        resolved = divergences.resolve(self.divergence)
        for name in ("temperature", "kd_weight", "ce_weight"):
            check_number(name, getattr(self, name))
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be finite and > 0, got {self.temperature}; for hard targets use labels and ce_weight")
        for name in ("kd_weight", "ce_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {self.reduction!r}")
        for name, value, unit in (("memory_budget", self.memory_budget, "bytes"), ("chunk_rows", self.chunk_rows, "rows")):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value <= 0):
                raise ValueError(f"{name} must be a positive int ({unit}) or None, got {value!r}")
            if value is not None and value >= 2**63:
                raise ValueError(f"{name}={value} is more than 64 bits hold: give a number of {unit} below 2**63, or None")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, (int, torch.SymInt)):
            raise TypeError(f"ignore_index must be an int, got {self.ignore_index!r}; without labels to ignore leave it at -100")
        for name in ("t_squared", "return_stats"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        return resolved

    def call(self, divergence: Divergence, quantity: Quantity, student: Checked, teacher: Form | None = None, **fields: Any) -> Call:
        """Build the call for a quantity. ``fields`` are fields of the call that these options do not determine, or replace."""
        grad = torch.is_grad_enabled() and quantity not in ("topk", "sample")
        wants = {f"wants_{name}": grad and tensor.requires_grad for name, tensor in student.tensors.items()}
        same = ("t_squared", "kd_weight", "ce_weight", "ignore_index", "logits_dtype", "return_stats", "memory_budget", "chunk_rows")
        every: dict[str, Any] = {
            "vocab": student.vocab,
            "temperature": max(self.temperature, SMALLEST_TEMPERATURE),
            "student": student.form,
            "teacher": Form() if teacher is None else teacher,
            "per_token": self.reduction == "none",
            **wants,
            **{name: getattr(self, name) for name in same},
            **fields,
        }
        return Call(divergence, quantity=quantity, **every)


def prepare(
    student: Side,
    teacher: Teacher | None,
    options: Options,
    labels: Tensor | None,
    token_weights: Tensor | None,
    quantity: Quantity = "distillation",
) -> tuple[Call, Tensors]:
    """Check all arguments of a loss. ``teacher`` is None for the student's cross-entropy alone."""
    divergence = options.check()
    student_side = check_side("student", student)
    teacher_side = None
    if quantity == "distillation":
        teacher_side = check_teacher(teacher, student_side, divergence, options.temperature)
    _check_labels(labels, student_side, options.ce_weight)
    _check_token_weights(token_weights, student_side)
    forms = [student_side.form] if teacher_side is None else [student_side.form, teacher_side.form]
    _check_logits_dtype(options.logits_dtype, *forms)
    teacher_tensors = {} if teacher_side is None else teacher_side.tensors
    if torch.is_grad_enabled() and any(t.requires_grad for t in teacher_tensors.values()) and not torch.compiler.is_compiling():
        warnings.warn(
            "the teacher requires grad: it is detached, no gradient reaches it (compute it under torch.no_grad() to save memory)",
            stacklevel=3,
        )
    named = {f"student.{name}": tensor for name, tensor in student_side.tensors.items()}
    named |= {f"teacher.{name}": tensor.detach() for name, tensor in teacher_tensors.items()}
    if labels is not None:
        named["labels"] = labels.detach().to(torch.int64)  # uint8 cannot hold an ignore_index of -100
    if token_weights is not None:
        named["token_weights"] = token_weights.detach()
    teacher_form = None if teacher_side is None else teacher_side.form
    call = options.call(divergence, quantity, student_side, teacher_form, has_labels=labels is not None)
    return _chosen(call, options.backend, student_side), Tensors(named)


def prepare_head(side: Side, quantity: Quantity, options: Options, ids: Tensor | None = None, count: int = 0) -> tuple[Call, Tensors]:
    """Check the arguments of a per-token quantity of one side. ``ids``: ``[...]`` or ``[..., K]``."""
    divergence = options.check()
    checked = check_side("side", side)
    named = {f"student.{name}": tensor for name, tensor in checked.tensors.items()}
    if ids is not None:
        _check_ids(ids, checked)
        named["labels"] = ids.detach().to(torch.int64)  # uint8 cannot hold -1, int8 cannot hold the vocabulary
    call = options.call(divergence, quantity, checked, has_labels=ids is not None, count=count, ignore_index=-1, per_token=True)
    return _chosen(call, options.backend, checked), Tensors(named)


def prepare_softmax(logits: Tensor, quantity: Quantity, options: Options) -> Call:
    """Check the options of ``softmax`` and ``log_softmax``. The caller has checked the tensors."""
    divergence = options.check()
    side = Checked(Form(dtype=logits.dtype), {"input": logits}, logits.shape[:-1], logits.device, logits.shape[-1])
    return _chosen(options.call(divergence, quantity, side), options.backend, side)


def _chosen(call: Call, backend: str, side: Checked) -> Call:
    """Return the call with its backend selected."""
    return replace(call, backend=selection.select(backend, device_of(side.device), call.storages, call.kernels))


def device_of(device: torch.device) -> torch.device:
    """Return the device to plan for: ``cpu`` for ``meta`` tensors."""
    return torch.device("cpu") if device.type == "meta" else device


def _check_labels(labels: Tensor | None, student: Checked, ce_weight: float) -> None:
    _check_per_token("labels", labels, student)
    if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if isinstance(ce_weight, (int, float)) and ce_weight != 0 and labels is None:
        raise ValueError(f"ce_weight={ce_weight} needs labels: pass labels=, or set ce_weight=0")


def _check_token_weights(weights: Tensor | None, student: Checked) -> None:
    _check_per_token("token_weights", weights, student)
    if weights is None:
        return
    if not weights.is_floating_point():
        raise TypeError(f"token_weights must be floating point, got {weights.dtype}: convert with .float()")
    constant = "but are constants here: detach them, or take reduction='none' and multiply by them"
    if weights.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"token_weights require grad, {constant}")
    refuse_tangents(f"token_weights have a forward-mode tangent, {constant}", weights)


def _check_per_token(name: str, tensor: Tensor | None, student: Checked) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != student.leading:
        raise ValueError(f"{name} must have the leading shape {list(student.leading)} of the student, got {list(tensor.shape)}")
    if tensor.device != student.device:
        raise ValueError(f"{name} is on {tensor.device}, student on {student.device}: move one with .to(device)")


def _check_ids(ids: Tensor, side: Checked) -> None:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids must be a tensor, got {type(ids).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    if ids.shape != side.leading and (ids.shape[:-1] != side.leading or ids.shape[-1:] == (0,)):
        raise ValueError(
            f"ids must have the leading shape {list(side.leading)} of the side, or one dimension more for K >= 1 ids each, "
            f"got {list(ids.shape)}"
        )
    if ids.device != side.device:
        raise ValueError(f"ids are on {ids.device}, the side on {side.device}: move one with .to(device)")


def _check_logits_dtype(logits_dtype: torch.dtype | None, *forms: Form) -> None:
    if logits_dtype is None:
        return
    heads = [dtype for form in forms for dtype in form.heads]
    wide = torch.float64 if any(form.dtype == torch.float64 for form in forms) else torch.float32
    if logits_dtype not in (torch.float32, torch.bfloat16, torch.float64) or (logits_dtype != wide and heads and logits_dtype not in heads):
        raise ValueError(
            f"logits_dtype={logits_dtype} fits neither head ({', '.join(map(str, heads)) or 'there is none'}): use None, {wide}, "
            "or torch.bfloat16 with bfloat16 heads (or under bfloat16 autocast)"
        )
