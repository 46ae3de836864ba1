"""The fault-injecting server, and requests to ask it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdkernels.teachers.http import HTTPModel
from kdkernels.teachers.text import Request

KEY = "sk-very-secret-0123456789"


class Server:
    """The fault-injecting server, in a process of its own."""

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


def wait_until(ready: Any, process: subprocess.Popen[Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None, "the server has ended"
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.02)


def requests(prompts: Sequence[str], **options: Any) -> list[Request]:
    return [Request(f"row {i}", [{"role": "user", "content": prompt}], **options) for i, prompt in enumerate(prompts)]
