"""Make examples from rows: the student's view, the teacher's view, and the positions that both score."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .encoding import TextEncoder
from .ending import ended
from .example import Example
from .messages import Turn, is_empty
from .rows import DataError, Row
from .templates import template_facts
from .turns import TurnWriter, first_difference, render, tagged

__all__ = ["Learn", "Reasoning", "RowEncoder", "Views", "conversation_field"]

Reasoning = Literal["learn", "drop"]
Learn = Literal["all", "last"]
Ids = list[int]
ANSWERS = ("response", "completion")
TEACHER_FIELDS = ("teacher_messages", "teacher_prompt", "demonstrations")


@dataclass(frozen=True)
class Views:
    """Tokens of a row: the prefix of each view, and the parts that follow in both views.

    The weight of a part is > 0 for a learnt turn, 0 for a turn that is not learnt, and None for text between turns.
    """

    student: Ids
    teacher: Ids
    parts: Sequence[tuple[Ids, float | None]]

    def example(self, weight: float, task: str | None, where: str, date: str | None) -> Example:
        """Return the example that scores the learnt parts. Tokens after the last learnt part are dropped."""
        last = max(number for number, (ids, of_turn) in enumerate(self.parts) if ids and of_turn)
        parts = self.parts[: last + 1]
        response = [token for ids, _ in parts for token in ids]
        scored: list[int] = []
        turns, unlearnt, at = [], [], 0
        for ids, of_turn in parts:
            if of_turn:
                scored += range(at, at + len(ids))
                turns.append((len(ids), of_turn))
            elif of_turn is not None and ids:
                unlearnt.append(range(len(self.student) - 1 + at, len(self.student) - 1 + at + len(ids)))
            at += len(ids)
        whole = len(scored) == len(response)

        def view(prompt: Ids) -> tuple[array[int], Sequence[int]]:
            first = len(prompt) - 1
            places = range(first, first + len(response)) if whole else array("i", [first + place for place in scored])
            return array("i", prompt + response), places

        return Example(
            *view(self.student), *view(self.teacher), weight, task, where=where, date=date,
            turns=() if turns == [(len(scored), 1.0)] else tuple(turns), unlearnt=tuple(unlearnt),
        )  # fmt: skip


class RowEncoder:
    """Convert rows to :class:`Example` objects. See ``load_examples`` for the forms.

    Args:
        reasoning: ``"learn"`` or ``"drop"`` the reasoning of a row.
        learn: ``"all"`` turns of the assistant or the ``"last"``; None for all if the chat template allows it.
    """

    def __init__(self, tokenizer: Any, reasoning: Reasoning = "learn", learn: Learn | None = None) -> None:
        self.tokenizer, self.reasoning, self.learn = tokenizer, reasoning, learn
        self.encode, self.facts, self.eos = TextEncoder(tokenizer), template_facts(tokenizer), tokenizer.eos_token_id
        self.turns = TurnWriter(tokenizer, self.encode)
        self.only_last = 0
        """Number of conversations whose last turn alone is learnt, because the chat template formats earlier turns differently."""
        self.thoughts = Counter[str]()
        """Number of rows with reasoning by treatment: ``template``, ``tags`` or ``dropped``."""

    def __call__(self, row: Row) -> Example:
        """Convert one row.

        Raises:
            DataError: the row cannot be used, or its form is ambiguous.
        """
        _check_one_form(row)
        if conversation_field(row) is not None:
            views = self._chat(row)
        elif "prompt" in row:
            views = self._prompted(row)
        elif "text" in row:
            ids = self._with_eos(self.encode(row.text("text"), begin=True))
            views = Views(ids[:1], ids[:1], [(ids[1:], 1.0)])
        else:
            raise row.error("prompt", "a row needs 'prompt' and 'response', 'messages', or 'text' (see --columns for other names)")
        if not any(ids and weight for ids, weight in views.parts):
            raise row.error("text" if "text" in row else "response", "it holds no token to score")
        if not views.student or not views.teacher:
            raise row.error(
                "prompt", "it holds no token: the first token of a response needs one before it (a tokenizer with a BOS token adds one)"
            )
        return views.example(
            row.number("weight", 1.0), row.text("task") if "task" in row else None, row.where,
            None if row.date is None else row.date.isoformat(),
        )  # fmt: skip

    def _with_eos(self, ids: Ids) -> Ids:
        return ids if self.eos is None or (ids and ids[-1] == self.eos) else [*ids, self.eos]

    # A prompt and a response of text

    def _prompted(self, row: Row) -> Views:
        prompt, answer = row.text("prompt"), _spoken(row, next((name for name in ANSWERS if name in row), ANSWERS[0]))
        student, response = self.encode.pieces([prompt, self._with_thoughts(prompt, answer, _thoughts(row))], begin=True)
        response = response if _cut_short(row) else self._with_eos(response)
        teacher = student
        if "teacher_messages" in row:
            teacher = self.encode(render(self.tokenizer, self._shown_to_teacher(row, []), row, "teacher_messages"), begin=False)
        elif "teacher_prompt" in row or "demonstrations" in row:
            teacher_prompt = row.text("teacher_prompt") if "teacher_prompt" in row else prompt
            shown = [*("".join(demo) + "\n\n" for demo in _demonstrations(row)), teacher_prompt]
            teacher = self.encode("".join(map(self.encode.without_begin, shown)), begin=True)
        return Views(student, teacher, [(response, 1.0)])

    def _with_thoughts(self, prompt: str, response: str, thoughts: str) -> str:
        """Return the response, preceded by its reasoning in tags."""
        if not thoughts:
            return response
        if self.reasoning == "drop":
            self.thoughts["dropped"] += 1
            return response
        self.thoughts["tags"] += 1
        return tagged(prompt, thoughts) + response

    # Conversations

    def _chat(self, row: Row) -> Views:
        name = conversation_field(row)
        assert name is not None
        messages, weights = row.messages(name), row.weights(name)
        if self.learn != "last" and _learns_every_turn(row, messages):
            turns = self._all_turns(row, messages, weights, name)
            if turns is not None:
                return turns
        answer, weight = self._answer(row, messages, weights, name)
        if self.reasoning == "drop":
            self.thoughts["dropped"] += "reasoning_content" in answer
            messages, answer = list(map(_without_thoughts, messages)), _without_thoughts(answer)
        return self._last_turn(row, messages, answer, weight, name)

    def _all_turns(self, row: Row, messages: list[Turn], weights: list[float], name: str) -> Views | None:
        """Return the views in which every turn of the assistant is learnt; None for a single turn or an unsuitable template.

        Raises:
            DataError: ``learn="all"``, but the template formats an earlier turn differently from the last.
        """
        messages = [*messages[:-1], _with_thoughts(messages[-1], _thoughts(row), row, name)]
        reasons = any("reasoning_content" in turn for turn in messages if turn["role"] == "assistant")
        if self.reasoning == "drop":
            messages = list(map(_without_thoughts, messages))
        parts = self.turns.every(messages, weights, row, name, cut_short=_cut_short(row))
        if parts is None:
            return None
        if isinstance(parts, str):
            if self.learn == "all":
                raise row.error(
                    name,
                    f"the chat template of {self.tokenizer.name_or_path or 'the tokenizer'} writes an earlier turn of the assistant "
                    f"otherwise than the last: {parts}. Choose --learn last, or a template with {{% generation %}}",
                )
            self.only_last += 1
            return None
        if reasons:
            self.thoughts["dropped" if self.reasoning == "drop" else "template" if self.facts.reasoning else "tags"] += 1
        first, *others = self.encode.pieces([part.text for part in parts], begin=False)
        learnt = [(ids, part.weight) for ids, part in zip(others, parts[1:], strict=True)]
        if parts[-1].ends and self.eos is not None:
            learnt[-1] = self._with_eos(learnt[-1][0]), parts[-1].weight
        return Views(first, first, learnt)

    def _last_turn(self, row: Row, messages: list[Turn], answer: Turn, weight: float, name: str) -> Views:
        """Return the views in which the assistant's ``answer`` to ``messages`` is learnt."""
        cut_short = _cut_short(row)
        prefix, response = self.turns.split(messages, answer, row, name)
        turn_text, end = self.turns.up_to_end(response, answer, cut_short)
        student, ids = self.encode.pieces([prefix, turn_text + end], begin=False)
        ids = ids if end or cut_short else self._with_eos(ids)
        shown, their_name = self._shown_to_teacher(row, messages), "teacher_messages" if "teacher_messages" in row else name
        if "reasoning_content" in answer:
            self.thoughts["template" if self.facts.reasoning else "tags"] += 1
        if shown is messages:
            return Views(student, student, [(ids, weight)])
        their_prefix, their_response = self.turns.split(shown, answer, row, their_name)
        if their_response != response:
            difference = first_difference(self.tokenizer, response, their_response)
            raise row.error(their_name, f"the chat template writes the response differently in the two views: {difference}")
        return Views(student, self.encode(their_prefix, begin=False), [(ids, weight)])

    def _answer(self, row: Row, messages: list[Turn], weights: list[float], name: str) -> tuple[Turn, float]:
        """Return the learnt turn of the assistant and its weight. If it is the last of ``messages``, remove it there."""
        weight = 1.0
        field = next((name for name in ANSWERS if name in row), None)
        if field is not None and isinstance(row.fields[field], list):
            answer, *more = row.messages(field)
            weight = row.weights(field)[0]
            if more or answer["role"] != "assistant":
                count = f"there are {1 + len(more)}, the first of the {answer['role']}"
                raise row.error(field, f"one turn is needed, the assistant's, and {count}")
        elif field is not None:
            answer = {"role": "assistant", "content": _spoken(row, field)}
        elif messages[-1]["role"] == "assistant":
            field, answer, weight = name, messages.pop(), weights[-1]
        else:
            raise row.error("response", f"there is none, and {name!r} ends with the turn of the {messages[-1]['role']}, not the assistant")
        answer = self.turns.without_end(answer)
        if is_empty(answer):
            raise row.error(field, "the assistant's turn is empty, so nothing but an end would be learnt: leave the row out")
        if not weight:
            raise row.error(field, "the only turn to learn has weight 0: leave the row out")
        return _with_thoughts(answer, _thoughts(row), row, field), weight

    def _shown_to_teacher(self, row: Row, messages: list[Turn]) -> list[Turn]:
        """Return the teacher's messages before the response: the student's ``messages``, unless the row has others."""
        if "teacher_messages" in row:
            messages = row.messages("teacher_messages")
            if messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            if not messages:
                raise row.error("teacher_messages", "there is no turn before the response")
            if self.reasoning == "drop":
                messages = list(map(_without_thoughts, messages))
        elif "teacher_prompt" in row:
            messages = [*messages[:-1], {"role": "user", "content": row.text("teacher_prompt")}]
        if "demonstrations" in row:
            messages = [*messages[:-1], *_turns(row), messages[-1]]
        return messages


