"""Socratic chain of thought: one student asks the sub-questions, another answers them.

Shridhar et al. 2022 (https://arxiv.org/abs/2212.00193): the teacher splits the solution of a problem P into sub-questions and sub-answers
(q_1, a_1), ..., (q_n, a_n). Two students learn

    questioner: L = -log q(q_1 ... q_n | P)
    solver:     L = -sum_j log q(a_j | P, q_1, a_1, ..., q_(j-1), a_(j-1), q_j)

A decomposition is kept if its last sub-answer is the row's answer. Left out: guiding the questioner by the equations of the solution, and
its reinforcement learning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..teachers.text import TextModel
from . import answers
from .rows import Item, Row, Sampling, Tally, ask, cut_short, extended, student_row

__all__ = ["Decomposition", "decompose", "parse", "questioner_rows", "solve", "solver_rows"]

INSTRUCTION = "Split this into smaller questions and answer each, as lines 'Q: ...' and 'A: ...'. The last answer is the result."
ASK_FOR_QUESTIONS = "Which smaller questions lead to the answer?"

_LINE = re.compile(r"\s*(?:\d+[.)]\s*)?([QA])\s*\d*\s*[:.]\s*(.*\S)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Decomposition:
    """Sub-questions and their answers, in order."""

    item: Item
    steps: tuple[tuple[str, str], ...]


def parse(text: str) -> tuple[tuple[str, str], ...] | None:
    """Return pairs of "Q: ..." and "A: ..." lines; None unless they alternate, from Q to A. Other lines are ignored."""
    lines = [match.groups() for line in text.splitlines() if (match := _LINE.fullmatch(line))]
    pairs = list(zip(lines[::2], lines[1::2], strict=False))
    if not lines or len(lines) % 2 or any((k.upper(), m.upper()) != ("Q", "A") for (k, _), (m, _) in pairs):
        return None
    return tuple((question, answer) for (_, question), (_, answer) in pairs)


def decompose(
    items: Sequence[Item], teacher: TextModel, log: Path, sampling: Sampling, *, kind: answers.Kind, instruction: str = INSTRUCTION
) -> tuple[list[Decomposition], Tally]:
    """Return the first of ``sampling.samples`` decompositions of each item whose last sub-answer is the item's answer.

    Raises:
        RecipeError: a row's answer is not of this ``kind``.
    """
    answers.check(items, kind)
    prompts = [(i.key, extended(i.messages, f"{i.prompt}\n{instruction}")) for i in items]
    tally, decompositions = Tally(rows=len(items)), []
    for item, replies in zip(items, ask(teacher, log, prompts, sampling), strict=True):
        decomposition: tuple[tuple[str, str], ...] | None = None
        right = answers.normalise(item.response or "", kind)
        for reply in replies:
            tally.candidates += 1
            steps = parse(reply.text)
            if reason := cut_short(reply):
                tally.drop(reason)
            elif steps is None:
                tally.drop("no alternating questions and answers")
            elif answers.normalise(steps[-1][1], kind) != right:
                tally.drop("wrong final answer")
            elif decomposition is not None:
                tally.drop("not the first right one")
            else:
                decomposition = steps
        if decomposition is not None:
            decompositions.append(Decomposition(item, decomposition))
    tally.kept = len(decompositions)
    return decompositions, tally


def questioner_rows(decompositions: Sequence[Decomposition], *, chat: bool = True) -> list[Row]:
    """Return rows for the student that asks: the problem, then all sub-questions, one per line."""
    return [
        student_row(d.item, "\n".join(q for q, _ in d.steps), prompt=question_prompt(d.item.prompt), chat=chat, task="question")
        for d in decompositions
    ]  # fmt: skip


def solver_rows(decompositions: Sequence[Decomposition], *, chat: bool = True) -> list[Row]:
    """Return rows for the student that answers: the problem, the steps so far and one sub-question, then its answer."""
    return [
        student_row(d.item, answer, prompt=solver_prompt(d.item.prompt, d.steps[:j], question), suffix=f"/{j}", chat=chat, task="solve")
        for d in decompositions
        for j, (question, answer) in enumerate(d.steps)
    ]


def question_prompt(problem: str) -> str:
    return f"{problem}\n{ASK_FOR_QUESTIONS}"


def solver_prompt(problem: str, steps: Sequence[tuple[str, str]], question: str) -> str:
    return "\n".join([problem, *(line for q, a in steps for line in (f"Q: {q}", f"A: {a}")), f"Q: {question}", "A:"])


def solve(
    items: Sequence[Item], questioner: TextModel, solver: TextModel, folder: Path, sampling: Sampling
) -> list[tuple[tuple[str, str], ...]]:
    """Run both students: return each item's sub-questions and the solver's answers, step by step. Logs are in ``folder``."""
    asking = ask(
        questioner, folder / "questions.jsonl", [(i.key, extended(i.messages, question_prompt(i.prompt))) for i in items], sampling
    )
    questions = [[line.strip() for line in replies[0].text.splitlines() if line.strip()] for replies in asking]
    steps: list[list[tuple[str, str]]] = [[] for _ in items]
    for j in range(max(map(len, questions), default=0)):
        open_ones = [n for n in range(len(items)) if j < len(questions[n])]
        prompts = [
            (f"{items[n].key}/{j}", extended(items[n].messages, solver_prompt(items[n].prompt, steps[n], questions[n][j])))
            for n in open_ones
        ]
        for n, replies in zip(open_ones, ask(solver, folder / "answers.jsonl", prompts, sampling), strict=True):
            steps[n].append((questions[n][j], replies[0].text.strip()))
    return [tuple(s) for s in steps]
