"""How far a model of text is, and what it has been asked for: the same for every command that asks one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ..terminal import progress
from .text import Counted, Reply, Request, Usage

__all__ = ["Watched", "print_usage"]


class Watched:
    """A ``TextModel`` that shows a bar while it is asked, of ``unit`` (default: replies, and the name of their log)."""

    def __init__(self, model: Counted, console: Console, unit: str = "") -> None:
        self.model, self.console, self.unit = model, console, unit

    @property
    def usage(self) -> Usage:
        return self.model.usage

    def complete(self, requests: Sequence[Request], log: Path) -> list[Reply]:
        """See ``TextModel``."""
        with progress(self.console, self.unit or f"replies in {log.name}") as (start, advance):
            start(len(requests))
            self.model.report = lambda usage: advance(1)
            try:
                return self.model.complete(requests, log)
            finally:
                self.model.report = None


def print_usage(console: Console, usage: Usage, name: str = "") -> None:
    """Totals, in one line that begins with the model's ``name``."""
    console.print(
        (f"{name}: " if name else "")
        + f"{usage.replies:,} replies ({usage.from_log:,} from the log), {usage.retries:,} retries, "
        + (f"{usage.refused:,} refused, " if usage.refused else "")
        + f"{usage.prompt_tokens:,} prompt tokens, {usage.completion_tokens:,} completion tokens"
        + (f", cost {usage.cost:,.4f}" if usage.cost else "")
    )
