"""The thoughts of a reasoning model, apart from its answer: the same for servers and for models in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["of_entry", "opens_thoughts", "read_generated", "split_thoughts"]

MARKS = (
    ("<think>", "</think>"),  # Qwen, DeepSeek, SmolLM3
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),  # gpt-oss
    ("<|channel>thought", "<channel|>"),  # Gemma
)
"""How models write where their thoughts begin and end."""
ANSWER = "<|channel|>final<|message|>"
"""How gpt-oss begins an answer without thoughts."""


def split_thoughts(text: str, opened: bool = False) -> tuple[str, str]:
    """Thoughts and answer of a text that begins with thoughts; ``("", text)`` for any other.

    Line breaks and spaces beside the marks go with the marks. Thoughts that do not end leave an empty answer.

    Args:
        opened: the prompt ends with the mark that opens thoughts. A text that closes what it has not opened is read so, too.
    """
    start = text.lstrip()
    if start.startswith(ANSWER):
        return "", start[len(ANSWER) :]
    for opening, closing in MARKS:
        begun = start.startswith(opening)
        thoughts, mark, answer = (start[len(opening) :] if begun else text).partition(closing)
        if begun or (mark and opening not in thoughts):
            return thoughts.strip(), answer.lstrip()
    return (text.strip(), "") if opened else ("", text)


def of_entry(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Thoughts and answer of an entry of a log, which keeps the text as the server sent it."""
    text = str(entry.get("text", ""))
    return (str(entry["reasoning"]), text) if entry.get("reasoning") else split_thoughts(text)


def opens_thoughts(prompt: str) -> bool:
    """True if a prompt ends with the mark that opens thoughts."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in MARKS))


def read_generated(tokenizer: Any, ids: Sequence[int], opened: bool = False, surplus: int = 0) -> tuple[str, str]:
    """Thoughts and answer of generated ids, both without special tokens; those that mark thoughts are heeded first.

    Args:
        opened: see ``split_thoughts``.
        surplus: characters at the end that do not count, from where a stop text begins.
    """
    plain, whole = (str(tokenizer.decode(ids, skip_special_tokens=skip)) for skip in (True, False))
    plain, whole = plain[: len(plain) - surplus], whole[: len(whole) - surplus]
    thoughts, answer = split_thoughts(whole, opened)
    if answer == whole:
        return "", plain
    if whole != plain:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        for token in special:
            thoughts, answer = thoughts.replace(token, ""), answer.replace(token, "")
    return thoughts, answer
