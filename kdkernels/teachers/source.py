"""What the trainer asks of a teacher, wherever it is: a live model, a cache, a list of models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..sides import Teacher

__all__ = ["TeacherSource", "View"]


@dataclass(frozen=True, eq=False)
class View:
    """A batch as one of the two models sees it. Both views score the same tokens in the same order.

    Rows may be packed: ``position_ids`` then start anew with each example.
    """

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor | None  # [B, L], 1 for a token; None where rows are packed without padding
    position_ids: Tensor | None  # [B, L], given where rows are packed
    scored: Tensor  # [n] int64: positions in the flattened [B * L] whose next token is scored
    keys: tuple[str, ...] = ()
    """Of each example, in order of ``scored``: what a cache finds it by."""
    counts: tuple[int, ...] = ()
    """Of each example, how many of ``scored`` are its own; they add up to n."""


class TeacherSource(Protocol):
    """Targets for the scored positions of a view."""

    vocab_size: int
    """Real size of the vocabulary that the targets are over."""

    def targets(self, view: View) -> Teacher:
        """The teacher's side, leading shape ``[n]`` in the order of ``view.scored``; no gradient.

        Raises:
            KeyError: an example that the source does not hold.
        """
        ...
