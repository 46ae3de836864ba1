"""Progress bar and usage of a text model, for all commands that query one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ..support.terminal import progress, shown
from .text import Counted, Reply, Request, Usage

__all__ = ["Watched", "print_usage", "watching"]


@contextmanager
def watching(model: Counted, console: Console, unit: str, total: int) -> Iterator[None]:
    """Show a bar of ``total`` replies while the model runs, and the reason for waiting, such as the address of an unreachable server."""
    replies = model.usage.replies
    with progress(console, unit) as bar:

        def report(usage: Usage) -> None:
            nonlocal replies
            bar.advance(usage.replies - replies)
            bar.note(f"waiting: {usage.waiting}" if usage.waiting else "")
            replies = usage.replies

        bar.start(total)
        model.report = report
        try:
            yield
        finally:
            model.report = None


class Watched:
    """A ``TextModel`` that shows a progress bar. ``unit`` is the bar's label; default: replies and the name of their log."""

    def __init__(self, model: Counted, console: Console, unit: str = "") -> None:
        self.model, self.console, self.unit = model, console, unit

    @property
    def usage(self) -> Usage:
        return self.model.usage

    def complete(self, requests: Sequence[Request], log: Path) -> list[Reply]:
        """See ``TextModel``."""
        with watching(self.model, self.console, self.unit or f"replies in {log.name}", len(requests)):
            return self.model.complete(requests, log)


def print_usage(console: Console, usage: Usage, name: str = "") -> None:
    """Print one line of totals, which begins with the model's ``name``, and one about replies that the server interrupted, if any."""
    console.print(
        (f"{name}: " if name else "")
        + f"{usage.replies:,} replies ({usage.from_log:,} from the log), {usage.retries:,} retries, "
        + (f"{usage.refused:,} refused, " if usage.refused else "")
        + (f"{usage.reasoning:,} with reasoning, " if usage.reasoning else "")
        + f"{usage.prompt_tokens:,} prompt tokens, {usage.completion_tokens:,} completion tokens"
        + (f", cost {usage.cost:,.4f}" if usage.cost else "")
    )
    if usage.interrupted:
        reasons = ", ".join(f"{shown(reason)[:60]}: {count:,}" for reason, count in usage.interrupted.most_common())
        console.print(f"{usage.interrupted.total():,} replies were broken off by the server and asked again ({reasons})", markup=False)
