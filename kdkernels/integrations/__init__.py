"""Patches that give other trainers this loss, one module per framework.

Every ``patch()`` changes the loss alone, can be undone, and refuses a version of the framework that it was not checked with.
"""

from .patches import Patch, UnsupportedVersion

__all__ = ["Patch", "UnsupportedVersion"]
