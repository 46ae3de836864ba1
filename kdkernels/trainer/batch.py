"""The batch that the objective reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.collator import View, view_of

__all__ = ["Batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch on the student's device, with n scored tokens.

    transformers and accelerate move, split and count batches as mappings, so a collator returns a mapping, and the objective reads it
    into a ``Batch``. The mapping may hold other keys. Without ``teacher_input_ids`` the teacher reads the student's tokens. An item is one
    or more examples that are averaged together; without ``sizes``, each example is an item.
    """

    student: View
    teacher: View
    labels: Tensor  # [n] int64
    token_weights: Tensor  # [n]
    sizes: tuple[int, ...]  # examples of each item
    response: Tensor | None = None  # [n] bool: False for prompt tokens; None if all tokens are response tokens
    on_policy: bool = False  # the student wrote the responses

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Batch:
        """Convert the mapping that a :class:`~kdkernels.data.collator.Collator` returns."""
        student = view_of(inputs)
        teacher = view_of(inputs, "teacher_") if "teacher_input_ids" in inputs else student
        labels = inputs["labels"].flatten()[student.scored + 1]
        sizes = tuple(inputs.get("sizes", (1,) * len(student.counts)))
        return cls(student, teacher, labels, inputs["token_weights"], sizes, inputs.get("response"), bool(inputs.get("on_policy")))

    def item_indices(self) -> Tensor:
        """Return the index of the item of each scored token, ``[n]`` int64."""
        example_items = torch.repeat_interleave(torch.arange(len(self.sizes)), torch.tensor(self.sizes))
        return torch.repeat_interleave(example_items, torch.tensor(self.student.counts)).to(self.student.scored.device)
