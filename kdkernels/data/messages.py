"""Normalise chat messages of different spellings, and return the spellings that chat templates accept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["WEIGHT", "Turn", "is_empty", "read_turns", "spellings"]

Turn = dict[str, Any]
"""A message with ``role``, ``content`` as text, ``tool_calls`` with objects as arguments, and ``reasoning_content``. Empty or null fields
and ``weight`` are removed."""
READ = ("content", "tool_calls", "reasoning")
"""Message fields with more than one accepted spelling."""
WEIGHT = "weight"
"""Message field that multiplies the loss of its turn. Models, templates and servers do not get it."""
TEXT_PARTS = ("text", "input_text", "output_text")
Refuse = Callable[[str], Exception]


def read_turns(value: Any, refuse: Refuse) -> list[Turn]:
    """Return the turns of a conversation in normalised form.

    Args:
        refuse: returns the error to raise for a description of the problem.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise refuse('a list of {"role": ..., "content": ...} is needed')
    return [_turn(message, number, refuse) for number, message in enumerate(value)]


def _turn(message: Any, number: int, refuse: Refuse) -> Turn:
    needed = f"message {number} needs a role and a content, both text (or tool_calls in place of the content)"
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise refuse(needed)
    turn = {name: part for name, part in message.items() if part is not None and name not in (*READ, WEIGHT)}
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
            raise refuse(f"message {number}: tool_calls must be a list of objects")
        turn["tool_calls"] = list(map(_call, calls))
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, number, refuse) for part in content)
    if isinstance(content, str):
        turn["content"] = content
    elif content is not None or not calls:
        raise refuse(needed)
    return _with_reasoning(turn, message.get("reasoning"), number, refuse)


def _with_reasoning(turn: Turn, reasoning: Any, number: int, refuse: Refuse) -> Turn:
    """Return the message with ``reasoning_content``. Servers use ``reasoning_content`` or ``reasoning``, some both."""
    thoughts = turn.pop("reasoning_content", None)
    if thoughts and reasoning and thoughts != reasoning:
        raise refuse(f"message {number} has different texts in 'reasoning' and 'reasoning_content': remove one of them")
    thoughts = thoughts or reasoning
    if thoughts is not None and not isinstance(thoughts, str):
        raise refuse(f"message {number}: reasoning_content must be text")
    return {**turn, "reasoning_content": thoughts} if thoughts and thoughts.strip() else turn


def _part(part: Any, number: int, refuse: Refuse) -> str:
    """Return the text of one part of a content list."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise refuse(f"message {number} has a part of type {kind!r}: only parts of text can be learnt, so leave the row or the part out")
    text: str = part["text"]
    return text


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with an object as arguments. Text that is not a JSON object is unchanged."""
    made = dict(call)
    if isinstance(made.get("function"), Mapping):
        made["function"] = _call(made["function"])
    if isinstance(made.get("arguments"), str):
        try:
            arguments = json.loads(made["arguments"].strip() or "{}")
        except ValueError:
            return made
        made["arguments"] = arguments if isinstance(arguments, dict) else made["arguments"]
    return made


def _written(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call with JSON text as arguments."""
    made = dict(call)
    if isinstance(made.get("function"), Mapping):
        made["function"] = _written(made["function"])
    if isinstance(made.get("arguments"), dict):
        made["arguments"] = json.dumps(made["arguments"], ensure_ascii=False)
    return made


def is_empty(turn: Turn) -> bool:
    """Return True for a turn with neither text nor tool calls."""
    return not turn.get("content", "").strip() and not turn.get("tool_calls")


def spellings(turns: Sequence[Turn], parts: bool = False) -> Iterator[list[Turn]]:
    """Yield the conversation in the spellings that chat templates accept, the one documented by transformers first.

    For conversations with tool calls, other spellings follow: with an empty content next to the calls, and with arguments as JSON text.

    Args:
        parts: contents as lists of parts, for templates that accept only these.
    """
    plain = [_as_parts(turn) for turn in turns] if parts else [dict(turn) for turn in turns]
    yield plain
    if any("tool_calls" in turn for turn in turns):
        with_content = [{"content": "", **turn} if "tool_calls" in turn else turn for turn in plain]
        yield with_content
        yield [{**turn, "tool_calls": list(map(_written, turn["tool_calls"]))} if "tool_calls" in turn else turn for turn in with_content]


def _as_parts(turn: Turn) -> Turn:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]} if "content" in turn else dict(turn)
