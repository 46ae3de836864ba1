"""Patches that make other trainers use the kdkernels loss, one module per framework.

Every ``patch()`` changes only the loss, can be undone, and raises for framework versions that it was not tested with.
"""

from .patches import Patch, UnsupportedVersion

__all__ = ["Patch", "UnsupportedVersion"]
