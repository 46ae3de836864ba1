"""The interface to a black-box model, which returns text for prompts: an HTTP server, or a model in this process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .reasoning import of_entry

__all__ = ["REFUSED", "Counted", "Reply", "Request", "TextModel", "Usage"]

REFUSED = "refused"
"""The ``finish_reason`` of the empty reply to a request that the server refuses."""


@dataclass(frozen=True)
class Request:
    """One request for text. ``key`` is unique within a log, and the same when a run is repeated."""

    key: str
    messages: Sequence[Mapping[str, str]]
    """Chat messages: ``role`` and ``content`` each."""
    max_tokens: int = 256
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    """Number of alternatives per generated token; 0 for none."""
    where: str = ""
    """Row of the request, such as ``data.jsonl, row 3``, for errors."""

    @property
    def name(self) -> str:
        """Name of the request in errors."""
        return self.where or f"request {self.key!r}"


@dataclass(frozen=True)
class Reply:
    """The text of one reply, its end, and its tokens."""

    key: str
    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    logprobs: Sequence[Mapping[str, Any]] = field(default=())
    """Per generated token: ``token``, ``logprob`` (None if the server returns no number) and ``top_logprobs`` (a list of ``token``,
    ``logprob``); ``bytes`` and ``id`` if the server returns them."""
    reasoning: str = ""
    """The model's thoughts before ``text``."""


class TextModel(Protocol):
    """A model that replies to requests."""

    def complete(self, requests: Sequence[Request], log: Path) -> list[Reply]:
        """Return the replies in the order of the requests.

        Each reply is appended to ``log`` (JSONL) as soon as it arrives. Requests with a reply in the log are not sent again.

        Raises:
            ValueError: two requests have the same key.
        """
        ...


@dataclass
class Usage:
    """Requests, tokens and cost over all calls. The server reports the tokens of its replies."""

    replies: int = 0
    from_log: int = 0
    """Replies that were already in the log, and were not requested again."""
    refused: int = 0
    """Refused requests, which ``replies`` does not count."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Reason of each refused request, by key."""
    retries: int = 0
    interrupted: Counter[str] = field(default_factory=Counter)
    """Retries after a reply that the server interrupted, by finish reason."""
    waiting: str = ""
    """The reason for the current retry, such as an unreachable server; empty after the next reply."""
    reasoning: int = 0
    """Replies with reasoning."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """In the currency of the prices, including replies from the log."""

    def add(self, entry: Mapping[str, Any], from_log: bool, prices: tuple[float, float] = (0.0, 0.0)) -> None:
        """Count one reply, an entry of the log. ``prices``: of a million prompt tokens and of a million completion tokens."""
        self.replies += 1
        self.from_log += from_log
        self.reasoning += bool(of_entry(entry)[0])
        self.waiting = ""
        prompt, completion = entry.get("prompt_tokens", 0), entry.get("completion_tokens", 0)
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.cost += (prompt * prices[0] + completion * prices[1]) / 1e6


class Counted(TextModel, Protocol):
    """A ``TextModel`` that reports its progress."""

    usage: Usage
    report: Callable[[Usage], object] | None
    """Called after each reply, including those in the log, and before each retry."""
