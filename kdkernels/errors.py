"""The errors that a script catches; ``support/errors.py`` defines them."""

from .support.errors import UserError, listed

__all__ = ["UserError", "listed"]
