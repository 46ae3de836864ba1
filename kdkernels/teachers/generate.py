"""Requests for the rows of data, and training rows with the replies, for ``kdkernels generate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.messages import WEIGHT
from ..support.files import digest
from .replies import check_text
from .text import Reply, Request

__all__ = ["asked_of", "messages_of", "requests_of", "with_reply"]

OF_RESPONSE = ("response", "completion", "finish_reason", "reasoning", "teacher_logprobs")
"""Fields of a row that belong to its response. They are removed when the response is replaced."""


def messages_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the student's chat messages: a row's ``messages`` without a last one by the assistant, or its ``prompt``.

    Raises:
        ValueError: the row has neither.
    """
    return _messages(row, "messages", "prompt")


def asked_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the teacher's prompt: the row's ``teacher_messages`` or ``teacher_prompt`` if it has one, else the student's prompt.

    Raises:
        ValueError: a row without a prompt, or with ``demonstrations`` or ``tools``, which only the trainer can render.
    """
    for name in ("demonstrations", "tools"):
        if row.get(name):
            raise ValueError(f"it has {name}, which the teacher would not get: write them into teacher_messages")
    separate = row.get("teacher_messages") or row.get("teacher_prompt")
    return _messages(row, "teacher_messages", "teacher_prompt") if separate else messages_of(row)


def _messages(row: Mapping[str, Any], several: str, one: str) -> list[dict[str, str]]:
    name = several if row.get(several) else one
    value = row.get(name)
    check_text(value, f"field {name!r}")
    if name == several:
        if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(message, Mapping) for message in value):
            raise ValueError(f'field {name!r}: a list of {{"role": ..., "content": ...}} is needed')
        messages = [{name: part for name, part in message.items() if name != WEIGHT} for message in value]
        if messages[-1].get("role") == "assistant":
            messages.pop()
    else:
        messages = [{"role": "user", "content": value}] if isinstance(value, str) else []
    if not messages:
        raise ValueError(f"a row needs prompt or messages (and more than the assistant's), got {', '.join(row) or 'nothing'}")
    return messages


def requests_of(
    rows: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    temperature: float,
    stop: Sequence[str] = (),
    logprobs: int = 0,
    places: Sequence[str] = (),
) -> list[Request]:
    """Return one request per row.

    Its key is the row's ``key``, else a hash of its messages, which is independent of the row's position. Equal rows are numbered, and each
    gets its own request.

    Args:
        places: name of each row for errors, such as ``data.jsonl, row 3``. Default: its number.

    Raises:
        ValueError: a row has no prompt.
    """
    requests, seen = [], Counter[str]()
    for place, row in zip(places or [f"row {number}" for number in range(1, len(rows) + 1)], rows, strict=True):
        try:
            messages = asked_of(row)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        key = str(row["key"]) if row.get("key") is not None else digest(messages)[:32]
        seen[key] += 1
        unique = key if seen[key] == 1 else f"{key}#{seen[key]}"
        requests.append(Request(unique, messages, max_tokens, temperature, tuple(stop), logprobs, place if places else ""))
    return requests


def with_reply(row: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    """Return a training row: ``row`` with the teacher's ``response``, its ``finish_reason``, and ``reasoning`` and ``teacher_logprobs`` if
    the reply has them."""
    answered = {name: value for name, value in row.items() if name not in OF_RESPONSE}
    answered |= {"response": reply.text, "finish_reason": reply.finish_reason}
    if reply.reasoning:
        answered["reasoning"] = reply.reasoning
    if row.get("messages"):
        answered["messages"] = messages_of(row)
    if reply.logprobs:
        answered["teacher_logprobs"] = list(reply.logprobs)
    return answered
