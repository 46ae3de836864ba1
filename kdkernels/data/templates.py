"""Chat templates: conversations as text, rendered for a fixed date, and how a template writes an assistant's turn."""

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
"""Put before a template: hides the function of this name that transformers gives to templates, which reads the clock."""
_CODES = "aAbBcdDeFfGhHIjmMpRSTuUVwWxXyYzZ"


def writes_date(tokenizer: Any) -> bool:
    """True if the chat template asks for the date (``strftime_now``), as those of Llama 3, gpt-oss and Granite do."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


def date_of(tokenizer: Any, date: str | datetime.date | None = None) -> datetime.date | None:
    """The date that the tokenizer's chat template writes: ``date`` or today. None for a template without a date.

    Raises:
        ValueError: text that is not a date such as 2026-11-28.
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
    """How a chat template writes the assistant's turn, measured on a conversation of two turns."""

    end: int | None = None
    """Id of the first special or added token after the content: where the turn ends. None if the template writes none."""
    parts: bool = False
    """True if contents must be lists of parts."""
    reasoning: bool = False
    """True if the template writes ``reasoning_content``."""


ASKED, ANSWERED, THOUGHT = "kdkernels asks", "kdkernels answers", "kdkernels thinks"
_MEASURED: WeakKeyDictionary[Any, tuple[Any, TemplateFacts]] = WeakKeyDictionary()


def template_facts(tokenizer: Any) -> TemplateFacts:
    """The facts of the tokenizer's chat template; measured again when the template or the tokens change."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return TemplateFacts()
    state = str(template), len(tokenizer)
    known = _MEASURED.get(tokenizer)
    if known is None or known[0] != state:
        known = _MEASURED[tokenizer] = state, _measured(tokenizer)
    return known[1]


def _measured(tokenizer: Any) -> TemplateFacts:
    asked, answer = {"role": "user", "content": ASKED}, {"role": "assistant", "content": ANSWERED}

    def written(parts: bool, **more: str) -> str:
        turns = next(spellings([asked, {**answer, **more}], parts))
        try:
            return _rendered(tokenizer, turns, prompt=False, date=None)
        except Exception:  # a template may raise what it likes; then nothing is known of it
            return ""

    def whole(text: str) -> bool:
        return ASKED in text and ANSWERED in text

    parts = not whole(written(False)) and whole(written(True))
    _, found, tail = written(parts).rpartition(ANSWERED)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    ends = added_ids(tokenizer)
    return TemplateFacts(
        end=next((id for id in ids if id in ends), None), parts=parts, reasoning=THOUGHT in written(parts, reasoning_content=THOUGHT)
    )


def opens_thoughts(prompt: str) -> int | None:
    """Where the ``<think>`` begins that ends a prompt, as some templates have it; None for a prompt that does not open thoughts."""
    found = re.search(r"<think>\s*\Z", prompt)
    return None if found is None else found.start()


def chat_text(tokenizer: Any, turns: Sequence[Turn], *, prompt: bool = True, date: datetime.date | None = None, **fields: Any) -> str:
    """The conversation as the tokenizer's chat template writes it on ``date`` at midnight (default: today).

    Args:
        prompt: end where the assistant's turn begins.
        fields: further variables of the template, such as ``tools``.
    """
    return _spelled(tokenizer, turns, lambda spelled: _rendered(tokenizer, spelled, prompt, date, **fields))


def marks_turns(tokenizer: Any, tools: Any = None) -> bool:
    """True if the chat template marks the assistant's turns by ``{% generation %}``."""
    return _MARK.search(str(tokenizer.get_chat_template(tools=tools))) is not None


def marked_text(
    tokenizer: Any, turns: Sequence[Turn], *, date: datetime.date | None = None, tools: Any = None
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as the chat template writes it, and the first and last character (exclusive) of each block that it marks by
    ``{% generation %}``."""

    from transformers.utils.chat_template_utils import render_jinja_template

    def write(spelled: list[Turn]) -> tuple[str, list[tuple[int, int]]]:
        written, marks = render_jinja_template(
            [spelled], tools=tools, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map,
            **{"chat_template": tokenizer.get_chat_template(tools=tools), **_dated(tokenizer, date, tools)},
        )  # fmt: skip
        return written[0], marks[0]

    return _spelled(tokenizer, turns, write)


def _spelled(tokenizer: Any, turns: Sequence[Turn], write: Callable[[list[Turn]], Written]) -> Written:
    """What ``write`` makes of the first spelling of the turns that the chat template takes."""
    plain, *others = spellings(turns, template_facts(tokenizer).parts)
    try:
        return write(plain)
    except Exception:  # a template may raise what it likes
        for spelled in others:
            with suppress(Exception):  # the error about the plain spelling is the one to show
                return write(spelled)
        raise


def _rendered(tokenizer: Any, turns: list[Turn], prompt: bool, date: datetime.date | None, **fields: Any) -> str:
    fields |= _dated(tokenizer, date, fields.get("tools"))
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **fields)
    return text


def _dated(tokenizer: Any, date: datetime.date | None, tools: Any) -> dict[str, Any]:
    """Fields that have the chat template write ``date``; none for a template without a date."""
    day = date_of(tokenizer, date)
    if day is None:
        return {}
    return {"chat_template": _DATED + tokenizer.get_chat_template(tools=tools), "kdkernels_date": _written(day)}


def _written(day: datetime.date) -> dict[str, str]:
    """What each code of ``strftime`` stands for at midnight of ``day``; replaced in this order."""
    midnight = datetime.datetime.combine(day, datetime.time())
    codes = {f"%{letter}": midnight.strftime(f"%{letter}") for letter in _CODES}
    unpadded = {f"%-{code[1]}": str(int(text)) for code, text in codes.items() if text.isdecimal()}
    return {"%%": "\0", **codes, **unpadded, "\0": "%"}
