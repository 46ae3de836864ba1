"""Rows in each of their forms to examples: the student's view, the teacher's view, and the response that both score."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal

from .encoding import TextEncoder, added_ids
from .ending import ended
from .example import Example
from .messages import Turn, is_empty
from .rows import DataError, Row
from .templates import chat_text, opens_thoughts, template_facts

__all__ = ["Reasoning", "RowEncoder", "conversation_field", "first_difference", "render"]

Reasoning = Literal["learn", "drop"]
Ids = list[int]
ANSWERS = ("response", "completion")
TEACHER_FIELDS = ("teacher_messages", "teacher_prompt", "demonstrations")


class RowEncoder:
    """Makes an :class:`Example` of each row. See ``load_examples`` for the forms.

    Args:
        reasoning: ``"learn"`` or ``"drop"`` what a row has of thoughts.
    """

    def __init__(self, tokenizer: Any, reasoning: Reasoning = "learn") -> None:
        self.tokenizer, self.reasoning = tokenizer, reasoning
        self.encode, self.facts, self.eos = TextEncoder(tokenizer), template_facts(tokenizer), tokenizer.eos_token_id
        self.thoughts = Counter[str]()
        """Rows with reasoning, by what became of it: ``template``, ``tags`` or ``dropped``."""

    def __call__(self, row: Row) -> Example:
        """
        Raises:
            DataError: a row that can't be used, or that can be read in two ways.
        """
        _check_one_form(row)
        if conversation_field(row) is not None:
            student, teacher, response = self._chat(row)
        elif "prompt" in row:
            student, teacher, response = self._prompted(row)
        elif "text" in row:
            ids = self._with_eos(self.encode(row.text("text"), begin=True))
            student, teacher, response = ids[:1], ids[:1], ids[1:]
        else:
            raise row.error("prompt", "a row needs 'prompt' and 'response', 'messages', or 'text' (see --columns for other names)")
        if not response:
            raise row.error("text" if "text" in row else "response", "it holds no token to score")
        if not student or not teacher:
            raise row.error(
                "prompt", "it holds no token: the first token of a response needs one before it (a tokenizer with a BOS token adds one)"
            )
        return Example(
            array("i", student + response), range(len(student) - 1, len(student) + len(response) - 1),
            array("i", teacher + response), range(len(teacher) - 1, len(teacher) + len(response) - 1),
            row.number("weight", 1.0), row.text("task") if "task" in row else None,
            where=row.where, date=None if row.date is None else row.date.isoformat(),
        )  # fmt: skip

    def _with_eos(self, ids: Ids) -> Ids:
        return ids if self.eos is None or (ids and ids[-1] == self.eos) else [*ids, self.eos]

    # A prompt and a response of text

    def _prompted(self, row: Row) -> tuple[Ids, Ids, Ids]:
        prompt, answer = row.text("prompt"), _spoken(row, next((name for name in ANSWERS if name in row), ANSWERS[0]))
        student, response = self.encode.continued(prompt, self._with_thoughts(prompt, answer, _thoughts(row)), begin=True)
        response = response if _cut_short(row) else self._with_eos(response)
        teacher = student
        if "teacher_messages" in row:
            teacher = self.encode(render(self.tokenizer, self._shown_to_teacher(row, []), row, "teacher_messages"), begin=False)
        elif "teacher_prompt" in row or "demonstrations" in row:
            asked = row.text("teacher_prompt") if "teacher_prompt" in row else prompt
            shown = [*("".join(demo) + "\n\n" for demo in _demonstrations(row)), asked]
            teacher = self.encode("".join(map(self.encode.without_begin, shown)), begin=True)
        return student, teacher, response

    def _with_thoughts(self, prompt: str, response: str, thoughts: str) -> str:
        """The response with its reasoning in tags before it."""
        if not thoughts:
            return response
        if self.reasoning == "drop":
            self.thoughts["dropped"] += 1
            return response
        self.thoughts["tags"] += 1
        return _tagged(prompt, thoughts) + response

    # Conversations

    def _chat(self, row: Row) -> tuple[Ids, Ids, Ids]:
        name = conversation_field(row)
        assert name is not None
        messages = row.messages(name)
        answer = self._answer(row, messages, name)
        if self.reasoning == "drop":
            self.thoughts["dropped"] += "reasoning_content" in answer
            messages, answer = list(map(_without_thoughts, messages)), _without_thoughts(answer)
        prefix, response = self._split(messages, answer, row, name)
        content = answer.get("content", "").strip()
        cut_short = _cut_short(row)
        told = response[: response.rfind(content) + len(content)] if cut_short and content and content in response else response
        student, ids = self.encode.continued(prefix, told, begin=False)
        ids = ids if told != response else self._ended_turn(ids, without_end=cut_short)
        shown, their_name = self._shown_to_teacher(row, messages), "teacher_messages" if "teacher_messages" in row else name
        if "reasoning_content" in answer:
            self.thoughts["template" if self.facts.reasoning else "tags"] += 1
        if shown is messages:
            return student, student, ids
        their_prefix, their_response = self._split(shown, answer, row, their_name)
        if their_response != response:
            difference = first_difference(self.tokenizer, response, their_response)
            raise row.error(their_name, f"the chat template writes the response differently in the two views: {difference}")
        return student, self.encode(their_prefix, begin=False), ids

    def _answer(self, row: Row, messages: list[Turn], name: str) -> Turn:
        """The assistant's turn that is learnt, taken out of ``messages`` where it is their last."""
        field = next((name for name in ANSWERS if name in row), None)
        if field is not None and isinstance(row.fields[field], list):
            answer, *more = row.messages(field)
            if more or answer["role"] != "assistant":
                count = f"there are {1 + len(more)}, the first of the {answer['role']}"
                raise row.error(field, f"one turn is needed, the assistant's, and {count}")
        elif field is not None:
            answer = {"role": "assistant", "content": _spoken(row, field)}
        elif messages[-1]["role"] == "assistant":
            field, answer = name, messages.pop()
        else:
            raise row.error("response", f"there is none, and {name!r} ends with the turn of the {messages[-1]['role']}, not the assistant")
        answer = self._without_end(answer)
        if is_empty(answer):
            raise row.error(field, "the assistant's turn is empty, so nothing but an end would be learnt: leave the row out")
        thoughts = _thoughts(row)
        if thoughts and answer.get("reasoning_content", thoughts) != thoughts:
            raise row.error("reasoning", f"the assistant's turn in {field!r} has other thoughts: leave one of the two out")
        return {**answer, "reasoning_content": thoughts} if thoughts else answer

    def _without_end(self, answer: Turn) -> Turn:
        """The turn without an end token that its content was given already, since the template writes one."""
        content = answer.get("content", "").rstrip()
        ends = [self.tokenizer.convert_ids_to_tokens(end) for end in (self.facts.end, self.eos) if end is not None]
        end = next((end for end in ends if content.endswith(end)), None)
        return answer if end is None else {**answer, "content": content.removesuffix(end)}

    def _shown_to_teacher(self, row: Row, messages: list[Turn]) -> list[Turn]:
        """What the teacher reads before the response: ``messages``, which the student reads, unless the row says otherwise."""
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

    def _split(self, messages: list[Turn], answer: Turn, row: Row, name: str) -> tuple[str, str]:
        """The text that a model is given, and what it should write: the template with the answer, less the template that asks for it."""
        if not messages:
            raise row.error(name, "there is no turn before the response")
        prefix = render(self.tokenizer, messages, row, name)
        whole = render(self.tokenizer, [*messages, answer], row, name, prompt=False)
        thoughts, opening = answer.get("reasoning_content", ""), opens_thoughts(prefix)
        if whole.startswith(prefix):
            response = whole[len(prefix) :]
            written = not thoughts or (self.facts.reasoning and thoughts.strip() in response)
            return prefix, response if written else _tagged(prefix, thoughts) + response
        if opening is not None and whole.startswith(
            prefix[:opening]
        ):  # the prompt opens thoughts, which the template leaves out of an answer
            return prefix, _tagged(prefix, thoughts) + whole[opening:]
        difference = first_difference(self.tokenizer, prefix, whole)
        raise row.error(name, f"the chat template does not put the response after the generation prompt: {difference}")

    def _ended_turn(self, ids: Ids, without_end: bool) -> Ids:
        """A response up to the token that ends the turn: what templates write after it is not what a model generates."""
        known = next((end for end in (self.facts.end, self.eos) if end is not None and end in ids), None)
        if known is None and self.facts.end is not None:  # this turn may end in another way than most, as calls of built-in tools do
            added = added_ids(self.tokenizer)
            last = next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in added), None)
            known = None if last is None or self.tokenizer.decode(ids[last + 1 :]).strip() else ids[last]
        if known is None:
            return ids if without_end else self._with_eos(ids)
        stop = len(ids) - ids[::-1].index(known)
        return ids[: stop - without_end]


