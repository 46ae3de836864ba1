"""Writing a cache. What is done is on disk and never done again: shards are fixed sets of examples, each written whole, then listed.

The bytes do not depend on where a run was cut: batches never cross a shard, draws are seeded by the example, and nothing in a file
tells the time. (A GPU whose sums differ from run to run can differ in the last bit.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import primitives
from ...data.collator import Collator, view_of
from ...data.example import Example
from ...files import FileError, Lock, digest, drop_temporaries, write_whole
from ...sides import LMHead, Side, TopK
from ..source import TeacherSource
from . import shards
from .manifest import MANIFEST, CacheError, Head, Identity, Manifest, Shard
from .shards import Array

__all__ = ["DEFAULT_SHARD_BYTES", "Plan", "Report", "bytes_per_token", "write_cache", "write_shards"]

DEFAULT_SHARD_BYTES = 128 << 20
Report = Callable[[int], object]
"""Told the tokens done, as they are done."""


@dataclass(frozen=True)
class Plan:
    """Which examples make which shard."""

    keys: list[bytes]
    counts: list[int]
    """Tokens of each."""
    source: list[int]
    """Its index in the data."""
    bounds: list[tuple[int, int]]

    @classmethod
    def of(cls, keys: Sequence[bytes], counts: Sequence[int], token_bytes: int, shard_bytes: int, batch_size: int = 1) -> Plan:
        """Examples of a key seen before, or without tokens, are left out. A shard ends with the batch that fills it, so that batches are
        those of a training that takes the examples in their order."""
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
    """Before compression, which takes another quarter off ``topk``. ``text``: of the UTF-8, about."""
    if identity.kind == "hidden":
        if hidden_size is None:
            raise ValueError("hidden_size is needed to know the size of a hidden cache")
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
    device: torch.device | str = "cpu",
    started: Callable[[Plan], object] | None = None,
    report: Report | None = None,
) -> Manifest:
    """Runs ``teacher`` over ``examples`` in their order and keeps what it gives in the folder ``out``. Goes on where it was cut short.

    Args:
        teacher: gives an ``LMHead`` or logits; ``kind="hidden"`` needs an ``LMHead``.
        identity: what is kept, of which teacher.
        hidden_size: of ``kind="hidden"``.
        batch_size: examples at a time.
        collator: what makes a batch, where a training has other settings than padding to a multiple of 16.
        shard_bytes: of a shard, before compression; what is done again after a kill, at most.
        device: where views are made.
        started: told the plan before the first example.

    Raises:
        CacheError: ``out`` is in use, holds something else, or another cache; a teacher that gives NaN.
    """
    salt = identity.hash()
    keys = [bytes.fromhex(example.key(salt)) for example in examples]
    counts = [len(example.teacher_scored) for example in examples]
    plan = Plan.of(keys, counts, bytes_per_token(identity, hidden_size), shard_bytes, batch_size)
    collate = Collator(multiple=16) if collator is None else collator
    kept: dict[str, LMHead] = {}

    def produce(path: Path, start: int, stop: int) -> None:
        parts: list[dict[str, Array]] = []
        hidden: list[Tensor] = []
        for first in range(start, stop, batch_size):
            chosen = range(first, min(first + batch_size, stop))
            side = _side(teacher, collate([(examples[plan.source[i]],) for i in chosen]), device)
            if identity.kind == "hidden":
                if not isinstance(side, LMHead):
                    raise CacheError("kind=hidden needs a teacher whose head can be taken apart; this one gives logits: take kind=topk")
                kept.setdefault("head", side)
                hidden.append(_finite(side.hidden.detach()).to("cpu", getattr(torch, identity.dtype or "bfloat16")))
            elif identity.kind == "topk":
                parts.append(_topk(side, identity))
            else:
                ends = np.cumsum([plan.counts[i] for i in chosen]).tolist()
                bounds = zip([0, *ends], ends, chosen, strict=False)
                parts += [_draws(_rows(side, a, b), identity, plan.keys[i]) for a, b, i in bounds]
            if report is not None:
                report(sum(plan.counts[i] for i in chosen))
        if identity.kind == "hidden":
            shards.write_hidden(path, plan.keys[start:stop], plan.counts[start:stop], torch.cat(hidden))
        else:
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            shards.write_parquet(path, plan.keys[start:stop], plan.counts[start:stop], columns)

    def head(folder: Path) -> Head:
        return _write_head(folder, kept["head"])

    with torch.inference_mode():
        return write_shards(
            out, identity, plan, produce, batch_size, shard_bytes, started, report, head if identity.kind == "hidden" else None
        )


def write_shards(
    out: Path,
    identity: Identity,
    plan: Plan,
    produce: Callable[[Path, int, int], object],
    batch_size: int,
    shard_bytes: int,
    started: Callable[[Plan], object] | None = None,
    report: Report | None = None,
    head: Callable[[Path], Head] | None = None,
) -> Manifest:
    """The part that all kinds share: the lock, the manifest, and which shards are still to be made.

    Args:
        produce: writes the shard of examples ``[start, stop)`` of the plan to a path.
        head: writes the head once a shard has been made.
    """
    if not plan.source:
        raise CacheError("there is nothing to keep: no example has a scored token")
    out.mkdir(parents=True, exist_ok=True)
    fresh = Manifest(
        identity=identity, rows=len(plan.source), tokens=plan.tokens, examples=digest([key.hex() for key in plan.keys]),
        shard_bytes=shard_bytes, batch_size=batch_size,
    )  # fmt: skip
    try:
        with Lock(out / ".lock", f"the cache {out}"):
            drop_temporaries(out)
            manifest = _resumed(out, fresh)
            if started is not None:
                started(plan)
            if manifest.head is not None and not _intact(out, manifest.head):
                manifest = dataclasses.replace(manifest, head=None)  # made anew with the first shard
            for number, (start, stop) in enumerate(plan.bounds):
                headless = head is not None and manifest.head is None
                if number < len(manifest.shards) and not headless and _intact(out, manifest.shards[number]):
                    if report is not None:
                        report(sum(plan.counts[start:stop]))
                    continue
                path = out / f"{number:06d}.{shards.suffix(identity.kind)}"
                write_whole(path, lambda temporary, a=start, b=stop: produce(temporary, a, b))  # type: ignore[misc]
                made = Shard.of(path, stop - start, sum(plan.counts[start:stop]))
                listed = (*manifest.shards[:number], made, *manifest.shards[number + 1 :])
                manifest = dataclasses.replace(manifest, shards=listed, head=head(out) if head and headless else manifest.head)
                manifest.write(out)
            if not manifest.complete:
                manifest = dataclasses.replace(manifest, complete=True)
                manifest.write(out)
    except FileError as error:
        raise CacheError(str(error)) from None
    return manifest


def _resumed(out: Path, fresh: Manifest) -> Manifest:
    """What is there already, if it is the beginning of the same cache; else a fresh manifest, written."""
    if not (out / MANIFEST).exists():
        if others := [path.name for path in out.iterdir() if path.name != ".lock"]:
            raise CacheError(f"{out} is not empty and holds no cache, but {others[0]}: give a new folder")
        fresh.write(out)
        return fresh
    plan = {name: getattr(fresh, name) for name in ("examples", "rows", "tokens", "shard_bytes", "batch_size")}
    return Manifest.read(out, **dataclasses.asdict(fresh.identity), **plan)


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
        raise CacheError(f"the teacher gives {type(side).__name__}, not an LMHead or logits: it is a cache already")
    return side


def _rows(side: Side, start: int, stop: int) -> Side:
    return dataclasses.replace(side, hidden=side.hidden[start:stop]) if isinstance(side, LMHead) else side[start:stop]


def _finite(values: Tensor) -> Tensor:
    if not bool(values.isfinite().all()):
        raise CacheError("the teacher gives values that are not finite: check its dtype (float16 overflows; try bfloat16 or float32)")
    return values


def _topk(side: Side, identity: Identity) -> dict[str, Array]:
    assert identity.k is not None
    assert identity.temperature is not None
    return topk_columns(primitives.topk_logprobs(side, identity.k, identity.temperature), str(identity.dtype))


def topk_columns(top: TopK, dtype: str) -> dict[str, Array]:
    """The columns of ``[n, k]`` log-probabilities."""
    ids, found = top.ids.cpu(), top.logprobs.cpu()
    _finite(found[:, 0][ids[:, 0] >= 0])
    mass = found.masked_fill(ids < 0, -torch.inf).double().logsumexp(-1, keepdim=True).clamp(max=0)
    values = {"ids": ids, "logprobs": found, "log_mass": mass}
    return {name: values[name].numpy().astype(form) for name, (form, _) in shards.columns_of("topk", 1, dtype).items()}


def _draws(side: Side, identity: Identity, key: bytes) -> dict[str, Array]:
    """Draws of one example, equal ones merged: ids in rising order with how often each came, padded with -1 and 0."""
    assert identity.k is not None
    assert identity.temperature is not None
    device = side.hidden.device if isinstance(side, LMHead) else side.device
    generator = torch.Generator(device).manual_seed(int.from_bytes(key[:8], "little") >> 1)
    ids = primitives.sample(side, identity.k, identity.temperature, generator).ids.cpu().numpy()
    if (ids < 0).any():
        _finite(torch.tensor(torch.nan))
    return merged(ids)


def merged(ids: Array) -> dict[str, Array]:
    """``ids`` and ``counts`` ``[n, k]`` of draws ``[n, k]``."""
    ids = np.sort(ids, axis=1)
    first = np.ones(ids.shape, bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = np.cumsum(first, axis=1) - 1 + np.arange(len(ids))[:, None] * ids.shape[1]
    counts = np.bincount(slot.ravel(), minlength=ids.size).reshape(ids.shape).astype("<u2")
    kept = np.full(ids.size, -1, "<i4")
    kept[slot.ravel()] = ids.ravel()
    return {"ids": kept.reshape(ids.shape), "counts": counts}


def _write_head(out: Path, side: LMHead) -> Head:
    from safetensors.torch import save_file

    tensors = {"weight": side.weight[: side.vocab_size]}
    if side.bias is not None:
        tensors["bias"] = side.bias[: side.vocab_size]
    found = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    path = out / "head.safetensors"
    write_whole(path, lambda temporary: save_file(found, temporary))
    return Head.of(path, side.scale, side.softcap)
