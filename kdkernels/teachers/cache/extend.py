"""Add examples to a cache, in new shards. Existing shards do not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...data.collator import Collator
from ...data.example import Example
from ...support.files import FileError, digest, write_whole
from ..source import TeacherSource
from . import shards
from .manifest import CacheError, Identity, Manifest, Shard
from .reader import CachedTeacher, open_cache
from .writer import Plan, Producer, Report, bytes_per_token, keys_and_counts, opened

__all__ = ["extend_cache", "extendable"]


def extendable(out: Path) -> Manifest:
    """Return the manifest of a complete cache to which examples can be added.

    Raises:
        CacheError: the folder has no cache, or the cache is unfinished, damaged, of text, or from a server.
    """
    manifest = Manifest.read(out)
    if manifest.identity.kind == "text":
        raise CacheError(f"{out} holds text: make another cache of the new rows, and train on both (--data several times)")
    if not manifest.identity.teacher_dtype:
        raise CacheError(f"{out} was made from a server's replies: make another cache; only a cache of a local model can be extended")
    open_cache(out)
    return manifest


def extend_cache(
    teacher: TeacherSource,
    examples: Sequence[Example],
    out: Path,
    identity: Identity,
    *,
    hidden_size: int | None = None,
    batch_size: int | None = None,
    collator: Collator | None = None,
    device: torch.device | str = "cpu",
    started: Callable[[Plan], object] | None = None,
    report: Report | None = None,
) -> Manifest:
    """Add the examples that the cache in ``out`` lacks. If it is interrupted, the cache is complete with the shards written so far.

    Args:
        identity: identity of the running teacher; it must equal that of the cache.
        batch_size: examples per batch. Default: the cache's.
        started: called with the plan of the missing examples.

    Raises:
        CacheError: teacher, tokenizer or kind differ, the cache is incomplete or in use, or the examples have another date.
    """
    try:
        with opened(out) as output:
            extendable(out)
            manifest = Manifest.read(out, **_compared(identity))
            cache = CachedTeacher(out, manifest, "bucket")
            _check_date(manifest, examples)
            missing = [example for example in examples if example.key(cache.salt) not in cache]
            keys, counts = keys_and_counts(missing, manifest.identity)
            size = batch_size or manifest.batch_size
            plan = Plan.of(keys, counts, bytes_per_token(manifest.identity, hidden_size), manifest.shard_bytes, size)
            if started is not None:
                started(plan)
            produce = Producer(teacher, missing, plan, manifest.identity, size, collator, device, report)
            with torch.inference_mode():
                for start, stop in plan.bounds:
                    path = output.claim(f"{len(manifest.shards):06d}.{shards.suffix(manifest.identity.kind)}")
                    write_whole(path, lambda temporary, a=start, b=stop: produce(temporary, a, b))  # type: ignore[misc]
                    made = Shard.of(path, stop - start, sum(plan.counts[start:stop]))
                    manifest = _with(manifest, made, plan.keys[start:stop])
                    manifest.write(out)
    except FileError as error:
        raise CacheError(str(error)) from None
    return manifest


def _compared(identity: Identity) -> dict[str, Any]:
    """Return the fields that must equal those of the cache. The teacher's name is not compared: ``revision`` identifies its weights."""
    return {name: value for name, value in dataclasses.asdict(identity).items() if name != "teacher"}


def _check_date(manifest: Manifest, examples: Sequence[Example]) -> None:
    dates = {example.date for example in examples} - {None, manifest.date}
    if dates:
        raise CacheError(
            f"the chat template writes the date: {manifest.date} in the cache, {', '.join(sorted(map(str, dates)))} in these examples. "
            f"Load them with load_examples(..., date={manifest.date!r})"
        )


def _with(manifest: Manifest, shard: Shard, keys: Sequence[bytes]) -> Manifest:
    return dataclasses.replace(
        manifest, shards=(*manifest.shards, shard), rows=manifest.rows + shard.rows, tokens=manifest.tokens + shard.tokens,
        examples=digest([manifest.examples, *(key.hex() for key in keys)]),
    )  # fmt: skip
