"""Single-writer files that stay whole if the process is killed, for your own scripts. ``support/files.py`` defines them."""

from .support.files import *  # noqa: F403
from .support.files import __all__ as __all__
