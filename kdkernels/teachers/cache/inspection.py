"""Describe a cache, and find damaged files in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .manifest import MANIFEST, CacheError, Head, Manifest, Shard

__all__ = ["damage", "described"]


def described(folder: Path) -> dict[str, Any]:
    """Return the facts in a cache's manifest by name, and the size of its files.

    Raises:
        CacheError: the manifest is missing or damaged.
    """
    manifest = Manifest.read(folder)
    identity, files = manifest.identity, _files(manifest)
    about = {
        "kind": identity.kind, "teacher": identity.teacher, "revision": identity.revision, "teacher_dtype": identity.teacher_dtype,
        "tokenizer": identity.tokenizer, "chat_template": identity.chat_template, "vocab_size": identity.vocab_size, "k": identity.k,
        "temperature": identity.temperature, "dtype": identity.dtype, "seed": identity.seed, "max_new_tokens": identity.max_new_tokens,
        "examples": manifest.rows, "tokens": manifest.tokens, "shards": len(manifest.shards),
        "bytes": sum(path.stat().st_size for file in files if (path := folder / file.file).is_file()),
        "date": manifest.date, **manifest.options, "complete": manifest.complete,
    }  # fmt: skip
    return {name: value for name, value in about.items() if value not in (None, "")}


def damage(folder: Path) -> list[str]:
    """Return a line for each missing or damaged file, and one if the cache is unfinished. Reads every byte.

    Raises:
        CacheError: the folder has no manifest.
    """
    if not (folder / MANIFEST).is_file():
        raise CacheError(f"{folder} holds no {MANIFEST}: it is not a cache")
    try:
        manifest = Manifest.read(folder)
    except CacheError as error:
        return [str(error)]
    flaws = [reason for file in _files(manifest) if (reason := _flaw(folder, file)) is not None]
    if not manifest.complete:
        done = sum(shard.rows for shard in manifest.shards)
        flaws.append(f"{folder} is unfinished: {done:,} of {manifest.rows:,} examples. Run the command that began it again")
    return flaws


def _flaw(folder: Path, file: Shard | Head) -> str | None:
    try:
        Manifest.verify(folder, file)
    except CacheError as error:
        return str(error)
    return None


def _files(manifest: Manifest) -> list[Shard | Head]:
    return [*manifest.shards, *([] if manifest.head is None else [manifest.head])]
