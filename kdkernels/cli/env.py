"""``kdkernels env``: versions, devices and backends, for bug reports."""

from __future__ import annotations

import json
from typing import Annotated

import typer

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command(epilog="Example: `kdkernels env --json > environment.json`")(env)


def env(as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False) -> None:
    """Show versions, devices, the backends that can run here, and why others cannot.

    Paste the output into a bug report. It does not contain user names, host names or paths.
    """
    from .environment import VARIABLES, environment

    report = environment()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    backends: dict[str, dict[str, str]] = report.pop("backends")
    sections = {**report, **{f"backends on {device_type}": status for device_type, status in backends.items()}}
    for title, rows in sections.items():
        typer.echo(title)
        width = max(map(len, rows)) + 2
        for name, value in rows.items():
            typer.echo(f"  {name:<{width}}{value}")
            if name in VARIABLES:
                typer.echo(f"  {'':<{width}}({VARIABLES[name]})")
