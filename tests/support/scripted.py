"""A black-box model that answers by rule, keeps a log as the contract says, and can be made to die in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kdkernels.teachers.text import Reply, Request, Usage

__all__ = ["Killed", "Scripted"]


class Killed(BaseException):
    """Stands for a kill: nothing that handles errors may catch it."""


class Scripted:
    """``answer(request)`` gives the text, or a Reply; ``asked`` collects what was really asked. Dies after ``die_after`` answers."""

    def __init__(self, answer: Callable[[Request], str | Reply], die_after: int | None = None) -> None:
        self.answer, self.die_after = answer, die_after
        self.asked: list[Request] = []
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
                if self.die_after is not None and len(self.asked) >= self.die_after:
                    raise Killed
                self.asked.append(request)
                found = self.answer(request)
                reply = found if isinstance(found, Reply) else Reply(request.key, found)
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
