"""Servers for tests: the fault-injecting one and one that is a function; and requests for them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from kdkernels.teachers.http import HTTPModel
from kdkernels.teachers.text import Request

KEY = "sk-very-secret-0123456789"


class Server:
    """A fault-injecting server (fault_server.py) in its own process."""

    def __init__(self, folder: Path) -> None:
        port = folder / "port"
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).parent / "fault_server.py"), str(port)])
        wait_until(port.exists, self.process)
        self.url = f"http://127.0.0.1:{port.read_text()}/v1"

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator[Server]:
        server = cls(folder)
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(self.url, timeout=10) as answer:
            return json.load(answer)  # type: ignore[no-any-return]

    def model(self, **options: Any) -> HTTPModel:
        return HTTPModel(self.url, "m", **{"timeout": 4.0, "backoff": 0.02, **options})


Answer = bytes | tuple[int, bytes] | tuple[int, bytes, dict[str, str]]
"""A body, or ``(status, body)``, or ``(status, body, headers)``."""


class ScriptedModel(HTTPModel):
    """An ``HTTPModel`` whose server is a function of the request's body, in this process. ``requests`` records what it was sent."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer], **options: Any) -> None:
        super().__init__("http://teacher.test/v1", "m", **{"backoff": 0.0, "retries": 2, "concurrency": 1, **options})
        self.answer = answer
        self.requests: list[httpx2.Request] = []

    def _client(self, transport: httpx2.AsyncBaseTransport | None = None) -> httpx2.AsyncClient:
        def handle(request: httpx2.Request) -> httpx2.Response:
            self.requests.append(request)
            answer = self.answer(json.loads(request.content))
            status, content, *headers = (200, answer) if isinstance(answer, bytes) else answer
            return httpx2.Response(status, content=content, headers=headers[0] if headers else {})

        return super()._client(httpx2.MockTransport(handle))


def chat_reply(content: object = "yes", finish_reason: object = "stop", message: Mapping[str, Any] = {}, **choice: Any) -> bytes:
    """Return the body of a chat reply; ``message`` and ``choice`` add fields to those two objects."""
    body = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason, **choice}
    return json.dumps({"choices": [body], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}).encode()


def stream(*events: object, end: str = "data: [DONE]\n\n") -> bytes:
    """Return the body of a stream of events."""
    return ("".join(f"data: {json.dumps(event)}\n\n" for event in events) + end).encode()


def wait_until(ready: Any, process: subprocess.Popen[Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.02)


def requests(prompts: Sequence[str], **options: Any) -> list[Request]:
    return [Request(f"row {i}", [{"role": "user", "content": prompt}], **options) for i, prompt in enumerate(prompts)]