def conversation_field(row: Row) -> str | None:
    """Name of the field that holds the row's conversation; None for a row of plain text."""
    if "messages" in row:
        return "messages"
    return "prompt" if isinstance(row.fields.get("prompt"), list) else None


def _check_one_form(row: Row) -> None:
    """
    Raises:
        DataError: the row can be read in two ways.
    """

    def refuse(name: str, other: str) -> DataError:
        advice = "leave one of the two out, or choose one with --columns"
        return row.error(name, f"the row has {other} too, and can be read in two ways: {advice}")

    answers = [name for name in ANSWERS if name in row]
    if "text" in row:
        if others := [name for name in ("prompt", "messages", *ANSWERS, "reasoning") if name in row]:
            raise refuse(others[0], repr(row.name("text")))
        if given := [name for name in TEACHER_FIELDS if name in row]:
            raise row.error(given[0], "a row of 'text' is one text for both models: give 'prompt' and 'response' instead")
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
    """True if ``prompt`` is the text of one of the user's turns, as in data sets that keep the question in a column of its own."""
    return any(turn["role"] == "user" and turn.get("content") == row.fields["prompt"] for turn in row.messages("messages"))


def _spoken(row: Row, name: str) -> str:
    text = row.text(name)
    if not text.strip():
        raise row.error(name, f"it is empty ({json.dumps(text)[:60]}), so nothing but an end would be learnt: leave the row out")
    return text


