"""Chat messages in one form, however a row spells them, and the spellings that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

__all__ = ["WEIGHT", "Turn", "is_empty", "read_turns", "spellings"]

Turn = dict[str, Any]
"""``role``; ``content`` as text; ``tool_calls``, whose arguments are objects; ``reasoning_content``. What is empty or null is left out, and
so is ``weight``."""
READ = ("content", "tool_calls", "reasoning")
"""Fields of a message that are read in more than one spelling."""
WEIGHT = "weight"
"""The field of a message that multiplies the loss of its turn: no part of what models, templates and servers read."""
TEXT_PARTS = ("text", "input_text", "output_text")
Refuse = Callable[[str], Exception]


def read_turns(value: Any, refuse: Refuse) -> list[Turn]:
    """The turns of a conversation.

    Args:
        refuse: makes the error to raise, from what is wrong.
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
    """Servers name the thoughts ``reasoning_content`` or ``reasoning``, some both."""
    thoughts = turn.pop("reasoning_content", None)
    if thoughts and reasoning and thoughts != reasoning:
        raise refuse(f"message {number} has two texts of thoughts, 'reasoning' and 'reasoning_content': leave one of them out")
    thoughts = thoughts or reasoning
    if thoughts is not None and not isinstance(thoughts, str):
        raise refuse(f"message {number}: reasoning_content must be text")
    return {**turn, "reasoning_content": thoughts} if thoughts and thoughts.strip() else turn


def _part(part: Any, number: int, refuse: Refuse) -> str:
    """The text of one part of a content that is a list."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise refuse(f"message {number} has a part of type {kind!r}: only parts of text can be learnt, so leave the row or the part out")
    text: str = part["text"]
    return text


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object; text that is not JSON of one stays."""
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
    """A tool call whose arguments are JSON text."""
    made = dict(call)
    if isinstance(made.get("function"), Mapping):
        made["function"] = _written(made["function"])
    if isinstance(made.get("arguments"), dict):
        made["arguments"] = json.dumps(made["arguments"], ensure_ascii=False)
    return made


def is_empty(turn: Turn) -> bool:
    """True for a turn that says nothing: neither text nor tool calls."""
    return not turn.get("content", "").strip() and not turn.get("tool_calls")


def spellings(turns: Sequence[Turn], parts: bool = False) -> Iterator[list[Turn]]:
    """The conversation as transformers documents it for templates; then, if it has tool calls, as some templates need it: with an empty
    content beside them, and with their arguments as JSON text too.

    Args:
        parts: contents as lists of parts, for a template that takes nothing else.
    """
    plain = [_as_parts(turn) for turn in turns] if parts else [dict(turn) for turn in turns]
    yield plain
    if any("tool_calls" in turn for turn in turns):
        with_content = [{"content": "", **turn} if "tool_calls" in turn else turn for turn in plain]
        yield with_content
        yield [{**turn, "tool_calls": list(map(_written, turn["tool_calls"]))} if "tool_calls" in turn else turn for turn in with_content]


def _as_parts(turn: Turn) -> Turn:
    return {**turn, "content": [{"type": "text", "text": turn["content"]}]} if "content" in turn else dict(turn)
