"""Errors that a user can put right."""

__all__ = ["UserError"]


class UserError(RuntimeError):
    """Of a file, a cache, or a server: a command ends with it in one line, without a traceback."""
