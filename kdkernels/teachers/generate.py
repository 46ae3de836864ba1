"""Rows of data with a teacher's text for them: what ``kdkernels generate`` does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..files import digest
from .text import Reply, Request

__all__ = ["asked_of", "messages_of", "requests_of", "with_reply"]


def messages_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The student's chat messages: a row's ``messages`` without the last one of the assistant, or its ``prompt``.

    Raises:
        ValueError: a row without either.
    """
    return _messages(row, "messages", "prompt")


def asked_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """What the teacher is asked: a row's ``teacher_messages`` or ``teacher_prompt``, where it has one; else what the student is.

    Raises:
        ValueError: a row that asks nothing, or with ``demonstrations`` or ``tools``, of which only the trainer knows how to write them.
    """
    for name in ("demonstrations", "tools"):
        if row.get(name):
            raise ValueError(f"it has {name}, which the teacher would not be given: write them into teacher_messages")
    own = row.get("teacher_messages") or row.get("teacher_prompt")
    return _messages(row, "teacher_messages", "teacher_prompt") if own else messages_of(row)


def _messages(row: Mapping[str, Any], several: str, one: str) -> list[dict[str, str]]:
    if row.get(several):
        messages = [dict(message) for message in row[several]]
        if messages[-1].get("role") == "assistant":
            messages.pop()
    else:
        messages = [{"role": "user", "content": row[one]}] if isinstance(row.get(one), str) else []
    if not messages:
        raise ValueError(f"a row needs prompt or messages (and more than the assistant's), got {', '.join(row) or 'nothing'}")
    return messages


def requests_of(
    rows: Sequence[Mapping[str, Any]], *, max_tokens: int, temperature: float, stop: Sequence[str] = (), logprobs: int = 0
) -> list[Request]:
    """One request a row. Its key is the row's own, else a hash of its messages, so that it stays the same wherever the row moves to;
    equal rows are numbered, and each is asked.

    Raises:
        ValueError: a row that asks nothing.
    """
    requests, seen = [], Counter[str]()
    for number, row in enumerate(rows, 1):
        try:
            messages = asked_of(row)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        key = str(row["key"]) if row.get("key") is not None else digest(messages)[:32]
        seen[key] += 1
        unique = key if seen[key] == 1 else f"{key}#{seen[key]}"
        requests.append(Request(unique, messages, max_tokens, temperature, tuple(stop), logprobs))
    return requests


def with_reply(row: Mapping[str, Any], reply: Reply) -> dict[str, Any]:
    """A training row: ``row`` with the teacher's ``response``, its ``finish_reason``, and ``teacher_logprobs`` if they were asked for."""
    made = {**row, "response": reply.text, "finish_reason": reply.finish_reason}
    if row.get("messages"):
        made["messages"] = messages_of(row)
    if reply.logprobs:
        made["teacher_logprobs"] = list(reply.logprobs)
    return made
