"""Read a cache: a teacher source that finds each example by its key, independent of order, batches and packing."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.collator import View
from ...data.example import Example
from ...data.rows import places
from ...divergences import defined_for, parse
from ...sides import LMHead, Sampled, Tail, TopK
from .checks import check_logprobs
from .manifest import CacheError, Head, Manifest, Shard, identity_of_tokenizer, learnt
from .shards import KEY_BYTES, Array, HiddenShard, ParquetShard, columns_of, read_text_shard

__all__ = ["CachedTeacher", "open_cache", "read_text"]

DECODED_BYTES = 256 << 20
"""Limit of the decoded row groups in memory."""
OPEN_SHARDS = 64


def open_cache(
    path: str | Path,
    tokenizer: Any = None,
    *,
    teacher: str | None = None,
    revision: str | None = None,
    tail: Tail = "bucket",
    verify: bool = True,
) -> CachedTeacher:
    """Open a cache for training, after checking its content and whether it fits the training.

    Args:
        tokenizer: tokenizer of the training data. It and its chat template must equal those that the cache was made with.
        teacher: expected name; revision: expected revision. None is not compared. With an equal revision, the name may differ.
        tail: tail of the ``TopK`` that a ``topk`` cache returns.
        verify: compare the sha256 of every shard, which reads the whole cache once.

    Raises:
        CacheError: the cache differs, is damaged, unfinished or missing (the message says which), or is a cache of text (see
            ``read_text``).
    """
    manifest = _checked(Path(path), tokenizer, teacher, revision, verify)
    if manifest.identity.kind == "text":
        raise CacheError(f"{path} holds text, which has no probabilities: train on its rows (read_text)")
    return CachedTeacher(Path(path), manifest, tail)


def read_text(path: str | Path, tokenizer: Any = None, *, verify: bool = True) -> list[dict[str, Any]]:
    """Return the training rows of a ``text`` cache: each row of its data with the teacher's ``response``.

    Raises:
        CacheError: same as ``open_cache``, or the cache is of another kind.
    """
    folder = Path(path)
    manifest = _checked(folder, tokenizer, None, None, verify)
    if manifest.identity.kind != "text":
        raise CacheError(f"{path} holds {manifest.identity.kind}, not text: read it with open_cache")
    return [row for shard in manifest.shards for row in read_text_shard(folder / shard.file)]


def _checked(folder: Path, tokenizer: Any, teacher: str | None, revision: str | None, verify: bool) -> Manifest:
    of_tokenizer = {} if tokenizer is None else identity_of_tokenizer(tokenizer)
    manifest = Manifest.read(folder, teacher=teacher, revision=revision, **of_tokenizer)
    if not manifest.complete:
        done = sum(shard.rows for shard in manifest.shards)
        raise CacheError(
            f"{folder} is unfinished: {done} of {manifest.rows} examples. Run the `kdkernels cache` command that began it again"
        )
    files: list[Shard | Head] = [*manifest.shards, *([] if manifest.head is None else [manifest.head])]
    if verify:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda file: manifest.verify(folder, file), files))
    return manifest


class CachedTeacher:
    """A ``TeacherSource`` that reads its targets from a cache. ``open_cache`` creates it.

    ``targets`` returns a ``TopK``, a ``Sampled``, or for ``hidden`` an ``LMHead``, on the device of the view.
    """

    def __init__(self, folder: Path, manifest: Manifest, tail: Tail) -> None:
        self.folder, self.manifest, self.tail = folder, manifest, tail
        identity = manifest.identity
        self.kind, self.vocab_size, self.temperature = identity.kind, identity.vocab_size, identity.temperature
        self.date = manifest.date
        """The date that the chat template wrote into every prompt; None for a template without a date."""
        self.learn = learnt(manifest)
        """The turns of a conversation that its rows learn: see ``load_examples``."""
        self.salt = identity.hash()
        """Salt of the keys of examples: ``example.key(cache.salt)``."""
        self._columns = {} if self.kind == "hidden" else columns_of(self.kind, identity.k or 0, identity.dtype)
        self._groups: OrderedDict[tuple[int, int], dict[str, Array]] = OrderedDict()
        self._decoded = 0
        self._open = functools.lru_cache(OPEN_SHARDS)(self._open_shard)
        self._heads: dict[torch.device, dict[str, Tensor]] = {}
        self._index()

    def __len__(self) -> int:
        """Return the number of examples."""
        return self.manifest.rows

    def _open_shard(self, number: int) -> ParquetShard | HiddenShard:
        shard = self.manifest.shards[number]
        try:
            return (HiddenShard if self.kind == "hidden" else ParquetShard)(self.folder / shard.file)
        except Exception as error:  # pyarrow and safetensors have error types of their own
            raise CacheError(f"{shard.file} can't be read: {error}") from None

    def _index(self) -> None:
        """Index the keys by their first 8 bytes. A lookup compares the whole key."""
        parts = []
        for number, shard in enumerate(self.manifest.shards):
            keys, counts, groups, firsts = self._open(number).index()
            if len(keys) != shard.rows or counts.sum() != shard.tokens:
                raise CacheError(
                    f"{shard.file} holds {len(keys)} examples and {counts.sum()} tokens, the manifest lists {shard.rows} and {shard.tokens}"
                )
            parts.append((keys, counts, np.full(len(keys), number), groups, firsts))
        keys, counts, numbers, groups, firsts = (np.concatenate(column) for column in zip(*parts, strict=True))
        prefix = np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
        order = np.argsort(prefix, kind="stable")
        self._prefix, self._keys = prefix[order], keys[order]
        self._where = np.stack([counts, numbers, groups, firsts], axis=1)[order]  # [rows, 4]

    def _find(self, key: str) -> tuple[int, int, int, int] | None:
        """Return count, shard, row group and first token of an example; None if it is not in the cache."""
        raw = bytes.fromhex(key)
        if len(raw) != KEY_BYTES:
            raise ValueError(f"a key is {2 * KEY_BYTES} hex digits, got {key!r}")
        i = int(np.searchsorted(self._prefix, np.uint64(int.from_bytes(raw[:8], "little"))))
        while i < len(self._prefix) and self._keys[i, :8].tobytes() == raw[:8]:
            if self._keys[i].tobytes() == raw:
                count, shard, group, first = self._where[i].tolist()
                return count, shard, group, first
            i += 1
        return None

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def require(self, examples: Sequence[Example], **options: Any) -> None:
        """Check that every example is in the cache.

        Args:
            options: options of ``load_examples`` for them, such as ``max_length``.

        Raises:
            ValueError: some are missing; the message names their files and rows, and the difference.
        """
        missing = [example for example in examples if example.key(self.salt) not in self]
        if missing:
            named, reason = places(e.where for e in missing if e.where) or "of no file", self._reason(missing, options)
            raise ValueError(
                f"{len(missing):,} of {len(examples):,} rows are not in the cache {self.folder}: {named}. {reason}. "
                "Make a cache of the data of this training: `kdkernels cache --data FILE`, with --data for each file, held-out rows too"
            )

    def check_loss(self, divergence: str, temperature: float) -> None:
        """Check that the cache has the targets for a training's loss.

        Raises:
            ValueError: the cache has no targets for this temperature or divergence.
        """
        form = {"topk": str(self.tail), "sampled": "sampled"}.get(self.kind)
        if form is None:
            return
        if form != "renorm" and self.temperature != temperature:
            made = "drawn" if form == "sampled" else "made"
            raise ValueError(
                f"temperature={temperature}, but the cache was {made} at {self.temperature} and holds nothing for another: train with "
                f"--temperature {self.temperature:g}, or make a cache with `kdkernels cache --temperature {temperature:g}`"
            )
        if form not in parse(divergence).tails:
            names = ", ".join(defined_for(form))
            raise ValueError(
                f"divergence={divergence} is not defined against a cache of kind {self.kind}: train with --divergence {names}, or make a "
                "cache with `kdkernels cache --kind hidden`, which serves every divergence"
            )

    def _reason(self, missing: Sequence[Example], options: dict[str, Any]) -> str:
        """Explain from the manifest how the missing examples differ from those of the cache."""
        dates = {example.date for example in missing} - {None, self.date}
        if dates:
            then = f"{self.date} in the cache" if self.date else "unknown for the cache, which an earlier version made"
            return f"The chat template writes the date: it is {', '.join(sorted(map(str, dates)))} now, and {then}"
        longest = max(map(len, missing))
        for name, then in {**self.manifest.options, "learn": self.learn}.items():
            now = options.get(name, then)
            short = name == "max_length" and (None in (then, now) or longest < min(then, now))
            if then != now and not short:
                rows = "some of these rows are that long" if name == "max_length" else "it decides the tokens of a row"
                return f"The cache was made with --{name.replace('_', '-')} {then}, this training has {now}, and {rows}"
        if self.manifest.version == 1:
            return "The cache is of an earlier version of kdkernels, which could give rows other tokens, or it was made from other rows"
        return "It was made from other rows, or their text has changed"

    def targets(self, view: View) -> LMHead | TopK | Sampled:
        """Return the stored targets for the scored positions of ``view``, leading shape ``[n]``. ``view.keys`` are salted with ``salt``.

        Raises:
            KeyError: an example is not in the cache.
            CacheError: an example has another number of tokens than in the cache, the view has no keys, or the stored log-probabilities are
                not those of a distribution.
        """
        if len(view.keys) != len(view.counts) or sum(view.counts) != view.scored.numel():
            raise CacheError(
                f"a cached teacher needs the key and the token count of every example: got {len(view.keys)} keys, counts that add up to "
                f"{sum(view.counts)}, and {view.scored.numel()} scored positions"
            )
        places = []
        for key, count in zip(view.keys, view.counts, strict=True):
            if not count:
                continue
            place = self._find(key)
            if place is None:
                raise KeyError(
                    f"example {key[:12]} is not in the cache {self.folder.name}, which holds {len(self)}. `require(examples)` names the row"
                )
            if place[0] != count:
                raise CacheError(f"example {key[:12]} has {count} scored tokens, {place[0]} in the cache")
            places.append(place)
        device = view.scored.device
        if self.kind == "hidden":
            return self._hidden(places, device)
        arrays = {name: np.empty((view.scored.numel(), width), dtype) for name, (dtype, width) in self._columns.items()}
        end = 0
        for count, shard, group, first in places:
            decoded = self._group(shard, group)
            for name, values in arrays.items():
                values[end : end + count] = decoded[name][first : first + count]
            end += count
        ids = torch.from_numpy(arrays["ids"]).to(device)
        if self.kind == "sampled":
            return Sampled(ids, torch.from_numpy(arrays["counts"].astype(np.int32)).to(device))
        assert self.temperature is not None
        logprobs = torch.from_numpy(arrays["logprobs"]).to(device).float()
        if "log_mass" in arrays:
            logprobs = with_mass(logprobs, ids, torch.from_numpy(arrays["log_mass"]).to(device))
        return TopK(ids, logprobs, self.tail, self.temperature)

    def _group(self, shard: int, group: int) -> dict[str, Array]:
        arrays = self._groups.pop((shard, group), None)
        if arrays is None:
            reader = self._open(shard)
            assert isinstance(reader, ParquetShard)
            arrays = reader.group(group, self._columns)
            if self.kind == "topk":
                file = self.manifest.shards[shard].file
                check_logprobs(arrays["ids"], arrays["logprobs"], lambda row: f"{self.folder / file}, row group {group}, token {row + 1}")
            self._decoded += _size(arrays)
            while self._groups and self._decoded > DECODED_BYTES:
                self._decoded -= _size(self._groups.popitem(last=False)[1])
        self._groups[shard, group] = arrays
        return arrays

    def _hidden(self, places: list[tuple[int, int, int, int]], device: torch.device) -> LMHead:
        parts = []
        for count, shard, _, first in places:
            reader = self._open(shard)
            assert isinstance(reader, HiddenShard)
            parts.append(reader.read(first, count))
        tensors, head = self._head(device), self.manifest.head
        assert head is not None
        hidden = torch.cat(parts).to(device) if parts else tensors["weight"].new_empty(0, tensors["weight"].shape[1])
        return LMHead(hidden, tensors["weight"], tensors.get("bias"), head.scale, head.softcap, self.vocab_size)

    def _head(self, device: torch.device) -> dict[str, Tensor]:
        if device not in self._heads:
            from safetensors.torch import load_file

            assert self.manifest.head is not None
            self._heads[device] = {name: tensor.to(device) for name, tensor in load_file(self.folder / self.manifest.head.file).items()}
        return self._heads[device]


def _size(arrays: dict[str, Array]) -> int:
    return sum(values.nbytes for values in arrays.values())


def with_mass(logprobs: Tensor, ids: Tensor, log_mass: Tensor) -> Tensor:
    """Shift the rounded ``logprobs`` ``[n, K]`` so that each row's probabilities sum to its mass again.

    The tail, ``1 - mass``, is then exact to float32. The rounding of the log-probabilities alone would change it by up to 1e-3.
    """
    shift = log_mass - logprobs.masked_fill(ids < 0, -torch.inf).logsumexp(-1, keepdim=True)
    return logprobs + shift.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
