"""Write a cache. Shards are fixed sets of examples. A shard is listed in the manifest once it is complete, and is then not written again.

An interrupted and continued run gives the same bytes: batches never cross a shard, draws are seeded by the example, and no file contains
a time. (Sums on a GPU may differ in the last bit from run to run.)
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import primitives
from ...data.collator import Collator, view_of
from ...data.example import Example
from ...sides import LMHead, Side, TopK
from ...support.files import MARKER, FileError, Output, digest, write_whole
from ..source import TeacherSource
from . import shards
from .checks import check_finite, check_logprobs, place
from .manifest import FORMAT, HEAD, MANIFEST, VERSION, CacheError, Head, Identity, Manifest, Shard
from .shards import Array

__all__ = [
    "DEFAULT_SHARD_BYTES", "Begun", "Plan", "Producer", "Report", "bytes_per_token", "check_folder", "keys_and_counts", "opened",
    "write_cache", "write_shards",
]  # fmt: skip

DEFAULT_SHARD_BYTES = 128 << 20
ROUNDING = 1e-6
"""Largest rounding error of a log-sum in float32. Rows with a larger sum are shifted."""
Report = Callable[[int], object]
"""Called with the number of tokens of each finished batch."""


@dataclass(frozen=True)
class Begun:
    """The settings that determine keys and shards: those of the cache in a folder, which a resumed run must keep, or of a new cache."""

    identity: Identity
    shard_bytes: int
    batch_size: int
    date: str | None
    version: int

    @classmethod
    def of(cls, out: Path, identity: Identity, shard_bytes: int, batch_size: int, date: str | None = None) -> Begun:
        """Return the settings of the cache in ``out``; the arguments without one.

        Raises:
            CacheError: ``out`` holds a cache of another teacher, tokenizer or kind; the message gives the difference.
        """
        if not (out / MANIFEST).is_file():
            return cls(identity, shard_bytes, batch_size, date, VERSION)
        manifest = Manifest.read(out, **dataclasses.asdict(identity))
        return cls(manifest.identity, manifest.shard_bytes, manifest.batch_size, manifest.date, manifest.version)

    @classmethod
    def for_examples(cls, out: Path, identity: Identity, examples: Sequence[Example], shard_bytes: int, batch_size: int) -> Begun:
        """Return the same as ``of``, with the date that the chat template wrote into the examples.

        Raises:
            CacheError: the examples have several dates, or another date than the cache in ``out``.
        """
        dates = sorted({example.date for example in examples if example.date is not None})
        if len(dates) > 1:
            raise CacheError(f"the chat template writes the date, and the examples are for {', '.join(dates)}: load all with one date")
        begun = cls.of(out, identity, shard_bytes, batch_size, *dates)
        if dates and begun.date != dates[0]:
            raise CacheError(
                f"the chat template writes the date: {out} was begun for {begun.date}, these examples are for {dates[0]}. Load them with "
                f"load_examples(..., date={begun.date!r})"
            )
        return begun


@dataclass(frozen=True)
class Plan:
    """The assignment of examples to shards."""

    keys: list[bytes]
    counts: list[int]
    """Number of tokens of each example."""
    source: list[int]
    """Index of each example in the data."""
    bounds: list[tuple[int, int]]
    """First and last example of each shard."""

    @classmethod
    def of(cls, keys: Sequence[bytes], counts: Sequence[int], token_bytes: int, shard_bytes: int, batch_size: int = 1) -> Plan:
        """Plan the shards. Examples with a repeated key or without tokens are left out.

        A shard ends with the batch that fills it, so that batches are those of a training that takes the examples in order.
        """
        seen: set[bytes] = set()
        source = []
        for i, (key, count) in enumerate(zip(keys, counts, strict=True)):
            if count and key not in seen:
                seen.add(key)
                source.append(i)
        bounds, start, size = [], 0, 0
        for stop, i in enumerate(source, 1):
            size += counts[i] * token_bytes
            if (size >= shard_bytes and stop % batch_size == 0) or stop == len(source):
                bounds.append((start, stop))
                start, size = stop, 0
        return cls([keys[i] for i in source], [counts[i] for i in source], source, bounds)

    @property
    def tokens(self) -> int:
        return sum(self.counts)


def bytes_per_token(identity: Identity, hidden_size: int | None = None) -> int:
    """Return the bytes per token before compression, which saves about a quarter for ``topk``. For ``text``, an estimate of its UTF-8."""
    if identity.kind == "hidden":
        if hidden_size is None:
            raise ValueError("hidden_size is missing: the size of a hidden cache depends on it")
        return hidden_size * torch.empty(0, dtype=getattr(torch, identity.dtype or "bfloat16")).element_size()
    if identity.kind == "text":
        return 4
    columns = shards.columns_of(identity.kind, identity.k or 0, identity.dtype)
    return sum(np.dtype(dtype).itemsize * width for dtype, width in columns.values())


def write_cache(
    teacher: TeacherSource,
    examples: Sequence[Example],
    out: Path,
    identity: Identity,
    *,
    hidden_size: int | None = None,
    batch_size: int = 8,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    collator: Collator | None = None,
    options: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    started: Callable[[Plan], object] | None = None,
    report: Report | None = None,
) -> Manifest:
    """Run ``teacher`` over ``examples`` in order and save its targets in the folder ``out``. Continues an interrupted cache.

    Args:
        teacher: source of an ``LMHead`` or logits; ``kind="hidden"`` needs an ``LMHead``.
        identity: kind of targets and teacher.
        hidden_size: D, for ``kind="hidden"``.
        batch_size: examples per batch. An interrupted cache continues with any value; its shards keep their examples.
        collator: creates the batches. Default: padding to a multiple of 16.
        shard_bytes: size of a new cache's shards, before compression. A killed process loses at most one shard.
        options: options of ``load_examples``, such as ``max_length``. If a training's rows are missing, they explain the difference.
        device: device of the batches.
        started: called with the plan before the first example.

    Raises:
        CacheError: ``out`` is in use or holds other files or another cache, or the teacher's values are NaN or not a distribution (the
            message names the row).
    """
    begun = Begun.for_examples(out, identity, examples, shard_bytes, batch_size)
    identity = begun.identity
    keys, counts = keys_and_counts(examples, identity)
    plan = Plan.of(keys, counts, bytes_per_token(identity, hidden_size), begun.shard_bytes, begun.batch_size)
    if begun.batch_size != batch_size and not (identity.kind == "hidden" and torch.device(device).type == "cpu"):
        warnings.warn(
            f"the cache was begun with --batch-size {begun.batch_size}: values computed with {batch_size} may differ in the last bit",
            stacklevel=2,
        )
    producer = Producer(teacher, examples, plan, identity, batch_size, collator, device, report)
    with torch.inference_mode():
        return write_shards(
            out, begun, plan, producer, started, report, producer.head if identity.kind == "hidden" else None, options
        )  # fmt: skip


def keys_and_counts(examples: Sequence[Example], identity: Identity) -> tuple[list[bytes], list[int]]:
    """Return the key of each example in a cache of this identity, and its number of scored tokens."""
    salt = identity.hash()
    return [bytes.fromhex(example.key(salt)) for example in examples], [len(example.teacher_scored) for example in examples]


class Producer:
    """Runs the teacher over the examples of a plan, and writes its shards.

    Args:
        batch_size: examples per batch.
        collator: creates the batches. Default: padding to a multiple of 16.
        device: device of the batches.
        report: called with the number of tokens of each batch.
    """

    def __init__(
        self,
        teacher: TeacherSource,
        examples: Sequence[Example],
        plan: Plan,
        identity: Identity,
        batch_size: int,
        collator: Collator | None = None,
        device: torch.device | str = "cpu",
        report: Report | None = None,
    ) -> None:
        self._teacher, self._examples, self._plan, self._identity = teacher, examples, plan, identity
        self._batch_size, self._device, self._report = batch_size, device, report
        self._collate = Collator(multiple=16) if collator is None else collator
        self._head: LMHead | None = None

    def __call__(self, path: Path, start: int, stop: int) -> None:
        """Write the shard of examples ``[start, stop)`` of the plan."""
        plan, parts, hidden = self._plan, [], []
        for first in range(start, stop, self._batch_size):
            chosen = range(first, min(first + self._batch_size, stop))
            batch = [self._examples[plan.source[i]] for i in chosen]
            side = _side(self._teacher, self._collate([(example,) for example in batch]), self._device)
            if self._identity.kind == "hidden":
                hidden.append(self._states(side, batch))
            elif self._identity.kind == "topk":
                parts.append(_topk(side, self._identity, lambda row, batch=batch: place(batch, row)))  # type: ignore[misc]
            else:
                ends = np.cumsum([plan.counts[i] for i in chosen]).tolist()
                bounds = zip([0, *ends], ends, chosen, strict=False)
                parts += [_draws(_rows(side, a, b), self._identity, plan.keys[i], place(batch, a)) for a, b, i in bounds]
            if self._report is not None:
                self._report(sum(plan.counts[i] for i in chosen))
        if self._identity.kind == "hidden":
            shards.write_hidden(path, plan.keys[start:stop], plan.counts[start:stop], torch.cat(hidden))
        else:
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            shards.write_parquet(path, plan.keys[start:stop], plan.counts[start:stop], columns)

    def _states(self, side: Side, batch: list[Example]) -> Tensor:
        if not isinstance(side, LMHead):
            raise CacheError("--kind hidden needs a teacher whose head is a plain linear layer; this teacher gives logits: use --kind topk")
        self._head = self._head or side
        states = side.hidden.detach()
        wrong = (~states.isfinite().all(-1)).nonzero()
        check_finite(not len(wrong), place(batch, int(wrong[0])) if len(wrong) else "")
        return states.to("cpu", getattr(torch, self._identity.dtype or "bfloat16"))

    def head(self, folder: Path) -> Head:
        """Write the teacher's head, after a shard has been written."""
        assert self._head is not None
        return _write_head(folder, self._head)


