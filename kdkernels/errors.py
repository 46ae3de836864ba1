"""Errors for scripts to catch. ``support/errors.py`` defines them."""

from .support.errors import UserError, listed

__all__ = ["UserError", "listed"]