def conversation_field(row: Row) -> str | None:
    """Return the name of the field with the row's conversation; None for a row of plain text."""
    if "messages" in row:
        return "messages"
    return "prompt" if isinstance(row.fields.get("prompt"), list) else None


def _check_one_form(row: Row) -> None:
    """Check that the row has exactly one form.

    Raises:
        DataError: the form of the row is ambiguous.
    """

    def refuse(name: str, other: str) -> DataError:
        advice = "leave one of the two out, or choose one with --columns"
        return row.error(name, f"the row has {other} too, and can be read in two ways: {advice}")

    answers = [name for name in ANSWERS if name in row]
    if "text" in row:
        if others := [name for name in ("prompt", "messages", *ANSWERS, "reasoning") if name in row]:
            raise refuse(others[0], repr(row.name("text")))
        if fields := [name for name in TEACHER_FIELDS if name in row]:
            raise row.error(fields[0], "a row of 'text' is one text for both models: give 'prompt' and 'response' instead")
    if len(answers) == 2:
        raise refuse(answers[1], repr(row.name(answers[0])))
    if "teacher_messages" in row and "teacher_prompt" in row:
        raise refuse("teacher_prompt", "'teacher_messages'")
    if "messages" in row and "prompt" in row and (answers or not _repeats_a_question(row)):
        raise refuse("prompt", repr(row.name("messages")))
    name = conversation_field(row)
    if name is not None and answers and row.messages(name)[-1]["role"] == "assistant":
        raise refuse(answers[0], f"a last turn of the assistant in {row.name(name)!r}")


