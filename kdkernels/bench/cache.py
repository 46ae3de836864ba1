"""Measure how fast a cache is written and read: ``python -m kdkernels.bench.cache --tokens 1000000``.

The teacher is synthetic and costs no time, so that the format is measured. The same bytes in one plain file show the speed of the disk.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..teachers.cache import shards
from ..teachers.cache.manifest import Identity, Kind
from ..teachers.cache.reader import open_cache
from ..teachers.cache.writer import DEFAULT_SHARD_BYTES, Begun, Plan, bytes_per_token, write_shards
from .timing import elapsed

__all__ = ["measure"]


def _top_tokens(rng: np.random.Generator, rows: int, k: int, vocab: int) -> dict[str, np.ndarray[Any, Any]]:
    """Return the columns of a shard of top-k tokens.

    Nothing repeats within a shard, so that it compresses no better than real data. Most ids are small, as in real data: the earlier a
    tokenizer merged a token, the more often it occurs.
    """
    ids = (vocab ** rng.random((rows, k))).astype("<i4")
    logprobs = -np.sort(rng.exponential(3.0, (rows, k)), axis=1)
    logprobs -= np.log(np.exp(logprobs).sum(-1, keepdims=True))
    return {"ids": ids, "logprobs": logprobs.astype("<f2"), "log_mass": np.zeros((rows, 1), "<f4")}


def measure(folder: Path, tokens: int = 1_000_000, kind: Kind = "topk", k: int = 64, length: int = 500, batch: int = 8) -> dict[str, float]:
    """Return the seconds of each step, and sizes in bytes.

    Args:
        folder: folder on the disk to measure. Files in it are deleted afterwards.
        kind: topk or hidden; for ``hidden``, the hidden size is 16 * k.
        length: tokens per example.
        batch: examples per read, in random order.
    """
    import torch

    from ..data.collator import View

    vocab, count = 151_936, -(-tokens // length)
    dtype = {"topk": "float16", "hidden": "bfloat16"}[kind]
    identity = Identity("synthetic", "", "", "", "", vocab, vocab, kind, k, 1.0, dtype)
    rng = np.random.default_rng(0)
    keys = [rng.bytes(32) for _ in range(count)]
    token_bytes = bytes_per_token(identity, 16 * k)
    plan = Plan.of(keys, [length] * count, token_bytes, DEFAULT_SHARD_BYTES)
    most = length * max(stop - start for start, stop in plan.bounds)
    block = _top_tokens(rng, most, k, vocab)
    hidden = torch.randn(most if kind == "hidden" else 1, 16 * k, dtype=torch.bfloat16)
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        with elapsed() as timed_block:
            yield
        seconds[name] = timed_block.seconds

    def produce(path: Path, start: int, stop: int) -> None:
        rows = length * (stop - start)
        if kind == "hidden":
            shards.write_hidden(path, plan.keys[start:stop], plan.counts[start:stop], hidden[:rows])
        else:
            shards.write_parquet(path, plan.keys[start:stop], plan.counts[start:stop], {name: v[:rows] for name, v in block.items()})

    def head(out: Path) -> object:
        from safetensors.torch import save_file

        from ..teachers.cache.manifest import Head

        save_file({"weight": torch.zeros(1, 16 * k, dtype=torch.bfloat16)}, out / "head.safetensors")
        return Head.of(out / "head.safetensors", 1.0, None)

    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name) / "cache"
        begun = Begun.of(out, identity, DEFAULT_SHARD_BYTES, batch)
        with timed("write"):
            write_shards(out, begun, plan, produce, head=head if kind == "hidden" else None)  # type: ignore[arg-type]
        size = sum(path.stat().st_size for path in out.iterdir())
        with timed("open, sha256 compared"):
            cache = open_cache(out)
        order = rng.permutation(count)
        with timed("read in random order"):
            for start in range(0, count, batch):
                chosen = [keys[i].hex() for i in order[start : start + batch]]
                scored = torch.arange(length * len(chosen))
                cache.targets(View(scored[None], None, None, scored, tuple(chosen), (length,) * len(chosen)))
        plain = Path(name) / "plain"
        data = os.urandom(min(size, 1 << 28))
        with timed("plain"), plain.open("wb") as file:
            for _ in range(max(1, size // len(data))):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        seconds["the disk: a plain file of that size, fsync included"] = seconds.pop("plain") * size / plain.stat().st_size
    return {**seconds, "bytes": float(size), "raw bytes": float(token_bytes * count * length)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--kind", choices=("topk", "hidden"), default="topk")
    parser.add_argument("-k", type=int, default=64)
    parser.add_argument("--folder", type=Path, default=Path())
    args = parser.parse_args()
    results = measure(args.folder, args.tokens, args.kind, args.k)
    size, raw = results.pop("bytes"), results.pop("raw bytes")
    print(f"{args.tokens:,} tokens, {args.kind}: {size / args.tokens:.0f} bytes per token ({raw / args.tokens:.0f} before compression)")
    for name, seconds in results.items():
        print(f"  {name:<55}{seconds:8.2f} s {args.tokens / seconds:14,.0f} tokens/s {size / seconds / 1e6:8,.0f} MB/s of the folder")


if __name__ == "__main__":
    main()
