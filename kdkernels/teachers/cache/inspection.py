"""Facts about a cache for its owner: what it holds, and whether every byte is as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .manifest import MANIFEST, CacheError, Head, Manifest, Shard

__all__ = ["damage", "described"]


def described(folder: Path) -> dict[str, Any]:
    """The manifest's facts by name. Files are looked at for their size only.

    Raises:
        CacheError: no manifest, or a damaged one.
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
    """A line for each file that is missing or damaged, and for a cache that is unfinished. Reads every byte.

    Raises:
        CacheError: no cache is there.
    """
    if not (folder / MANIFEST).is_file():
        raise CacheError(f"{folder} holds no {MANIFEST}: it is not a cache")
    try:
        manifest = Manifest.read(folder)
    except CacheError as error:
        return [str(error)]
    found = [reason for file in _files(manifest) if (reason := _flaw(folder, file)) is not None]
    if not manifest.complete:
        done = sum(shard.rows for shard in manifest.shards)
        found.append(f"{folder} is unfinished: {done:,} of {manifest.rows:,} examples. Run the command that began it again")
    return found


def _flaw(folder: Path, file: Shard | Head) -> str | None:
    try:
        Manifest.verify(folder, file)
    except CacheError as error:
        return str(error)
    return None


def _files(manifest: Manifest) -> list[Shard | Head]:
    return [*manifest.shards, *([] if manifest.head is None else [manifest.head])]
