"""The interface between the trainer and a teacher: a live model, a cache, or several models."""

from __future__ import annotations

from typing import Protocol

from ..data.collator import View
from ..sides import Teacher

__all__ = ["TeacherSource"]


class TeacherSource(Protocol):
    """Targets for the scored positions of a view."""

    vocab_size: int
    """Real size of the vocabulary that the targets are over."""

    def targets(self, view: View) -> Teacher:
        """Return the teacher's side, leading shape ``[n]`` in the order of ``view.scored``, without gradient.

        Raises:
            KeyError: the source has no targets for an example.
        """
        ...
