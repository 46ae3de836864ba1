"""A kind of teacher used only in tests, defined as a new file in ``kdkernels/sides`` would define it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdkernels import reference
from kdkernels.divergences import Divergence
from kdkernels.fused.call import Call, Tensors, flat
from kdkernels.fused.work import TeacherRows
from kdkernels.sides.logits import DenseForm, LogitsRows, check_logits
from kdkernels.sides.side import Checked, TeacherKind, check_fit


@dataclass(frozen=True, eq=False)
class Sharpened(TeacherKind):
    """Logits ``[..., V]`` times a factor."""

    logits: Tensor
    factor: float

    def check(self, student: Checked, divergence: Divergence, temperature: float) -> Checked:
        logits = check_logits("Sharpened.logits", self.logits)
        check_fit("Sharpened", logits, student)
        return Checked(SharpenedForm(self.factor, dtype=logits.form.dtype), logits.tensors, logits.leading, logits.device, logits.vocab)


@flat
@dataclass(frozen=True)
class SharpenedForm(DenseForm):
    """Dense logits that the row kernels multiply by ``scale`` while reading."""

    def teacher_rows(self, call: Call, tensors: Tensors, index: Tensor | None) -> TeacherRows:
        return LogitsRows(call, tensors, index)

    def reference_logits(self, call: Call, tensors: Tensors, valid: Tensor | None) -> Tensor:
        return reference.zero_invalid(tensors["input"].to(call.compute_dtype), valid) * self.scale
