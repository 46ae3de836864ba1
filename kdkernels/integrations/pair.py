"""Student and teacher of another library's trainer, and the loss between them without dense logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import cross_entropy, distillation_loss
from ..divergences import Divergence
from ..sides import Side
from ..tap.head import HeadTap, Tapped
from ..tap.patching import unwrap

__all__ = ["IGNORED", "Options", "Pair", "Scored", "pair_of", "token_loss"]

IGNORED = -100


@dataclass(frozen=True)
class Options:
    """Options of the loss per token: ``kd_weight * T^2 * D + ce_weight * CE``, with T^2 only if ``t_squared``."""

    divergence: Divergence | str = "forward_kl"
    temperature: float = 1.0
    t_squared: bool = True
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    memory_budget: int | None = None


@dataclass(frozen=True, eq=False)
class Scored:
    """The scored positions: those that predict a labelled token.

    Attributes:
        rows: ``[n]`` int64, positions in the flattened ``[B * L]``.
        labels: ``[n]``, the token predicted at each position.
    """

    rows: Tensor
    labels: Tensor

    @classmethod
    def of(cls, labels: Tensor, shifted: bool = False) -> Scored:
        """Return the scored positions of a batch.

        Args:
            labels: ``[B, L]``, -100 for ignored tokens. Position i holds token i or, with ``shifted``, the token predicted at i.
        """
        if not shifted:
            labels = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        rows = (labels != IGNORED).flatten().nonzero().squeeze(1)
        return cls(rows, labels.flatten()[rows])


class Pair:
    """The head taps of a student and a teacher.

    Args:
        student, teacher: causal language models, or wrappers around them; the same model twice for self-distillation.
        vocab_size: the real vocabulary size, if a head is padded; columns beyond it are cut off.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, vocab_size: int | None = None) -> None:
        self.student = HeadTap(student, vocab_size)
        self.teacher = self.student if unwrap(teacher) is self.student.base else HeadTap(teacher, vocab_size)

    def teacher_side(self, model: nn.Module, inputs: Mapping[str, Any], scored: Scored) -> Side:
        """Run the teacher without gradients and return its side at the scored positions."""
        with torch.no_grad():
            tapped: Tapped = self.teacher(model, **inputs)
            with tapped.computing():
                return tapped.side(scored.rows)

    def loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        scored: Scored,
        compute: Callable[[Side, Tapped], Tensor],
        with_outputs: bool = False,
    ) -> tuple[Tensor, Any]:
        """Run the student and compute the loss inside its forward pass, where sharded parameters are whole.

        Args:
            compute: function of the student's side at the scored positions that returns the loss.
            with_outputs: also compute the model's logits, and return its output.

        Returns:
            The loss, and the model's output or None.
        """
        if with_outputs:
            outputs = model(**inputs)
            tapped = Tapped(outputs, None, None)
            return compute(tapped.side(scored.rows), tapped), outputs
        return self.student(model, lambda tapped: compute(tapped.side(scored.rows), tapped), **inputs), None


def pair_of(trainer: Any, student: nn.Module, teacher: nn.Module, vocab_size: int | None = None) -> Pair:
    """Return the trainer's pair. It is created at the first call, and again if the trainer's models change."""
    pair = vars(trainer).get("_kdkernels_pair")
    if not isinstance(pair, Pair) or pair.student.base is not unwrap(student) or pair.teacher.base is not unwrap(teacher):
        pair = trainer._kdkernels_pair = Pair(student, teacher, vocab_size)
    return pair


def token_loss(
    student: Side, teacher: Side, options: Options, labels: Tensor | None = None, num_items: int | Tensor | None = None
) -> Tensor:
    """Return the mean loss over ``num_items``, by default the number of scored tokens; 0 without tokens."""
    if options.kd_weight == 0:
        assert labels is not None
        return options.ce_weight * cross_entropy(student, labels, num_items=num_items, memory_budget=options.memory_budget)
    return distillation_loss(
        student,
        teacher,
        divergence=options.divergence,
        temperature=options.temperature,
        t_squared=options.t_squared,
        labels=labels if options.ce_weight else None,
        kd_weight=options.kd_weight,
        ce_weight=options.ce_weight,
        num_items=num_items,
        memory_budget=options.memory_budget,
    )
