"""Checks that all kinds of sides share, and the record of a checked side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..divergences import Divergence
from ..fused.call import DTYPE_NAMES
from ..fused.work import Form


@dataclass(frozen=True, eq=False)
class Checked:
    """A side after its checks: form, tensors by name, leading shape, device and vocabulary (0: any)."""

    form: Form
    tensors: dict[str, Tensor]
    leading: torch.Size
    device: torch.device
    vocab: int = 0


class TeacherKind:
    """Base class of sides that can only be teachers."""

    def check(self, student: Checked, divergence: Divergence, temperature: float) -> Checked:
        """Check the teacher's tensors against the student's and the options of the loss."""
        raise NotImplementedError


def check_number(name: str, value: object) -> None:
    """Raise ``TypeError`` unless the value is a Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a Python number, got {type(value).__name__} (use .item() to convert a tensor)")


def check_floating(name: str, tensor: object) -> None:
    """Raise ``TypeError`` unless the argument is a tensor of one of the four floating dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPE_NAMES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}: convert with .float()")


def check_fit(name: str, teacher: Checked, student: Checked) -> None:
    """Raise ``ValueError`` unless a teacher with logits has the student's leading shape, vocabulary and device."""
    if teacher.leading != student.leading:
        raise ValueError(
            f"{name} has leading shape {list(teacher.leading)}, student {list(student.leading)}: both sides need one row per token, "
            "so pass the same positions of the same batch"
        )
    if teacher.vocab != student.vocab:
        raise ValueError(
            f"the vocabularies differ: student {student.vocab}, {name} {teacher.vocab}. If one is padded, cut both to the real "
            "size with LMHead(..., vocab_size=...) or logits[..., :size]; different tokenizers cannot be compared column by column"
        )
    if teacher.device != student.device:
        raise ValueError(f"{name} is on {teacher.device}, student on {student.device}: move one with .to(device)")


def check_ids(name: str, ids: Tensor) -> None:
    """Check the ids ``[..., K]`` of a sparse teacher."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name}.ids must be a tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{name}.ids must be integers, got {ids.dtype}")
    if ids.dim() < 1 or ids.shape[-1] < 1:
        raise ValueError(f"{name}.ids must be [..., K] with K >= 1, got shape {list(ids.shape)}")


def check_beside(name: str, tensor: Tensor, ids: Tensor) -> None:
    """Check that the values of a sparse teacher have the shape and device of its ids."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.shape != ids.shape:
        raise ValueError(f"{name} must have the ids' shape {list(ids.shape)}, got {list(tensor.shape)}")
    if tensor.device != ids.device:
        raise ValueError(f"{name} is on {tensor.device}, the ids on {ids.device}: move one with .to(device)")


def check_sparse_fit(kind: str, ids: Tensor, student: Checked) -> None:
    """Raise ``ValueError`` unless a sparse teacher has the student's leading shape and device."""
    if ids.shape[:-1] != student.leading:
        raise ValueError(
            f"teacher {kind}.ids have leading shape {list(ids.shape[:-1])}, student {list(student.leading)}: both need "
            "one row per token, so pass the same positions of the same batch"
        )
    if ids.device != student.device:
        raise ValueError(f"teacher is on {ids.device}, student on {student.device}: move its ids and values with .to(device)")
