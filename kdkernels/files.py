"""Files with one writer that a kill leaves whole, for scripts beside the commands; ``support/files.py`` defines them."""

from .support.files import *  # noqa: F403
from .support.files import __all__ as __all__
