"""Terminal output of all commands: a console for plain text, errors in one line, and progress bars."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup

from .errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Bar", "Commands", "console", "fail", "failing", "progress", "say", "shown"]

LIBRARIES = ("huggingface_hub", "jinja2", "pyarrow", "safetensors", "tokenizers", "yaml")
"""Packages whose exceptions are about the user's files: templates, tables, weights, configs."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_WORDS = ("No space left", "os error 28", "File too large", "os error 27", "PytorchStreamWriter", "iostream error")
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_USAGE: Any = typer.BadParameter.__base__  # UsageError, of click or of typer's own copy of it


def console(soft_wrap: bool = False) -> Console:
    """Return the console of a command, as wide as the terminal, or 140 columns for a file. Text is never read as markup."""
    return _console_class()(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False, emoji=False, soft_wrap=soft_wrap)


@functools.cache
def _console_class() -> type[Console]:
    from rich.console import Console
    from rich.text import Text

    class Plain(Console):
        """A console that escapes control characters."""

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(_lines_shown(text), **options)

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    return Plain


def shown(text: str) -> str:
    """Escape the characters of ``text`` (from data or a server) that are not printable, and could control the terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _lines_shown(text: str) -> str:
    return "\n".join(map(shown, text.split("\n")))


def say(text: str) -> None:
    """Print a line of plain text."""
    typer.echo(_lines_shown(text))


def fail(message: str) -> NoReturn:
    """End the command with one line and status 2."""
    _release_output()
    with suppress(OSError):  # its reader has gone, or the disk is full
        typer.echo(f"Error: {shown(' '.join(message.split()))}", err=True)
    raise typer.Exit(2)


def _release_output() -> None:
    """Flush standard output. If its reader has gone or the disk is full, discard the rest, so that Python does not fail at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


@contextmanager
def failing() -> Iterator[None]:
    """End the command with one line instead of a traceback for errors that the user can fix, and with status 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nInterrupted. Run the same command again to continue.", err=True)
        raise typer.Exit(130) from None
    except ModuleNotFoundError as error:
        fail(f"this command needs {error.name}: pip install 'kdkernels[train]'")
    except Exception as error:
        message = _explained(error)
        if message is None:
            raise
        fail(message)


def _explained(error: Exception) -> str | None:
    """Return what is wrong and what to do, for an error that the user can fix; None for a bug in kdkernels."""
    text = str(error) or type(error).__name__
    if isinstance(error, BrokenPipeError):
        return "the output was closed before the command ended (broken pipe): let its reader read all of it, or write to a file"
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        number, text = error.errno, f"{place}{error.strerror or text}"
    else:
        # Libraries in C++ and Rust report a failed write only in the text.
        number = errno.ENOSPC if any(word in text for word in FULL_WORDS) else 0
    if number in FULL:
        return f"{text}: the disk is full, or a limit is reached. Make room, and run the same command again"
    if number in DENIED:
        return f"{text}. Change the permissions, or give another place"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text}. Take a smaller batch, a shorter length or another device"
    if isinstance(error, RecursionError):
        return "a value is nested too deeply: take brackets or braces out of the data or the options"
    known = isinstance(error, (ValueError, OSError, ArithmeticError, ImportError, UserError))
    return text if known or type(error).__module__.partition(".")[0] in LIBRARIES else None


class Commands(TyperGroup):
    """A group of commands. Errors that the user can fix, such as wrong options, end a command with one line."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _usage():
            return super().make_context(*args, **options)

    def invoke(self, context: Any) -> Any:
        with failing(), _usage():
            result = super().invoke(context)
            sys.stdout.flush()  # report a full disk here, not at Python's end
            return result


@contextmanager
def _usage() -> Iterator[None]:
    try:
        yield
    except _USAGE as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise
        path = error.ctx.command_path.strip() if error.ctx is not None else "kdkernels"
        fail(f"{error.format_message().rstrip('.')}. See `{path} --help`")


class Bar(NamedTuple):
    """A bar of progress."""

    start: Callable[[int], None]
    """Shows the bar, for this total number of steps."""
    advance: Callable[[int], None]
    note: Callable[[str], None]
    """Shows the reason for waiting; "" removes it. Without a terminal, each note is printed once as a line."""


@contextmanager
def progress(where: Console, unit: str) -> Iterator[Bar]:
    """Yield a progress bar, which appears when it starts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    waiting = TextColumn("{task.fields[waiting]}", style="bold", markup=False)
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(shown(unit), markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        waiting,
    )
    bar = Progress(*columns, console=where)
    task = bar.add_task("", start=False, total=None, waiting="")
    printed = {""}

    def start(total: int) -> None:
        bar.update(task, total=total)
        bar.start_task(task)
        bar.start()

    def note(text: str) -> None:
        bar.update(task, waiting=shown(text))
        if not where.is_terminal and text not in printed:
            printed.add(text)
            where.print(text, markup=False)

    try:
        yield Bar(start, lambda count: bar.advance(task, count), note)
    finally:
        bar.update(task, waiting="")
        bar.stop()
