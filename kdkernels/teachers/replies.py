"""The log that a text model keeps of its replies, one JSON object a line: what it holds is not asked, or paid for, again."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import FileError, Lines, digest
from .text import Reply, Request

__all__ = ["ReplyLog", "check_requests", "fingerprint", "reply_of", "seed_of"]

SYNC_SECONDS = 1.0
"""A killed process loses no reply; a power cut at most those of this long."""


class ReplyLog:
    """The log at ``path``, as a context.

    Raises:
        FileError: another process holds it, or it is damaged before its last line.
    """

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self._synced = time.monotonic()

    def __enter__(self) -> ReplyLog:
        self._lines.__enter__()
        try:
            for entry in self._lines:
                if not isinstance(entry.get("key"), str) or not isinstance(entry.get("request"), str):
                    raise FileError(f"{self._path.name} holds lines without key and request: it is no log of replies. Give another file")
                self._entries.setdefault(entry["key"], entry)
        except BaseException:
            self._lines.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lines.__exit__(kind, error, trace)

    def find(self, key: str, request: str) -> dict[str, Any] | None:
        """The entry of ``key``, if there is one.

        Args:
            request: hash of all that decides the reply.

        Raises:
            FileError: an entry of another request.
        """
        entry = self._entries.get(key)
        if entry is not None and entry["request"] != request:
            raise FileError(
                f"{self._path.name} holds a reply for {key!r} to another request: the model, the prompt or a setting has changed. "
                "Give another file, or the settings that it was begun with"
            )
        return entry

    def append(self, key: str, request: str, value: dict[str, Any]) -> None:
        entry = {"key": key, "request": request, **value}
        self._lines.append(entry)
        self._entries[key] = entry
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._lines.sync()
            self._synced = time.monotonic()


def check_requests(requests: Sequence[Request]) -> None:
    """
    Raises:
        ValueError: two requests with one key; a request that makes no sense.
    """
    seen: set[str] = set()
    for request in requests:
        if request.key in seen:
            raise ValueError(f"two requests have the key {request.key!r}: each needs its own")
        seen.add(request.key)
        if not request.messages:
            raise ValueError(f"request {request.key!r} has no messages")
        if request.max_tokens < 1 or not 0 <= request.temperature < float("inf") or request.logprobs < 0:
            raise ValueError(
                f"request {request.key!r}: max_tokens={request.max_tokens} must be >= 1, temperature={request.temperature} and "
                f"logprobs={request.logprobs} must be >= 0"
            )


def fingerprint(request: Request, **settings: Any) -> str:
    """Hash of all that decides a reply: the request but for its key, and the model's own settings."""
    asked = dataclasses.asdict(request)
    del asked["key"]
    asked["messages"] = [dict(message) for message in request.messages]
    return digest([asked, settings])


def reply_of(entry: dict[str, Any]) -> Reply:
    """The reply in an entry of the log."""
    return Reply(**{field.name: entry[field.name] for field in dataclasses.fields(Reply) if field.name in entry})


def seed_of(seed: int, key: str) -> int:
    """64 random bits for the draws of one request."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "little")
