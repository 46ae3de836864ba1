"""A logits tensor ``[..., V]`` as a side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..fused import chunking
from ..fused.call import Call, Tensors, flat
from ..fused.work import Arrays, Form, Gradients, Rows, TeacherRows
from .side import Checked, check_floating


class DenseForm(Form):
    """A side with logits ``[..., V]``."""

    def reference(self, call: Call, tensors: Tensors, z: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        teacher = self.reference_logits(call, tensors, valid).detach()
        u = reference.over_temperature(teacher, call)
        value = reference.dense_divergence(call, z, teacher)
        return value, reference.entropy_of(torch.log_softmax(u, -1)), teacher.argmax(-1, keepdim=True)


@flat
@dataclass(frozen=True)
class LogitsForm(DenseForm):
    """A logits tensor, without transform or matrix product."""

    def student_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> LogitsRows:
        return LogitsRows(call, tensors, index)

    def teacher_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> TeacherRows:
        return LogitsRows(call, tensors, index)

    def reference_logits(self, call: Call, tensors: Tensors, valid: Tensor | None) -> Tensor:
        return reference.zero_invalid(tensors["input"].to(call.compute_dtype), valid)


class LogitsRows:
    """Logits chunk by chunk, as views or copies."""

    bias = None

    def __init__(self, call: Call, tensors: Tensors, index: Tensor | None) -> None:
        self.rows, self.vocab = Rows(tensors["input"], index), call.vocab

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one row of a copy; 0 if chunks are views."""
        itemsize = self.rows.tensor.element_size()
        return 0 if self.rows.sliceable else chunking.padded_vocab(self.vocab, itemsize) * itemsize

    def allocate(self, rows: int, name: str) -> None:
        """Do nothing: ``logits`` copies a chunk if necessary."""

    def release(self) -> None:
        """Do nothing: there is no buffer."""

    def logits(self, start: int, stop: int) -> Tensor:
        """Return logits ``[C, V]``."""
        return self.rows.take(start, stop)

    @property
    def dz_dtype(self) -> torch.dtype:
        """The dtype of the logits."""
        return self.rows.tensor.dtype

    def sink(self, call: Call, arrays: Arrays, gradients: Gradients) -> LogitsSink:
        """Return the sink for the gradient by the logits."""
        assert gradients.input is not None
        return LogitsSink(Rows(gradients.input, self.rows.index))


class LogitsSink:
    """The gradient by a logits tensor, written in place or copied."""

    dz_scale = 1.0

    def __init__(self, gradient: Rows) -> None:
        self.gradient = gradient

    def dz(self, start: int, stop: int, logits: Tensor) -> Tensor:
        """Return memory for the gradient of a chunk."""
        return self.gradient.take(start, stop) if self.gradient.sliceable else torch.empty_like(logits)

    def add(self, start: int, stop: int, dz: Tensor) -> None:
        """Copy the gradient of a chunk, unless it was written in place."""
        if not self.gradient.sliceable:
            self.gradient.put(start, stop, dz)

    def finish(self) -> None:
        """Do nothing: the gradient already has its final scale."""


def check_logits(name: str, logits: Tensor) -> Checked:
    """Check a tensor of logits ``[..., V]``."""
    check_floating(name, logits)
    if logits.dim() < 2:
        raise ValueError(f"{name} must have two or more dimensions [..., V], got shape {list(logits.shape)}: add one with [None]")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} has an empty vocabulary: shape {list(logits.shape)}")
    form = LogitsForm(dtype=logits.dtype)
    return Checked(form, {"input": logits}, logits.shape[:-1], logits.device, logits.shape[-1])
