"""Chat templates: render conversations for a fixed date, and detect how a template formats the assistant's turns."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from .encoding import added_ids
from .messages import Turn, spellings

__all__ = [
    "TemplateFacts", "chat_text", "date_of", "marked_text", "marks_turns", "opens_thoughts", "template_facts", "writes_date",
]  # fmt: skip

Written = TypeVar("Written")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

_DATED = """\
{%- macro strftime_now(format) -%}
{%- set written = namespace(text=format) -%}
{%- for code, text in kdkernels_date.items() -%}{%- set written.text = written.text.replace(code, text) -%}{%- endfor -%}
{{- written.text -}}
{%- endmacro -%}
"""
"""Prefix for templates. It replaces transformers' ``strftime_now``, which reads the clock."""
_CODES = "aAbBcdDeFfGhHIjmMpRSTuUVwWxXyYzZ"


def writes_date(tokenizer: Any) -> bool:
    """Return True if the chat template writes the date (``strftime_now``), like those of Llama 3, gpt-oss and Granite."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def date_of(tokenizer: Any, date: str | datetime.date | None = None) -> datetime.date | None:
    """Return the date for the tokenizer's chat template: ``date`` or today. None for a template without a date.

    Raises:
        ValueError: ``date`` is not a date such as 2026-11-28.
    """
    if not writes_date(tokenizer):
        return None
    if isinstance(date, str):
        try:
            return datetime.date.fromisoformat(date)
        except ValueError:
            raise ValueError(f"date {date!r}: give year, month and day, such as 2026-11-28") from None
    return date or datetime.date.today()


@dataclass(frozen=True)
class TemplateFacts:
    """Properties of a chat template's assistant turns, measured on a conversation of two turns."""

    end: int | None = None
    """Id of the first special or added token after the content, which ends the turn. None if the template does not write one."""
    parts: bool = False
    """True if contents must be lists of parts."""
    reasoning: bool = False
    """True if the template writes ``reasoning_content``."""


ASKED, ANSWERED, THOUGHT = "kdkernels asks", "kdkernels answers", "kdkernels thinks"
_MEASURED: WeakKeyDictionary[Any, tuple[Any, TemplateFacts]] = WeakKeyDictionary()


def template_facts(tokenizer: Any) -> TemplateFacts:
    """Return the properties of the tokenizer's chat template. They are measured again if the template or the tokens change."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return TemplateFacts()
    state = str(template), len(tokenizer)
    cached = _MEASURED.get(tokenizer)
    if cached is None or cached[0] != state:
        cached = _MEASURED[tokenizer] = state, _measured(tokenizer)
    return cached[1]


def _measured(tokenizer: Any) -> TemplateFacts:
    question, answer = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}

    def written(parts: bool, **more: str) -> str:
        turns = next(spellings([question, {**answer, **more}], parts))
        try:
            return _rendered(tokenizer, turns, prompt=False, date=None)
        except Exception:  # templates can raise any exception; its properties are then unknown
            return ""

    def whole(text: str) -> bool:
        return ASKED in text and ANSWERED in text

    parts = not whole(written(False)) and whole(written(True))
    _, answer_text, tail = written(parts).rpartition(ANSWERED)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if answer_text else []
    ends = added_ids(tokenizer)
    return TemplateFacts(
        end=next((id for id in ids if id in ends), None), parts=parts, reasoning=THOUGHT in written(parts, reasoning_content=THOUGHT)
    )


def opens_thoughts(prompt: str) -> int | None:
    """Return the position of a ``<think>`` at the end of a prompt, which some templates write; else None."""
    match = re.search(r"<think>\s*\Z", prompt)
    return None if match is None else match.start()


def chat_text(tokenizer: Any, turns: Sequence[Turn], *, prompt: bool = True, date: datetime.date | None = None, **fields: Any) -> str:
    """Render a conversation with the tokenizer's chat template, for midnight of ``date`` (default: today).

    Args:
        prompt: add the generation prompt, which starts the assistant's turn.
        fields: further variables of the template, such as ``tools``.
    """
    return _spelled(tokenizer, turns, lambda spelled: _rendered(tokenizer, spelled, prompt, date, **fields))


def marks_turns(tokenizer: Any, tools: Any = None) -> bool:
    """Return True if the chat template marks the assistant's turns with ``{% generation %}``."""
    return _MARK.search(str(tokenizer.get_chat_template(tools=tools))) is not None


def marked_text(
    tokenizer: Any, turns: Sequence[Turn], *, date: datetime.date | None = None, tools: Any = None
) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation, and return the start and end (exclusive) of each block marked with ``{% generation %}``."""

    from transformers.utils.chat_template_utils import render_jinja_template

    def write(spelled: list[Turn]) -> tuple[str, list[tuple[int, int]]]:
        written, marks = render_jinja_template(
            [spelled], tools=tools, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map,
            **{"chat_template": tokenizer.get_chat_template(tools=tools), **_dated(tokenizer, date, tools)},
        )  # fmt: skip
        return written[0], marks[0]

    return _spelled(tokenizer, turns, write)


def _spelled(tokenizer: Any, turns: Sequence[Turn], write: Callable[[list[Turn]], Written]) -> Written:
    """Return the result of ``write`` for the first spelling of the turns that the chat template accepts."""
    plain, *others = spellings(turns, template_facts(tokenizer).parts)
    try:
        return write(plain)
    except Exception:  # templates can raise any exception
        for spelled in others:
            with suppress(Exception):  # show the error for the plain spelling
                return write(spelled)
        raise


def _rendered(tokenizer: Any, turns: list[Turn], prompt: bool, date: datetime.date | None, **fields: Any) -> str:
    fields |= _dated(tokenizer, date, fields.get("tools"))
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **fields)
    return text


def _dated(tokenizer: Any, date: datetime.date | None, tools: Any) -> dict[str, Any]:
    """Return template variables that set the date; empty for a template without a date."""
    day = date_of(tokenizer, date)
    if day is None:
        return {}
    return {"chat_template": _DATED + tokenizer.get_chat_template(tools=tools), "kdkernels_date": _written(day)}


def _written(day: datetime.date) -> dict[str, str]:
    """Return the text of each ``strftime`` code for midnight of ``day``, in replacement order."""
    midnight = datetime.datetime.combine(day, datetime.time())
    codes = {f"%{letter}": midnight.strftime(f"%{letter}") for letter in _CODES}
    unpadded = {f"%-{code[1]}": str(int(text)) for code, text in codes.items() if text.isdecimal()}
    return {"%%": "\0", **codes, **unpadded, "\0": "%"}