def write_shards(
    out: Path,
    begun: Begun,
    plan: Plan,
    produce: Callable[[Path, int, int], object],
    started: Callable[[Plan], object] | None = None,
    report: Report | None = None,
    head: Callable[[Path], Head] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write the missing shards, and list each in the manifest, while the folder is locked. Used for all kinds.

    Args:
        produce: writes the shard of examples ``[start, stop)`` of the plan to a path.
        head: writes the head after the first shard.
    """
    if not plan.source:
        raise CacheError("there is nothing to keep: no example has a scored token")
    fresh = Manifest(
        identity=begun.identity, rows=len(plan.source), tokens=plan.tokens, examples=digest([key.hex() for key in plan.keys]),
        shard_bytes=begun.shard_bytes, batch_size=begun.batch_size, date=begun.date, options=dict(options or {}), version=begun.version,
    )  # fmt: skip
    try:
        with opened(out) as output:
            files = [f"{number:06d}.{shards.suffix(begun.identity.kind)}" for number in range(len(plan.bounds))]
            output.check([*files, *([HEAD] if head else [])])
            manifest = _resumed(output, fresh)
            if started is not None:
                started(plan)
            if manifest.head is not None and not _intact(out, manifest.head):
                manifest = dataclasses.replace(manifest, head=None)  # written again with the first shard
            for number, (start, stop) in enumerate(plan.bounds):
                headless = head is not None and manifest.head is None
                if number < len(manifest.shards) and not headless and _intact(out, manifest.shards[number]):
                    if report is not None:
                        report(sum(plan.counts[start:stop]))
                    continue
                path = output.claim(files[number])
                write_whole(path, lambda temporary, a=start, b=stop: produce(temporary, a, b))  # type: ignore[misc]
                shard = Shard.of(path, stop - start, sum(plan.counts[start:stop]))
                if headless:
                    output.claim(HEAD)
                listed = (*manifest.shards[:number], shard, *manifest.shards[number + 1 :])
                manifest = dataclasses.replace(manifest, shards=listed, head=head(out) if head and headless else manifest.head)
                manifest.write(out)
            if not manifest.complete:
                manifest = dataclasses.replace(manifest, complete=True)
                manifest.write(out)
    except FileError as error:
        raise CacheError(str(error)) from None
    return manifest


def check_folder(out: Path) -> None:
    """Check that a cache may be written to ``out``. The folder does not change.

    Raises:
        CacheError: the folder is in use, or has other files.
    """
    try:
        with opened(out):
            pass
    except FileError as error:
        raise CacheError(str(error)) from None


@contextmanager
def opened(out: Path) -> Iterator[Output]:
    """Lock the folder of a cache after checking that it is empty or has a cache.

    Raises:
        FileError, CacheError: the folder is in use, or has other files.
    """
    with Output(out, "cache", adopt=lambda: _unmarked(out)) as output:
        _check_others(output)
        yield output


def _unmarked(out: Path) -> list[str]:
    """Return the files that the manifest of a cache without a marker lists."""
    try:
        value = json.loads((out / MANIFEST).read_bytes())
        if value["format"] != FORMAT:
            return []
        return [MANIFEST, HEAD, *(Path(shard["file"]).name for shard in value["shards"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _check_others(output: Output) -> None:
    """Check that the folder is empty, or is a cache."""
    others = sorted(path.name for path in output.path.iterdir() if path.name != MARKER)
    if others and MANIFEST not in others:
        raise CacheError(f"{output.path} is not empty and holds no cache, but {others[0]}: give a new folder")
    output.check([MANIFEST])


def _resumed(output: Output, fresh: Manifest) -> Manifest:
    """Return the manifest of the folder after checking that it is of the same cache. Without one, write and return ``fresh``."""
    out = output.path
    if not (out / MANIFEST).exists():
        output.claim(MANIFEST)
        fresh.write(out)
        return fresh
    manifest = Manifest.read(out, **dataclasses.asdict(fresh.identity))
    if manifest.examples != fresh.examples:
        raise CacheError(
            f"{out} holds a cache of other data: {manifest.rows:,} examples with {manifest.tokens:,} tokens, and this data has "
            f"{fresh.rows:,} with {fresh.tokens:,}. Use the cache's --data, --max-length and --overlong, or a new folder as --out"
        )
    return manifest


def _intact(out: Path, shard: Shard | Head) -> bool:
    try:
        Manifest.verify(out, shard)
    except CacheError:
        return False
    return True


def _side(teacher: TeacherSource, batch: dict[str, Any], device: torch.device | str) -> Side:
    view = view_of(batch, "teacher_")
    where = {name: getattr(view, name).to(device) for name in ("input_ids", "attention_mask", "scored")}
    side = teacher.targets(dataclasses.replace(view, **where))
    if not isinstance(side, (LMHead, Tensor)):
        raise CacheError(f"the teacher gives a {type(side).__name__} instead of an LMHead or logits: it is already a cache")
    return side


def _rows(side: Side, start: int, stop: int) -> Side:
    return dataclasses.replace(side, hidden=side.hidden[start:stop]) if isinstance(side, LMHead) else side[start:stop]


def _topk(side: Side, identity: Identity, where: Callable[[int], str]) -> dict[str, Array]:
    assert identity.k is not None
    assert identity.temperature is not None
    return topk_columns(primitives.topk_logprobs(side, identity.k, identity.temperature), str(identity.dtype), where)


def topk_columns(top: TopK, dtype: str, where: Callable[[int], str]) -> dict[str, Array]:
    """Return a shard's columns for log-probabilities ``[n, k]`` after checking them. A row whose sum is rounded above 1 is shifted to 1."""
    ids, logprobs = top.ids.cpu(), top.logprobs.cpu()
    bad = (ids[:, 0] >= 0) & ~logprobs[:, 0].isfinite()  # NaN sorts first
    check_finite(not bool(bad.any()), where(int(bad.int().argmax())) if len(bad) else "")
    check_logprobs(ids.numpy(), logprobs.numpy(), where)
    mass = logprobs.masked_fill(ids < 0, -torch.inf).double().logsumexp(-1, keepdim=True)
    excess = torch.where(mass > ROUNDING, mass, 0.0)
    values = {"ids": ids, "logprobs": (logprobs - excess).to(logprobs.dtype), "log_mass": mass.clamp(max=0)}
    return {name: values[name].numpy().astype(form) for name, (form, _) in shards.columns_of("topk", 1, dtype).items()}


def _draws(side: Side, identity: Identity, key: bytes, where: str) -> dict[str, Array]:
    """Return the draws of one example: distinct ids in rising order, padded with -1, and their counts, padded with 0."""
    assert identity.k is not None
    assert identity.temperature is not None
    device = side.hidden.device if isinstance(side, LMHead) else side.device
    generator = torch.Generator(device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
    ids = primitives.sample(side, identity.k, identity.temperature, generator).ids.cpu().numpy()
    check_finite(bool((ids >= 0).all()), where)
    return merged(ids)


def merged(ids: Array) -> dict[str, Array]:
    """Merge equal draws ``[n, k]``: return ``ids`` and ``counts``, both ``[n, k]``."""
    ids = np.sort(ids, axis=1)
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = np.cumsum(first, axis=1) - 1 + np.arange(len(ids))[:, None] * ids.shape[1]
    counts = np.bincount(slot.ravel(), minlength=ids.size).reshape(ids.shape).astype("<u2")
    distinct = np.full(ids.size, -1, "<i4")
    distinct[slot.ravel()] = ids.ravel()
    return {"ids": distinct.reshape(ids.shape), "counts": counts}


def _write_head(out: Path, side: LMHead) -> Head:
    from safetensors.torch import save_file

    tensors = {"weight": side.weight[: side.vocab_size]}
    if side.bias is not None:
        tensors["bias"] = side.bias[: side.vocab_size]
    check_finite(all(bool(tensor.isfinite().all()) for tensor in tensors.values()), "the teacher's head")
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path = out / HEAD
    write_whole(path, lambda temporary: save_file(copies, temporary))
    return Head.of(path, side.scale, side.softcap)
