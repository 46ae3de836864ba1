"""Sequence-level distillation: the student learns the teacher's text.

Kim and Rush 2016 (https://arxiv.org/abs/1606.07947): the sum over all sequences in ``-sum_y p(y|x) log q(y|x)`` is replaced by its mode,
which is cross-entropy on the teacher's output ``y^``:

    L = -log q(y^ | x)

Their interpolation uses the teacher output, among several, that is closest to the reference. Left out: beam search over the API (greedy or
sampled replies instead), and BLEU as the closeness (ROUGE-L instead).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..teachers.text import TextModel
from .near import rouge_l
from .rows import Item, RecipeError, Row, Sampling, Tally, ask, cut_short, student_row

__all__ = ["sequence_level"]


def sequence_level(
    items: Sequence[Item], teacher: TextModel, log: Path, sampling: Sampling | None = None, *, closest: bool = False, chat: bool = True
) -> tuple[list[Row], Tally]:
    """Return rows with the teacher's text as response: every distinct sample, or with ``closest`` the one closest to the row's response.

    Empty replies and those cut off at ``max_tokens`` are dropped, because the student would learn to stop in mid-sentence.

    Raises:
        RecipeError: ``closest``, but a row has no response.
    """
    sampling = sampling or Sampling()
    if closest and (lacking := next((i for i in items if i.response is None), None)):
        raise RecipeError(f"{lacking.where}: the closest sample needs the row's own response, and it has none")
    tally, rows = Tally(rows=len(items)), []
    for item, replies in zip(items, ask(teacher, log, [(i.key, i.messages) for i in items], sampling), strict=True):
        texts: list[str] = []
        thoughts: dict[str, str | None] = {}
        for reply in replies:
            tally.candidates += 1
            text = reply.text.strip()
            if reason := cut_short(reply):
                tally.drop(reason)
            elif not text:
                tally.drop("empty")
            elif text in texts:
                tally.drop("the same text again")
            else:
                texts.append(text)
                thoughts[text] = reply.reasoning or None
        if closest and texts:
            for _ in texts[1:]:
                tally.drop("not the closest to the reference")
            texts = [max(texts, key=lambda t: rouge_l(t, item.response or ""))]
        rows += [
            student_row(item, text, suffix=f"/{n}" if n else "", chat=chat, task=item.task, reasoning=thoughts[text])
            for n, text in enumerate(texts)
        ]
    tally.kept = len(rows)
    return rows, tally
