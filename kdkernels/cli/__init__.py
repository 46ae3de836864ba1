"""The ``kdkernels`` command: one file or folder for each subcommand. ``root.py`` puts them together."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import the command when ``app`` or ``main`` is asked for, so that a subcommand's own module can be imported alone."""
    if name in ("app", "main", "environment"):
        from . import root

        return getattr(root, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
