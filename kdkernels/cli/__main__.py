"""``python -m kdkernels.cli``, for launchers that start a module."""

from .root import main

main()
