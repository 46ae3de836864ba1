"""The log that a text model keeps of its replies, one JSON object a line: what it holds is not asked, or paid for, again."""

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
"""A killed process loses no reply; a power cut at most those of this long."""


class OtherRequest(FileError):
    """A log that holds the reply to another request under the key of this one: of another model, prompt or setting."""


class ReplyLog:
    """The log at ``path``, as a context.

    Raises:
        FileError: another process holds it, or it is damaged before its last line.
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
            OtherRequest: an entry of another request.
        """
        entry = self._entries.get(key)
        if entry is not None and entry["request"] != request:
            raise OtherRequest(
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


def _is_entry(line: Mapping[str, Any]) -> bool:
    """Report whether a line is an entry of a log, by the hash of its request."""
    request = line.get("request")
    return isinstance(line.get("key"), str) and isinstance(request, str) and re.fullmatch("[0-9a-f]{64}", request) is not None


def is_unmarked_log(path: Path) -> bool:
    """Report whether a file is a log of replies, of a version that wrote no markers or moved here without its marker."""
    return bool(Lines(path, _is_entry).unmarked())


def check_requests(requests: Sequence[Request]) -> None:
    """Refuse requests that can't be asked, before any is.

    Raises:
        ValueError: two requests with one key; a request that makes no sense, or with text that can't be sent.
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
    """Refuse text that can't be sent or tokenised.

    Raises:
        ValueError: half of a surrogate pair in ``value``, which the message calls ``name``.
    """
    if half := HALF.search(json.dumps(value, ensure_ascii=False, default=str)):
        raise ValueError(
            f"{name}: the text holds \\u{ord(half[0]):04x}, half of a surrogate pair: a character was cut in two. Repair or remove it"
        )


def fingerprint(request: Request, **settings: Any) -> str:
    """Hash of all that decides a reply: fields of the request, named one by one, and the model's own settings.

    A field of ``Request`` that is new must not change the hash of a request that does not use it: the replies in older logs are paid for.
    """
    asked = {
        "messages": [dict(message) for message in request.messages], "max_tokens": request.max_tokens, "temperature": request.temperature,
        "stop": request.stop, "logprobs": request.logprobs,
    }  # fmt: skip
    return digest([asked, settings])


def reply_of(entry: Mapping[str, Any]) -> Reply:
    """The reply in an entry of the log."""
    known = {field.name: entry[field.name] for field in dataclasses.fields(Reply) if field.name in entry}
    reasoning, text = of_entry(entry)
    return Reply(**{**known, "text": text, "reasoning": reasoning})


def seed_of(seed: int, key: str) -> int:
    """64 random bits for the draws of one request."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:8], "little")
