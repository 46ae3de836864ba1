"""The ``kdkernels`` command. Subcommands import torch and other large packages only when they run, so that ``--help`` is fast."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated

import typer

from .. import __version__
from ..support.terminal import Commands, shown
from . import bench, env, evaluate, init, merge, recipes, teachers
from .demo import command as demo
from .train import command as training

__all__ = ["app", "main"]

app = typer.Typer(
    name="kdkernels",
    cls=Commands,
    help="Fused knowledge-distillation losses at vocabulary scale, without [N, V] logits.",
    epilog="Start with `kdkernels demo --quick`, which shows in seconds that everything runs.",
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kdkernels {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


env.register(app)
demo.register(app)
bench.register(app)
teachers.register(app)
app.add_typer(recipes.app)
merge.register(app)
evaluate.register(app)
init.register(app)
app.command(epilog=training.EPILOG, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(training.train)


def main() -> None:
    """Entry point of the ``kdkernels`` script."""
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {shown(' '.join(str(message).split()))}\n"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may contain characters outside the terminal's encoding
    app()
