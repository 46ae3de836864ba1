"""What every command does with its terminal: a console, errors in one line, and bars."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import typer

from .errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "fail", "failing", "progress"]


def console() -> Console:
    """Where a command writes: as wide as the terminal, or wide enough for a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


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


@contextmanager
def progress(where: Console, unit: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """``start(total)`` and ``advance(count)`` of a bar that appears when it starts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=where)
    task = bar.add_task("", start=False, total=None)

    def start(total: int) -> None:
        bar.update(task, total=total)
        bar.start_task(task)
        bar.start()

    try:
        yield start, lambda count: bar.advance(task, count)
    finally:
        bar.stop()
