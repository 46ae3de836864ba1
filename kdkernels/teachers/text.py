"""What a recipe asks of a black-box model: text for prompts. Behind it stands an HTTP server or a model in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Reply", "Request", "TextModel"]


@dataclass(frozen=True)
class Request:
    """One text wanted. ``key`` is unique within a log and the same when the same work is done again."""

    key: str
    messages: Sequence[Mapping[str, str]]
    """Chat messages: ``role`` and ``content`` each."""
    max_tokens: int = 256
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    """How many alternatives per generated token; 0 for none."""


@dataclass(frozen=True)
class Reply:
    key: str
    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: Sequence[Mapping[str, Any]] = field(default=())
    """Per generated token: ``token``, ``logprob`` and ``top_logprobs`` (a list of ``token``, ``logprob``)."""


class TextModel(Protocol):
    def complete(self, requests: Sequence[Request], log: Path) -> list[Reply]:
        """Replies in the order of the requests. Each is appended to ``log`` (JSONL) as it comes; what the log holds is not asked again.

        Raises:
            ValueError: two requests with one key.
        """
        ...
