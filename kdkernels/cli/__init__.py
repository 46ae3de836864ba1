"""The ``kdkernels`` command: one file or folder per subcommand. ``root.py`` assembles them."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import the command at the first use of ``app`` or ``main``, so that a subcommand's module can be imported alone."""
    if name in ("app", "main"):
        from . import root

        return getattr(root, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
