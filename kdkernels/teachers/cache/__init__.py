"""Caches of a teacher's outputs: a folder with ``manifest.json`` and shards, written once, read in any order."""

from .manifest import CacheError, Identity, Kind, Manifest
from .reader import CachedTeacher, open_cache, read_text
from .writer import write_cache

__all__ = ["CacheError", "CachedTeacher", "Identity", "Kind", "Manifest", "open_cache", "read_text", "write_cache"]
