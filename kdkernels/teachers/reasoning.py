"""Separate a reasoning model's thoughts from its answer, for servers and for models in this process."""

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
"""Marks before and after thoughts, by model."""
ANSWER = "<|channel|>final<|message|>"
"""The mark of gpt-oss before an answer without thoughts."""


def split_thoughts(text: str, opened: bool = False) -> tuple[str, str]:
    """Return thoughts and answer of a text that begins with thoughts; ``("", text)`` for any other text.

    White space beside the marks is removed. Thoughts without an end leave an empty answer.

    Args:
        opened: the prompt ends with an opening mark. A text with only a closing mark is read in the same way.
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
    """Return thoughts and answer of a log entry, whose text can still contain the thoughts."""
    text = str(entry.get("text", ""))
    return (str(entry["reasoning"]), text) if entry.get("reasoning") else split_thoughts(text)


def opens_thoughts(prompt: str) -> bool:
    """Return whether a prompt ends with an opening mark."""
    return prompt.rstrip().endswith(tuple(opening for opening, _ in MARKS))


def read_generated(tokenizer: Any, ids: Sequence[int], opened: bool = False, surplus: int = 0) -> tuple[str, str]:
    """Return thoughts and answer of generated ids. Marks of thoughts can be special tokens, which are removed after reading them.

    Args:
        opened: see ``split_thoughts``.
        surplus: number of characters to cut from the end, where a stop text begins.
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
