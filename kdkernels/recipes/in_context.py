"""Distil in-context learning: the student learns the teacher's outputs with demonstrations, with or without reading them itself.

Context distillation (Askell et al. 2021, https://arxiv.org/abs/2112.00861; Snell et al. 2022, https://arxiv.org/abs/2209.15189): the
teacher reads k demonstrations and the question, the student the question alone,

    L = D(p(y | demonstrations, x), q(y | x))

with any divergence D of the package.

In-context learning distillation (Huang et al. 2022, https://arxiv.org/abs/2212.10670): both read the demonstrations, so the student learns
to use them, by the teacher's soft labels, the hard label, and language modelling, the last to keep the knowledge of the task:

    L = KL(p(y | C, x), q(y | C, x)) + a(t) * CE(y | C, x) + L_lm

``a`` falls during training, from ``ce_weight`` to ``ce_weight_last`` of the trainer; the paper does not say how, here linearly. The rows of
L_lm are trained like the others: soft labels with their weight, hard labels with their weight times ``a``. Left out: training over many
tasks with held-out tasks (Meta-ICT): give rows of many tasks, each with its ``task``, and demonstrations are drawn within it.
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
    """Draw ``k`` demonstrations for each item from ``pool`` (default: the items), within the item's task. They depend only on the seed.

    Items with the same question are not used as demonstrations.

    Raises:
        RecipeError: a task has too few other questions, or a demonstration has no response.
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
    """Return rows in which only the teacher's prompt has the demonstrations before the question.

    They are in ``teacher_messages``; without chat in ``demonstrations``, which the trainer writes before the prompt.

    Raises:
        RecipeError: an item has no response: use the data's, or the teacher's (``answered``).
    """
    rows = []
    for item, demos in zip(items, shown, strict=True):
        view: Row = {"teacher_messages": [dict(m) for m in with_demonstrations(item, demos)]}
        if not chat:
            view = {"demonstrations": [{"prompt": d.prompt, "response": _response(d)} for d in demos]}
        rows.append(student_row(item, _response(item), chat=chat, task=item.task, **view))
    return rows


def in_context_tuning(items: Sequence[Item], shown: Sequence[Sequence[Item]], *, chat: bool = True) -> list[Row]:
    """Return rows in which both prompts have the demonstrations. The response is scored."""
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
    """Return the rows of the LM term: question and response as plain text, of which every token is learnt with ``weight``."""
    return [{"key": f"{i.key}/lm", "text": f"{i.prompt}\n{_response(i)}", "weight": weight} for i in items]


def answered(
    items: Sequence[Item], shown: Sequence[Sequence[Item]], teacher: TextModel, log: Path, sampling: Sampling
) -> tuple[list[Item], list[list[Item]], Tally]:
    """Return the items with the teacher's replies, given the demonstrations, as responses, for questions without one or black-box teachers.

    Items whose reply is empty or cut off are dropped, with their demonstrations.
    """
    tally = Tally(rows=len(items))
    answered_items: list[Item] = []
    demonstrations_of: list[list[Item]] = []
    prompts = [(item.key, with_demonstrations(item, demos)) for item, demos in zip(items, shown, strict=True)]
    for item, demos, replies in zip(items, shown, ask(teacher, log, prompts, sampling), strict=True):
        tally.candidates += 1
        text = replies[0].text.strip()
        if reason := cut_short(replies[0]):
            tally.drop(reason)
        elif not text:
            tally.drop("empty")
        else:
            answered_items.append(Item(item.key, item.messages, text, item.row, item.where))
            demonstrations_of.append(list(demos))
    tally.kept = len(answered_items)
    return answered_items, demonstrations_of, tally


def with_demonstrations(item: Item, demos: Sequence[Item]) -> tuple[Message, ...]:
    """Return the item's conversation with each demonstration's question and answer as turns before the last one."""
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
