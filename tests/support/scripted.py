"""A black-box model that answers by a function, keeps a log like the real ones, and can be killed after some answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kdkernels.teachers.text import Reply, Request, Usage

__all__ = ["Killed", "Scripted"]


class Killed(BaseException):
    """Stand for SIGKILL. Error handling must not catch it, so it is not an ``Exception``."""


class Scripted:
    """A model whose ``answer(request)`` returns a text or a Reply.

    ``requests`` records the requests that were not in the log. ``Killed`` is raised after ``die_after`` answers.
    """

    def __init__(self, answer: Callable[[Request], str | Reply], die_after: int | None = None) -> None:
        self.answer, self.die_after = answer, die_after
        self.requests: list[Request] = []
        self.usage = Usage()
        self.report: Callable[[Usage], object] | None = None

    def complete(self, requests: Sequence[Request], log: Path) -> list[Reply]:
        keys = [request.key for request in requests]
        if len(set(keys)) < len(keys):
            raise ValueError("two requests with one key")
        known: dict[str, Reply] = {}
        if log.exists():
            for line in log.read_text().splitlines():
                row: Mapping[str, str] = json.loads(line)
                known[row["key"]] = Reply(row["key"], row["text"], row["finish_reason"])
        with log.open("a") as file:
            for request in requests:
                if request.key in known:
                    self.count(from_log=True)
                    continue
                if self.die_after is not None and len(self.requests) >= self.die_after:
                    raise Killed
                self.requests.append(request)
                answer = self.answer(request)
                reply = answer if isinstance(answer, Reply) else Reply(request.key, answer)
                known[request.key] = reply
                file.write(json.dumps({"key": request.key, "text": reply.text, "finish_reason": reply.finish_reason}) + "\n")
                file.flush()
                self.count(from_log=False)
        return [known[key] for key in keys]

    def count(self, from_log: bool) -> None:
        self.usage.add({}, from_log)
        if self.report is not None:
            self.report(self.usage)


def last(request: Request) -> str:
    """Return the text of the request's last turn."""
    return request.messages[-1]["content"]
