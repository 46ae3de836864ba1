"""One training example, tokenised: the student's view and the teacher's view of the same response."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Example"]


@dataclass(frozen=True)
class Example:
    """Token ids of both views, and the scored positions in each.

    Position t scores token t + 1. Both views score the same tokens in the same order:
    ``student_ids[t + 1] == teacher_ids[u + 1]`` for each pair ``(t, u)`` of ``student_scored`` and ``teacher_scored``.

    Raises:
        ValueError: the views score different tokens, or a scored position has no next token.
    """

    student_ids: Sequence[int]
    student_scored: Sequence[int]
    teacher_ids: Sequence[int]
    teacher_scored: Sequence[int]
    weight: float = 1.0
    task: str | None = None
    """Task of the row. Recipes can use one denominator per task."""
    where: str = field(default="", compare=False)
    """Source row for error messages, such as ``train.jsonl, row 3``."""
    turns: tuple[tuple[int, float], ...] = ()
    """Scored tokens and weight of each learnt turn, in order. Empty means one turn of weight 1. Not part of the key."""
    unlearnt: tuple[range, ...] = ()
    """Positions of the student's view that are never scored: turns of weight 0."""
    date: str | None = field(default=None, compare=False)
    """Date for the chat template, such as ``2026-11-28``; None for a template without a date."""

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

    @property
    def parts(self) -> tuple[tuple[int, float], ...]:
        """Scored tokens and weight of each learnt turn."""
        return self.turns or ((len(self.student_scored), 1.0),)

    def prompts(self) -> tuple[int, int]:
        """Tokens before the last learnt turn, in the student's and the teacher's view."""
        first = len(self.student_scored) - self.parts[-1][0]
        return self.student_scored[first] + 1, self.teacher_scored[first] + 1

    def cut_to(self, length: int) -> Example | None:
        """Return the example with its longer view cut to ``length`` tokens and the other by as many; None if no scored token remains."""
        cut = len(self) - length
        student, teacher = self.student_ids[: len(self.student_ids) - cut], self.teacher_ids[: len(self.teacher_ids) - cut]
        count = sum(t < len(student) - 1 for t in self.student_scored)
        if not count:
            return None
        turns, remaining = [], count
        for size, weight in self.turns:
            turns.append((min(size, remaining), weight))
            remaining -= turns[-1][0]
        return dataclasses.replace(
            self, student_ids=student, student_scored=self.student_scored[:count], teacher_ids=teacher,
            teacher_scored=self.teacher_scored[:count], turns=tuple(turn for turn in turns if turn[0]),
        )  # fmt: skip

    def blocks(self, length: int) -> list[Example]:
        """Split the example of one text into blocks of at most ``length`` tokens.

        Each block begins with the last token of the previous one, so that every token except the first is scored once.
        """
        ids = self.student_ids
        blocks = [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]
        scored = [range(len(block) - 1) for block in blocks]
        return [
            dataclasses.replace(self, student_ids=block, student_scored=every, teacher_ids=block, teacher_scored=every)
            for block, every in zip(blocks, scored, strict=True)
        ]

    def __len__(self) -> int:
        """Return the number of tokens of the longer view."""
        return max(len(self.student_ids), len(self.teacher_ids))

    def key(self, salt: str = "") -> str:
        """Return the sha256 of both views and ``salt`` (a cache's manifest hash). It does not depend on the example's position."""
        digest = hashlib.sha256(salt.encode())
        for part in (self.student_ids, self.student_scored, self.teacher_ids, self.teacher_scored):
            digest.update(struct.pack(f"<q{len(part)}q", len(part), *part))
        return digest.hexdigest()