def _repeats_a_question(row: Row) -> bool:
    """Return True if ``prompt`` repeats one of the user's turns, as in data sets with a separate question column."""
    return any(turn["role"] == "user" and turn.get("content") == row.fields["prompt"] for turn in row.messages("messages"))


def _spoken(row: Row, name: str) -> str:
    text = row.text(name)
    if not text.strip():
        raise row.error(name, f"it is empty ({json.dumps(text)[:60]}), so nothing but an end would be learnt: leave the row out")
    return text


def _thoughts(row: Row) -> str:
    """Return the row's field ``reasoning``, or empty text."""
    value = row.fields.get("reasoning", "")
    return row.text("reasoning") if not isinstance(value, str) or value.strip() else ""


def _with_thoughts(answer: Turn, thoughts: str, row: Row, field: str) -> Turn:
    """Return the assistant's turn with the row's field ``reasoning`` added."""
    if thoughts and answer.get("reasoning_content", thoughts) != thoughts:
        raise row.error("reasoning", f"the assistant's turn in {field!r} has other thoughts: leave one of the two out")
    return {**answer, "reasoning_content": thoughts} if thoughts else answer


def _learns_every_turn(row: Row, messages: list[Turn]) -> bool:
    """Return True if the row is a conversation that ends with the assistant, without other fields that define the response."""
    beside = any(name in (*ANSWERS, "demonstrations") or name.startswith("teacher_") for name in row.fields)
    return messages[-1]["role"] == "assistant" and not beside


def _without_thoughts(turn: Turn) -> Turn:
    return {name: part for name, part in turn.items() if name != "reasoning_content"}


def _cut_short(row: Row) -> bool:
    """Return True if the teacher's response was cut, so that its end must not be learnt."""
    return not ended(row.fields.get("finish_reason"))


def _demonstrations(row: Row) -> list[str | tuple[str, str]]:
    """Return each demonstration: plain text, or a question and its answer."""
    value = row.sound("demonstrations") if "demonstrations" in row else []
    demonstrations: list[str | tuple[str, str]] = []
    for demo in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        fields = Row(demo, row.where) if isinstance(demo, Mapping) else None
        if fields is None and not isinstance(demo, str):
            raise row.error("demonstrations", "text, or objects with 'prompt' and 'response', are needed")
        demonstrations.append(demo if fields is None else (fields.text("prompt"), fields.text("response")))
    return demonstrations


def _turns(row: Row) -> list[Turn]:
    turns = []
    for demo in _demonstrations(row):
        if isinstance(demo, str):
            raise row.error("demonstrations", "beside chat messages, objects with 'prompt' and 'response' are needed")
        turns += [{"role": "user", "content": demo[0]}, {"role": "assistant", "content": demo[1]}]
    return turns
