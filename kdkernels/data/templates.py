"""Chat templates, rendered for a fixed date: some write today's date into every prompt."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["chat_text", "date_of", "writes_date"]

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


def chat_text(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, prompt: bool = True, date: datetime.date | None = None, **fields: Any
) -> str:
    """The conversation as the tokenizer's chat template writes it on ``date`` at midnight (default: today).

    Args:
        prompt: end where the assistant's turn begins.
        fields: further variables of the template, such as ``tools``.
    """
    day = date_of(tokenizer, date)
    if day is not None:
        fields["chat_template"] = _DATED + tokenizer.get_chat_template(tools=fields.get("tools"))
        fields["kdkernels_date"] = _written(day)
    text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **fields)
    return text


def _written(day: datetime.date) -> dict[str, str]:
    """What each code of ``strftime`` stands for at midnight of ``day``; replaced in this order."""
    midnight = datetime.datetime.combine(day, datetime.time())
    codes = {f"%{letter}": midnight.strftime(f"%{letter}") for letter in _CODES}
    unpadded = {f"%-{code[1]}": str(int(text)) for code, text in codes.items() if text.isdecimal()}
    return {"%%": "\0", **codes, **unpadded, "\0": "%"}
