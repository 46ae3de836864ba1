"""What every command does with its terminal: a console, errors in one line, and bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import typer

from .errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Bar", "console", "fail", "failing", "progress", "shown"]


def console() -> Console:
    """Where a command writes: as wide as the terminal, or wide enough for a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def shown(text: str) -> str:
    """``text`` from data or a server as a terminal can show it: what does not print, and could move the cursor, is escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def fail(message: str) -> NoReturn:
    """Ends the command with one line and status 2."""
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(2)


@contextmanager
def failing() -> Iterator[None]:
    """What a user can put right ends the command with one line instead of a traceback, and Ctrl-C with status 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. The same command goes on from here.", err=True)
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:  # of data, options, models and files
        fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        fail(f"this command needs {error.name}: pip install 'kdkernels[train]'")
    except UserError as error:
        fail(str(error))


class Bar(NamedTuple):
    """A bar of progress."""

    start: Callable[[int], None]
    """Shows the bar, of so many steps in all."""
    advance: Callable[[int], None]
    note: Callable[[str], None]
    """Says what the bar waits for; "" when it goes on. Where there is no terminal, each note is a line, once."""


@contextmanager
def progress(where: Console, unit: str) -> Iterator[Bar]:
    """A bar that appears when it starts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    waiting = TextColumn("{task.fields[waiting]}", style="bold", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit, markup=False), TimeElapsedColumn(), TimeRemainingColumn(), waiting)
    bar = Progress(*columns, console=where)
    task = bar.add_task("", start=False, total=None, waiting="")
    said = {""}

    def start(total: int) -> None:
        bar.update(task, total=total)
        bar.start_task(task)
        bar.start()

    def note(text: str) -> None:
        bar.update(task, waiting=text)
        if not where.is_terminal and text not in said:
            said.add(text)
            where.print(text, markup=False)

    try:
        yield Bar(start, lambda count: bar.advance(task, count), note)
    finally:
        bar.update(task, waiting="")
        bar.stop()
