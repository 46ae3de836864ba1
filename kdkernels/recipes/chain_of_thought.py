"""Chain of thought: the student learns the teacher's rationales whose final answer is right.

- Rationales: requested by an instruction alone (zero-shot-CoT, Kojima et al. 2022, https://arxiv.org/abs/2205.11916) or after worked
  examples (Wei et al. 2022, https://arxiv.org/abs/2201.11903). Kept if their final answer is the row's.
- Fine-tune-CoT (Ho et al. 2022, https://arxiv.org/abs/2212.10071): several sampled rationales per question ("diverse reasoning"); the
  student learns rationale and answer as one text, ``L = -log q(r, a | x)``.
- Distilling Step-by-Step (Hsieh et al. 2023, https://arxiv.org/abs/2305.02301): two tasks, distinguished by a prefix,
  ``L = L_label + lambda * L_rationale``, so that no rationale is needed at inference.
- MT-CoT (Li et al. 2022, https://arxiv.org/abs/2210.06726): one task answers, the other explains and then answers,
  ``L = (1 - w) * L_answer + w * L_explain``.

Each task's loss is a mean over its own tokens. ``balance`` expresses this as row weights, independent of the rows' lengths and of batches.
 Rationales are filtered by their final answer in all three, as in Fine-tune-CoT. Left out: its answer cleansing by data set; the
prompt files of the papers (the wording here is ours).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..teachers.text import TextModel
from . import answers
from .rows import Item, Message, RecipeError, Row, Sampling, Tally, ask, cut_short, extended, student_row

__all__ = ["Rationale", "balance", "fine_tune_cot", "multi_task", "rationales"]

INSTRUCTION = "Work this out step by step. End with a line 'Answer:' and the result."
PREFIXES = {"label": "[label] ", "rationale": "[rationale] "}


@dataclass(frozen=True)
class Rationale:
    """A rationale whose final answer is the item's."""

    item: Item
    text: str

    @property
    def answer(self) -> str:
        return self.item.response or ""


def rationales(
    items: Sequence[Item],
    teacher: TextModel,
    log: Path,
    sampling: Sampling,
    *,
    kind: answers.Kind,
    instruction: str = INSTRUCTION,
    examples: Sequence[Item] = (),
    most: int | None = None,
) -> tuple[list[Rationale], Tally]:
    """Return distinct rationales that end in the row's answer, at most ``most`` per item. ``examples`` are worked examples with a field
    ``rationale`` and an answer.

    Raises:
        RecipeError: a row's answer is not of this ``kind``, or an example has no rationale.
    """
    answers.check(items, kind)
    if most is not None and most < 1:
        raise RecipeError(f"most {most}: at least one rationale must be kept for each row")
    shown: list[Message] = []
    for example in examples:
        shown += [
            {"role": "user", "content": f"{example.prompt}\n{instruction}"},
            {"role": "assistant", "content": worked(example.text("rationale"), example.response or "")},
        ]
    prompts = []
    for item in items:
        messages = extended(item.messages, f"{item.prompt}\n{instruction}")
        prompts.append((item.key, (*messages[:-1], *shown, messages[-1])))
    tally, right = Tally(rows=len(items)), []
    for item, replies in zip(items, ask(teacher, log, prompts, sampling), strict=True):
        texts: list[str] = []
        for reply in replies:
            tally.candidates += 1
            text, _ = answers.split(reply.text)
            if reason := cut_short(reply):
                tally.drop(reason)
            elif answers.extract(reply.text, kind) is None:
                tally.drop("no final answer")
            elif not answers.same(reply.text, item.response or "", kind):
                tally.drop("wrong final answer")
            elif not text:
                tally.drop("no rationale before the answer")
            elif " ".join(text.split()) in (" ".join(t.split()) for t in texts):
                tally.drop("the same rationale again")
            elif most is not None and len(texts) == most:
                tally.drop(f"more than {most} rationales")
            else:
                texts.append(text)
        right += [Rationale(item, text) for text in texts]
    tally.kept = len(right)
    return right, tally


def worked(rationale: str, answer: str) -> str:
    """Return rationale and answer, the text that a student of Fine-tune-CoT learns."""
    return f"{rationale}\nAnswer: {answer}"


def fine_tune_cot(rationales: Sequence[Rationale], *, chat: bool = True) -> list[Row]:
    """Return one row per rationale: the question, then rationale and answer as one response."""
    return [
        student_row(r.item, worked(r.text, r.answer), suffix=f"/{n}", chat=chat, rationale=r.text)
        for n, r in _numbered(rationales)
    ]  # fmt: skip


def multi_task(
    items: Sequence[Item],
    rationales: Sequence[Rationale],
    *,
    style: Literal["step-by-step", "mt-cot"],
    prefixes: Mapping[str, str] = PREFIXES,
    chat: bool = True,
) -> list[Row]:
    """Return a ``label`` row for each item, even without rationales, and a ``rationale`` row for each rationale: without the answer in
    ``step-by-step``, with it in ``mt-cot``.

    The rows have no weights yet: see ``balance``.
    """
    rows = [
        student_row(item, item.response or "", prompt=prefixes["label"] + item.prompt, suffix="/label", chat=chat, task="label")
        for item in items
    ]
    for n, r in _numbered(rationales):
        text = r.text if style == "step-by-step" else worked(r.text, r.answer)
        prompt = prefixes["rationale"] + r.item.prompt
        rows.append(student_row(r.item, text, prompt=prompt, suffix=f"/rationale/{n}", chat=chat, task="rationale"))
    return rows


def balance(rows: Sequence[Row], task_weights: Mapping[str, float], lengths: Sequence[int]) -> list[Row]:
    """Add weights to rows, so that the token-weighted mean loss of all rows is ``sum_task weight * (mean loss over that task's tokens)``.

    The trainer divides by all N tokens, so a token of a task with N_task tokens gets ``weight * N / N_task``. ``lengths`` are the
    numbers of tokens of the rows' responses.

    Raises:
        RecipeError: a task with a weight has no rows, a task has no weight, or weights are negative or all 0.
    """
    tokens: defaultdict[str, int] = defaultdict(int)
    for row, length in zip(rows, lengths, strict=True):
        tokens[row["task"]] += length
    if set(tokens) != set(task_weights):
        raise RecipeError(f"task weights {dict(task_weights)} are for {sorted(task_weights)}; the rows have the tasks {sorted(tokens)}")
    if any(not 0 <= w < float("inf") for w in task_weights.values()) or not any(task_weights.values()):
        raise RecipeError(f"task weights {dict(task_weights)}: each must be finite and >= 0, and one above 0")
    total = sum(tokens.values())
    return [{**row, "weight": task_weights[row["task"]] * total / tokens[row["task"]]} for row in rows]


def _numbered(found: Sequence[Rationale]) -> list[tuple[int, Rationale]]:
    """Yield each rationale with its number within its item."""
    counts: defaultdict[str, int] = defaultdict(int)
    numbered = []
    for r in found:
        numbered.append((counts[r.item.key], r))
        counts[r.item.key] += 1
    return numbered