def _thoughts(row: Row) -> str:
    """The row's field ``reasoning``; empty where there is none."""
    value = row.fields.get("reasoning", "")
    return row.text("reasoning") if not isinstance(value, str) or value.strip() else ""


def _tagged(prompt: str, thoughts: str) -> str:
    """Thoughts in tags; the first tag is left out where the prompt ends with it."""
    return ("<think>" if opens_thoughts(prompt) is None else "") + thoughts + "</think>"


def _without_thoughts(turn: Turn) -> Turn:
    return {name: part for name, part in turn.items() if name != "reasoning_content"}


def _cut_short(row: Row) -> bool:
    """True if the teacher was stopped in the middle of its response, after which no end may be learnt."""
    return not ended(row.fields.get("finish_reason"))


def _demonstrations(row: Row) -> list[str | tuple[str, str]]:
    """Each demonstration: text as it is, or a question and its answer."""
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


def render(tokenizer: Any, turns: Sequence[Turn], row: Row, name: str, prompt: bool = True) -> str:
    """The conversation as the tokenizer's chat template writes it; with ``prompt`` up to where the assistant's turn begins.

    Raises:
        DataError: of the row's field ``name``: there is no template, or it refuses.
    """
    if tokenizer.chat_template is None:
        raise row.error(name, "the tokenizer has no chat template: set tokenizer.chat_template, or give rows with 'prompt' and 'response'")
    write = partial(chat_text, tokenizer, turns, prompt=prompt, date=row.date, tools=_tools(row))
    try:
        return write()
    except Exception as error:  # a template may raise what it likes
        raise row.error(name, f"the chat template refuses it: {error}") from error


def _tools(row: Row) -> list[Any] | None:
    """A list of tools, or JSON text of one; None for an empty list, which templates tell from there being none."""
    tools = row.sound("tools") if "tools" in row else None
    if isinstance(tools, str):
        with suppress(ValueError):  # text that is not JSON is refused below
            tools = json.loads(tools)
    if not isinstance(tools, list | None):
        raise row.error("tools", "a list of tools is needed, each described as the chat template wants it")
    return tools or None


def first_difference(tokenizer: Any, one: str, other: str, other_tokenizer: Any = None) -> str:
    """In words: the first token in which two texts differ."""
    a, b = (t(text, add_special_tokens=False)["input_ids"] for t, text in ((tokenizer, one), (other_tokenizer or tokenizer, other)))
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    shown = [
        f"{t.decode(ids[at : at + 1])!r} (id {ids[at]})" if at < len(ids) else "the end"
        for t, ids in ((tokenizer, a), (other_tokenizer or tokenizer, b))
    ]
    return f"token {at} is {shown[0]} in one and {shown[1]} in the other"
