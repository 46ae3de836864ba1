"""The log of a text model's replies, one JSON object per line. Requests with a reply in the log are not sent, or paid for, again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..support.files import FileError, Lines, digest
from .reasoning import of_entry
from .text import Reply, Request

__all__ = ["OtherRequest", "ReplyLog", "check_requests", "check_text", "fingerprint", "is_unmarked_log", "reply_of", "seed_of"]

HALF = re.compile("[\ud800-\udfff]")
SYNC_SECONDS = 1.0
"""A killed process loses no reply. A power cut loses at most the replies of this time."""


class OtherRequest(FileError):
    """The log has a reply under this key to another request: another model, prompt or setting."""


class ReplyLog:
    """The log at ``path``, as a context manager.

    Raises:
        FileError: another process has locked it, or a line other than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path, _is_entry)
        self._path = path
        self._entries: dict[str, dict[str, Any]] = {}
        self._synced = time.monotonic()

    def __enter__(self) -> ReplyLog:
        self._lines.__enter__()
        try:
            for entry in self._lines:
                if not isinstance(entry.get("key"), str) or not isinstance(entry.get("request"), str):
                    raise FileError(f"{self._path.name} is not a log of replies: it has lines without key and request. Give another file")
                self._entries.setdefault(entry["key"], entry)
        except BaseException:
            self._lines.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lines.__exit__(kind, error, trace)

    def find(self, key: str, request: str) -> dict[str, Any] | None:
        """Return the entry of ``key``; None without one.

        Args:
            request: ``fingerprint`` of the request.

        Raises:
            OtherRequest: the entry is of another request.
        """
        entry = self._entries.get(key)
        if entry is not None and entry["request"] != request:
            raise OtherRequest(
                f"{self._path.name} holds a reply for {key!r} to another request: the model, the prompt or a setting has changed. "
                "Give another file, or the settings that it was made with"
            )
        return entry

    def append(self, key: str, request: str, value: dict[str, Any]) -> None:
        """Write an entry."""
        entry = {"key": key, "request": request, **value}
        self._lines.append(entry)
        self._entries[key] = entry
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._lines.sync()
            self._synced = time.monotonic()


def _is_entry(line: Mapping[str, Any]) -> bool:
    """Return whether a line is an entry of a log, by the hash of its request."""
    request = line.get("request")
    return isinstance(line.get("key"), str) and isinstance(request, str) and re.fullmatch("[0-9a-f]{64}", request) is not None


def is_unmarked_log(path: Path) -> bool:
    """Return whether a file is a log of replies without a marker: written by an earlier version, or moved here without it."""
    return bool(Lines(path, _is_entry).unmarked())


def check_requests(requests: Sequence[Request]) -> None:
    """Check all requests before any is sent.

    Raises:
        ValueError: two requests have the same key, or a request is invalid or has text that cannot be encoded.
    """
    seen: set[str] = set()
    for request in requests:
        if request.key in seen:
            raise ValueError(f"two requests have the key {request.key!r}: each needs its own")
        seen.add(request.key)
        if not request.messages:
            raise ValueError(f"{request.name} has no messages")
        check_text([*request.messages, request.stop], request.name)
        if request.max_tokens < 1 or not 0 <= request.temperature < float("inf") or request.logprobs < 0:
            raise ValueError(
                f"{request.name}: max_tokens={request.max_tokens} must be >= 1, temperature={request.temperature} and "
                f"logprobs={request.logprobs} must be >= 0"
            )


def check_text(value: Any, name: str) -> None:
    """Check that text can be encoded. ``name`` is its name in the message.

    Raises:
        ValueError: ``value`` contains half of a surrogate pair.
    """
    if half := HALF.search(json.dumps(value, ensure_ascii=False, default=str)):
        raise ValueError(
            f"{name}: the text holds \\u{ord(half[0]):04x}, half of a surrogate pair: a character was cut in two. Repair or remove it"
        )


def fingerprint(request: Request, **settings: Any) -> str:
    """Return a hash of everything that determines a reply: the fields of the request, and the model's settings.

    The fields are listed one by one: a new field of ``Request`` must not change the hash of requests that do not use it, because older logs
    have paid replies to them.
    """
    fields = {
        "messages": [dict(message) for message in request.messages], "max_tokens": request.max_tokens, "temperature": request.temperature,
        "stop": request.stop, "logprobs": request.logprobs,
    }  # fmt: skip
    return digest([fields, settings])


def reply_of(entry: Mapping[str, Any]) -> Reply:
    """Return the reply in an entry of the log."""
    known = {field.name: entry[field.name] for field in dataclasses.fields(Reply) if field.name in entry}
    reasoning, text = of_entry(entry)
    return Reply(**{**known, "text": text, "reasoning": reasoning})


def seed_of(seed: int, key: str) -> int:
    """Return 64 random bits for the draws of one request."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "little")
