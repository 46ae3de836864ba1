"""Distil in-context learning: the student learns, with or without demonstrations, what the teacher does with them.

Context distillation (Askell et al. 2021, https://arxiv.org/abs/2112.00861; Snell et al. 2022, https://arxiv.org/abs/2209.15189): the
teacher reads k demonstrations and the question, the student the question alone,

    L = D(p(y | demonstrations, x), q(y | x))

with any divergence D of the package.

In-context learning distillation (Huang et al. 2022, https://arxiv.org/abs/2212.10670): both read the demonstrations, so the student learns
to use them, by the teacher's soft labels, the hard label, and language modelling, the last to keep the knowledge of the task:

    L = KL(p(y | C, x), q(y | C, x)) + a(t) * CE(y | C, x) + L_lm

``a`` falls while training (``ce_weight`` to ``ce_weight_last`` of the trainer); that it falls on a line is our choice. The rows of L_lm are
trained as the others are: the soft labels at their weight, the hard ones at their weight times ``a``. Left out: training over many tasks
with held-out tasks (Meta-ICT): give rows of many tasks, each with its ``task``, and demonstrations are drawn within it.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..teachers.text import TextModel
from .rows import Item, Message, RecipeError, Row, Sampling, Tally, ask, cut_short, student_row

__all__ = ["answered", "context_distillation", "demonstrations", "in_context_tuning", "language_modelling"]


def demonstrations(items: Sequence[Item], k: int, seed: int, pool: Sequence[Item] | None = None) -> list[list[Item]]:
    """``k`` demonstrations for each item, drawn from ``pool`` (default: the items) within the item's task; the same for the same seed.

    An item is never its own demonstration, nor is any with the same question.

    Raises:
        RecipeError: a task with too few other questions, or a demonstration without a response.
    """
    by_task: defaultdict[str | None, dict[str, Item]] = defaultdict(dict)
    for other in items if pool is None else pool:
        if other.response is None:
            raise RecipeError(f"{other.where}: a demonstration needs a response")
        by_task[other.task].setdefault(_question(other), other)
    names = {task: list(candidates) for task, candidates in by_task.items()}
    drawn = []
    for item in items:
        candidates = by_task.get(item.task, {})
        question = _question(item)
        others = len(candidates) - (question in candidates)
        if others < k:
            named = f"task {item.task!r} has" if item.task is not None else "there are"
            raise RecipeError(f"{item.where}: {named} {others} rows with another question, and {k} demonstrations were asked for")
        # One more than needed, so that the item itself can be left out without a copy of the pool for every row.
        picks = random.Random(f"{seed}/{item.key}").sample(names.get(item.task, []), min(k + 1, len(candidates)))
        drawn.append([candidates[name] for name in picks if name != question][:k])
    return drawn


def context_distillation(items: Sequence[Item], shown: Sequence[Sequence[Item]], *, chat: bool = True) -> list[Row]:
    """Rows whose teacher view has the demonstrations before the question, and whose student view has not.

    As ``teacher_messages``; without chat as ``demonstrations``, which the trainer writes before the prompt.

    Raises:
        RecipeError: an item without a response: take the gold ones, or the teacher's (``answered``).
    """
    rows = []
    for item, demos in zip(items, shown, strict=True):
        view: Row = {"teacher_messages": [dict(m) for m in with_demonstrations(item, demos)]}
        if not chat:
            view = {"demonstrations": [{"prompt": d.prompt, "response": _response(d)} for d in demos]}
        rows.append(student_row(item, _response(item), chat=chat, task=item.task, **view))
    return rows


def in_context_tuning(items: Sequence[Item], shown: Sequence[Sequence[Item]], *, chat: bool = True) -> list[Row]:
    """Rows in which both views have the demonstrations; the response is what is scored."""
    rows = []
    for item, demos in zip(items, shown, strict=True):
        row = student_row(item, _response(item), chat=chat, task=item.task)
        if chat:
            row["messages"] = [dict(m) for m in with_demonstrations(item, demos)]
        else:
            row["prompt"] = "".join(f"{d.prompt}{_response(d)}\n\n" for d in demos) + item.prompt
        rows.append(row)
    return rows


def language_modelling(items: Sequence[Item], weight: float) -> list[Row]:
    """Rows of plain text, question and response, every token of which is learnt with ``weight``: the LM term."""
    return [{"key": f"{i.key}/lm", "text": f"{i.prompt}\n{_response(i)}", "weight": weight} for i in items]


def answered(
    items: Sequence[Item], shown: Sequence[Sequence[Item]], teacher: TextModel, log: Path, sampling: Sampling
) -> tuple[list[Item], list[list[Item]], Tally]:
    """The items with the teacher's own replies (given the demonstrations) for responses: for questions that have none, or for black-box
    teachers.

    Items whose reply is empty or cut off are dropped, with their demonstrations.
    """
    tally = Tally(rows=len(items))
    kept: list[Item] = []
    kept_shown: list[list[Item]] = []
    prompts = [(item.key, with_demonstrations(item, demos)) for item, demos in zip(items, shown, strict=True)]
    for item, demos, replies in zip(items, shown, ask(teacher, log, prompts, sampling), strict=True):
        tally.candidates += 1
        text = replies[0].text.strip()
        if reason := cut_short(replies[0]):
            tally.drop(reason)
        elif not text:
            tally.drop("empty")
        else:
            kept.append(Item(item.key, item.messages, text, item.row, item.where))
            kept_shown.append(list(demos))
    tally.kept = len(kept)
    return kept, kept_shown, tally


def with_demonstrations(item: Item, demos: Sequence[Item]) -> tuple[Message, ...]:
    """The item's conversation with question and answer of each demonstration as turns before its last."""
    turns: list[Message] = []
    for demo in demos:
        turns += [{"role": "user", "content": demo.prompt}, {"role": "assistant", "content": _response(demo)}]
    return (*item.messages[:-1], *turns, item.messages[-1])


def _question(item: Item) -> str:
    return item.prompt.strip()


def _response(item: Item) -> str:
    if item.response is None:
        raise RecipeError(f"{item.where}: a response is needed: the row's own, or ask the teacher for it")
    return item.response
