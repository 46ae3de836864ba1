"""One training example, tokenised: the student's view and the teacher's view of the same response."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Example"]


@dataclass(frozen=True)
class Example:
    """Token ids of both views and the positions that are scored in each.

    Position t scores token t + 1. Both views score the same tokens in the same order:
    ``student_ids[t + 1] == teacher_ids[u + 1]`` for each pair ``(t, u)`` of ``student_scored`` and ``teacher_scored``.

    Raises:
        ValueError: views that score different tokens, or a position that has no next token.
    """

    student_ids: Sequence[int]
    student_scored: Sequence[int]
    teacher_ids: Sequence[int]
    teacher_scored: Sequence[int]
    weight: float = 1.0
    task: str | None = None
    """Rows of one task share a denominator where a recipe asks for that."""
    where: str = field(default="", compare=False)
    """The row that it was made from, such as ``train.jsonl, row 3``; for errors."""
    date: str | None = field(default=None, compare=False)
    """The date that the chat template could write into it, such as ``2026-11-28``; None for a template without a date."""

    def __post_init__(self) -> None:
        if len(self.student_scored) != len(self.teacher_scored):
            raise ValueError(
                f"the student's view scores {len(self.student_scored)} tokens, the teacher's {len(self.teacher_scored)}: the response must "
                "be the same token ids in both"
            )
        for t, u in zip(self.student_scored, self.teacher_scored, strict=True):
            if not 0 <= t < len(self.student_ids) - 1 or not 0 <= u < len(self.teacher_ids) - 1:
                raise ValueError(f"positions {t} (student) and {u} (teacher) cannot be scored: there is no next token")
            if self.student_ids[t + 1] != self.teacher_ids[u + 1]:
                raise ValueError(
                    f"position {t} of the student's view scores token {self.student_ids[t + 1]}, position {u} of the teacher's "
                    f"token {self.teacher_ids[u + 1]}: the response must be the same token ids in both views"
                )

    def __len__(self) -> int:
        """Tokens of the longer view."""
        return max(len(self.student_ids), len(self.teacher_ids))

    def key(self, salt: str = "") -> str:
        """sha256 of both views and ``salt`` (a cache's manifest hash): the same wherever and whenever the example turns up."""
        digest = hashlib.sha256(salt.encode())
        for part in (self.student_ids, self.student_scored, self.teacher_ids, self.teacher_scored):
            digest.update(struct.pack(f"<q{len(part)}q", len(part), *part))
        return digest.hexdigest()
