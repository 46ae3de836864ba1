"""A cache that is added to: new shards for new examples, while every older shard stays as it is."""

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
    """The manifest of a whole cache that can be added to.

    Raises:
        CacheError: no cache, an unfinished or damaged one, one of text, or one of a server.
    """
    manifest = Manifest.read(out)
    if manifest.identity.kind == "text":
        raise CacheError(f"{out} holds text: make another cache of the new rows, and train on both (--data several times)")
    if not manifest.identity.teacher_dtype:
        raise CacheError(f"{out} holds what a server gave: make another cache; only those of a model that runs here are added to")
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
    """Add the examples that the cache in ``out`` lacks. If this is interrupted, the folder holds a whole cache of the shards so far.

    Args:
        identity: identity of the teacher that runs; it must equal that of the cache.
        batch_size: examples at a time. Default: as the cache was begun.
        started: called with the plan of the missing examples.

    Raises:
        CacheError: another teacher, tokenizer or kind; a cache that is not whole or in use; examples of another date.
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
    """The fields that must be those of the cache. The name of the teacher does not count: its revision is its content."""
    return {name: value for name, value in dataclasses.asdict(identity).items() if name != "teacher"}


def _check_date(manifest: Manifest, examples: Sequence[Example]) -> None:
    dates = {example.date for example in examples} - {None, manifest.date}
    if dates:
        raise CacheError(
            f"the chat template writes the date: the cache has {manifest.date}, these examples {', '.join(sorted(map(str, dates)))}. Load "
            f"them with load_examples(..., date={manifest.date!r})"
        )


def _with(manifest: Manifest, shard: Shard, keys: Sequence[bytes]) -> Manifest:
    return dataclasses.replace(
        manifest, shards=(*manifest.shards, shard), rows=manifest.rows + shard.rows, tokens=manifest.tokens + shard.tokens,
        examples=digest([manifest.examples, *(key.hex() for key in keys)]),
    )  # fmt: skip
