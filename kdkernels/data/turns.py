"""Find the assistant's turns in the text of a chat template: their start, their end, and their weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from .encoding import TextEncoder
from .messages import Turn, is_empty
from .rows import Row
from .templates import chat_text, marked_text, marks_turns, opens_thoughts, template_facts

__all__ = ["Part", "TurnWriter", "first_difference", "render", "tagged"]


@dataclass(frozen=True)
class Part:
    """A part of a conversation's text."""

    text: str
    weight: float | None = None
    """Weight of a turn of the assistant; None for text between turns."""
    ends: bool = False
    """True for a last turn without its end token."""


class TurnWriter:
    """Render conversations with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any, encode: TextEncoder) -> None:
        self.tokenizer, self.encode, self.facts = tokenizer, encode, template_facts(tokenizer)
        ends = [tokenizer.convert_ids_to_tokens(end) for end in (self.facts.end, tokenizer.eos_token_id) if end is not None]
        self.ends: list[str] = list(dict.fromkeys(ends))
        """Texts of the tokens that can end a turn, the template's end token first."""

    def without_end(self, turn: Turn) -> Turn:
        """Return the turn without an end token in its content, because the template adds one."""
        content = turn.get("content", "").rstrip()
        end = next((end for end in self.ends if content.endswith(end)), None)
        return turn if end is None else {**turn, "content": content.removesuffix(end)}

    def split(self, messages: list[Turn], answer: Turn, row: Row, name: str) -> tuple[str, str]:
        """Return prompt and response text: the template without the answer, and the rest of the template with it.

        Raises:
            DataError: about the row's field ``name``: there is no turn before the answer, or the text does not start with the prompt.
        """
        parts = self._split(messages, answer, row, name)
        if isinstance(parts, str):
            raise row.error(name, f"the chat template does not put the response after the generation prompt: {parts}")
        return parts

    def _split(self, messages: list[Turn], answer: Turn, row: Row, name: str) -> tuple[str, str] | str:
        """Like ``split``, but return the first difference if the rendered text does not start with the prompt."""
        if not messages:
            raise row.error(name, "there is no turn before the response")
        prefix = render(self.tokenizer, messages, row, name)
        whole = render(self.tokenizer, [*messages, answer], row, name, prompt=False)
        thoughts, opening = answer.get("reasoning_content", ""), opens_thoughts(prefix)
        if whole.startswith(prefix):
            response = whole[len(prefix) :]
            written = not thoughts or (self.facts.reasoning and thoughts.strip() in response)
            return prefix, response if written else tagged(prefix, thoughts) + response
        # The generation prompt may end with <think> although the template removes thoughts from answers.
        if opening is not None and whole.startswith(prefix[:opening]):
            return prefix, tagged(prefix, thoughts) + whole[opening:]
        return first_difference(self.tokenizer, prefix, whole)

    def up_to_end(self, turn_text: str, turn: Turn, cut_short: bool = False) -> tuple[str, str]:
        """Return the text of a turn and its end token. Models do not generate text that templates write after the end token.

        Args:
            cut_short: the teacher's response was cut, so its end is not learnt.
        """
        content = turn.get("content", "").strip()
        if cut_short and content and content in turn_text:
            return turn_text[: turn_text.rfind(content) + len(content)], ""
        text, end = self._ended(turn_text)
        return text, "" if cut_short else end

    def _ended(self, turn_text: str) -> tuple[str, str]:
        end = next((end for end in self.ends if end in turn_text), None)
        if end is not None:
            return turn_text[: turn_text.rfind(end)], end
        last = self.encode.last_added(turn_text) if self.facts.end is not None else None
        if last is not None and not turn_text[last.end() :].strip():  # an unusual end token, for example after calls of built-in tools
            return turn_text[: last.start()], last[0]
        return turn_text, ""

    # All turns of a conversation

    def every(self, messages: list[Turn], weights: Sequence[float], row: Row, name: str, cut_short: bool) -> list[Part] | str | None:
        """Split a conversation that ends with the assistant into parts, with one part for each turn of the assistant.

        Returns:
            The parts. Or text with the first difference, if the template later formats an earlier turn differently. Or None for a
            single turn of the assistant in a template without marks.

        Raises:
            DataError: a turn is empty, or every turn has weight 0.
        """
        numbers = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
        turns = [self.without_end(turn) if turn["role"] == "assistant" else turn for turn in messages]
        marked = marks_turns(self.tokenizer, _tools(row)) if self.tokenizer.chat_template is not None else False
        if len(numbers) == 1 and not marked:
            return None
        if not any(weights[number] for number in numbers):
            raise row.error(name, "every turn of the assistant has weight 0, so there is nothing to learn: leave the row out")
        for number in numbers:
            if weights[number] and is_empty(turns[number]):
                raise row.error(
                    f"{name}[{number}]",
                    "the assistant's turn is empty, so nothing but an end would be learnt: leave the row out, or give the message weight 0",
                )
        parts = self._of_marks(turns, numbers, weights, row, name, cut_short) if marked else None
        return self._of_prefixes(turns, numbers, weights, row, name, cut_short) if parts is None else parts

    def _of_prefixes(
        self, turns: list[Turn], numbers: list[int], weights: Sequence[float], row: Row, name: str, cut_short: bool
    ) -> list[Part] | str | None:
        """Take each turn from the generation prompt to its end token. A first message by the assistant is not learnt."""
        numbers = [number for number in numbers if number]
        if len(numbers) < 2:
            return None
        text, parts = "", []
        for number in numbers:
            split = self._split(turns[:number], turns[number], row, name)
            if isinstance(split, str):
                return split
            prefix, response = split
            if not prefix.startswith(text):
                return first_difference(self.tokenizer, text, prefix)
            last = number == numbers[-1]
            turn_text, end = self.up_to_end(response, turns[number], cut_short and last)
            parts += [Part(prefix[len(text) :]), Part(turn_text + end, weights[number], ends=last and not end and not cut_short)]
            text = prefix + turn_text + end
        return parts

    def _of_marks(
        self, turns: list[Turn], numbers: list[int], weights: Sequence[float], row: Row, name: str, cut_short: bool
    ) -> list[Part] | None:
        """Return the marked blocks, each with the end token after it; None if the template removes the thoughts of a turn.

        Raises:
            DataError: messages have weights, but the template does not mark each turn separately.
        """
        text, marks = marked_text(self.tokenizer, turns, date=row.date, tools=_tools(row))
        thoughts = [turns[number].get("reasoning_content", "").strip() for number in numbers]
        if not marks or any(thought not in text for thought in thoughts):
            return None
        if len(marks) == len(numbers):
            of_turns = [weights[number] for number in numbers]
        elif all(weights[number] == 1 for number in numbers):
            of_turns = [1.0] * len(marks)
        else:
            raise row.error(
                name,
                f"the chat template marks {len(marks)} blocks of {len(numbers)} turns of the assistant, so a message's weight can't be "
                "given to its turn: leave the weights out",
            )
        parts, at = [], 0
        for (start, stop), weight in zip(marks, of_turns, strict=True):
            last = stop == marks[-1][1]
            turn_text, end = self.up_to_end(text[start:stop], turns[numbers[-1]] if last else {}, cut_short and last)
            behind = text[stop:].lstrip()
            if not end and not (cut_short and last) and (end := next((end for end in self.ends if behind.startswith(end)), "")):
                turn_text = text[start : len(text) - len(behind)]
            parts += [Part(text[at:start]), Part(turn_text + end, weight, ends=last and not end and not cut_short)]
            at = start + len(turn_text + end)
        return parts


def tagged(prompt: str, thoughts: str) -> str:
    """Return thoughts in tags, without the first tag if the prompt ends with it."""
    return ("<think>" if opens_thoughts(prompt) is None else "") + thoughts + "</think>"


def render(tokenizer: Any, turns: Sequence[Turn], row: Row, name: str, prompt: bool = True) -> str:
    """Render a conversation with the tokenizer's chat template; with ``prompt``, add the generation prompt.

    Raises:
        DataError: about the row's field ``name``: there is no template, or the template raises.
    """
    if tokenizer.chat_template is None:
        raise row.error(name, "the tokenizer has no chat template: set tokenizer.chat_template, or give rows with 'prompt' and 'response'")
    write = partial(chat_text, tokenizer, turns, prompt=prompt, date=row.date, tools=_tools(row))
    try:
        return write()
    except Exception as error:  # templates can raise any exception
        raise row.error(name, f"the chat template refuses it: {error}") from error


def _tools(row: Row) -> list[Any] | None:
    """Return the list of tools, which may be JSON text. None for an empty list, because templates treat it differently from no tools."""
    tools = row.sound("tools") if "tools" in row else None
    if isinstance(tools, str):
        with suppress(ValueError):  # text that is not JSON is refused below
            tools = json.loads(tools)
    if not isinstance(tools, list | None):
        raise row.error("tools", "a list of tools is needed, each described as the chat template wants it")
    return tools or None


def first_difference(tokenizer: Any, one: str, other: str, other_tokenizer: Any = None) -> str:
    """Return a description of the first token in which two texts differ."""
    a, b = (t(text, add_special_tokens=False)["input_ids"] for t, text in ((tokenizer, one), (other_tokenizer or tokenizer, other)))
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    shown = [
        f"{t.decode(ids[at : at + 1])!r} (id {ids[at]})" if at < len(ids) else "the end"
        for t, ids in ((tokenizer, a), (other_tokenizer or tokenizer, b))
    ]
    return f"token {at} is {shown[0]} in one and {shown[1]} in the other"
