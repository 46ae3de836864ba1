"""A ``topk`` cache from what a server says of its tokens: while it generates, or of given tokens (vLLM's ``prompt_logprobs``).

A server names tokens by their text; the cache needs ids. They are found with the teacher's tokenizer, or the cache is not written.
What a server leaves out is in the tail (``tail="bucket"``), which is what its log-probabilities leave of 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from ...data.example import Example
from ...files import digest
from ...sides import TopK
from ..http import HTTPModel, HTTPModelError, Job
from .checks import check_logprobs, place
from .manifest import CacheError, Identity, Manifest
from .shards import Array, write_parquet
from .writer import DEFAULT_SHARD_BYTES, Begun, Plan, Report, bytes_per_token, topk_columns, write_shards

__all__ = ["TokenIds", "Top", "from_replies", "score", "write_topk"]

Top: TypeAlias = tuple[Array, Array]
"""Of one example: ids int32 and log-probabilities float32, both ``[scored tokens, k]``, padded with -1."""
MOST_LOST = 0.05
"""Of the rows or alternatives that can't be matched: with more, the tokenizer is not the teacher's."""
NAMED = re.compile(r"token_id:(\d+)")


def _byte_letters() -> dict[int, str]:
    """The letters that byte-level tokenizers write bytes with: printable ones for themselves, others from 256 on, in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


class TokenIds:
    """From what a server calls a token to its id, by one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        size = len(tokenizer)
        pieces = tokenizer.convert_ids_to_tokens(list(range(size)))
        self._pieces = {piece: id for id, piece in enumerate(pieces) if piece is not None}
        # Behind another token, so that a leading space is seen.
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        before = tokenizer.decode(anchor)
        self._texts: dict[str, int | None] = {}
        for id, text in enumerate(tokenizer.batch_decode([[*anchor, id] for id in range(size)])):
            alone = text[len(before) :]
            self._texts[alone] = None if alone in self._texts or not text.startswith(before) else id
        self._letters = _byte_letters()

    def __call__(self, token: Mapping[str, Any]) -> int | None:
        """The id of an entry of a server's list; None where none, or more than one, has that text."""
        if isinstance(token.get("id"), int):
            return int(token["id"])
        text = token["token"]
        if named := NAMED.fullmatch(text):
            return int(named[1])
        if token.get("bytes") is not None:
            raw = bytes(token["bytes"])
            try:
                text = raw.decode()
            except UnicodeDecodeError:  # a part of a character, which has no text of its own
                found = self._pieces.get("".join(self._letters[b] for b in raw))
                return self._pieces.get(f"<0x{raw[0]:02X}>") if found is None and len(raw) == 1 else found
        found = self._texts.get(text)
        return self._pieces.get(text) if found is None else found


def from_replies(rows: Sequence[Mapping[str, Any]], examples: Sequence[Example], tokenizer: Any) -> tuple[list[Top], int]:
    """What was said while each row's response was generated (its ``teacher_logprobs``), for its example.

    A row whose response the tokenizer cuts into other tokens than the teacher did gets no probabilities (ids of -1), and so does the
    end token, if the server did not tell of it.

    Returns:
        Of each example, its ``Top``; and how many rows got none.

    Raises:
        CacheError: rows without log-probabilities; a tokenizer that knows too few of the tokens, or cuts too many rows differently.
    """
    ids_of = TokenIds(tokenizer)
    width = 1 + max((len(t["top_logprobs"]) for row in rows for t in row.get("teacher_logprobs") or ()), default=0)
    tops, lost, known, unknown = [], [], 0, 0
    for number, (row, example) in enumerate(zip(rows, examples, strict=True), 1):
        said = row.get("teacher_logprobs")
        if not said:
            raise CacheError(f"row {number} has no teacher_logprobs: make the data with `kdkernels generate --logprobs K`")
        scored = [example.teacher_ids[u + 1] for u in example.teacher_scored]
        own = [ids_of(token) for token in said]
        top = _empty(len(scored), width)
        tops.append(top)
        if own[: len(scored)] != scored[: len(own)] or len(own) < len(scored) - 1:
            lost.append(number)
            continue
        for i, token in enumerate(said[: len(scored)]):
            found = {id: a["logprob"] for a in token["top_logprobs"] if (id := ids_of(a)) is not None and 0 <= id < len(tokenizer)}
            known, unknown = known + len(found), unknown + len(token["top_logprobs"]) - len(found)
            found.setdefault(scored[i], token["logprob"])
            _fill(top, i, found)
    if len(lost) > MOST_LOST * len(rows) or unknown > MOST_LOST * (known + unknown):
        raise CacheError(
            f"the server's tokens can't be mapped to ids: {len(lost)} of {len(rows)} responses are cut into other tokens by the tokenizer "
            f"{f'(row {lost[0]} first) ' if lost else ''}and {unknown} of {known + unknown} alternatives have no token of their own. Give "
            "the teacher's own tokenizer, or a server that names ids (vLLM: return_tokens_as_token_ids)"
        )
    check_tops(examples, tops)
    return tops, len(lost)


def score(model: HTTPModel, examples: Sequence[Example], k: int, log: Path) -> list[Top]:
    """The ``k`` most likely tokens at each scored position, by a server that takes token ids and ``prompt_logprobs`` (vLLM).

    Raises:
        HTTPModelError, FileError: see ``HTTPModel.complete``.
    """
    jobs = []
    for example in examples:
        ids, scored = list(example.teacher_ids), list(example.teacher_scored)
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        request = digest([ids, scored, k, model.settings])

        def read(answer: dict[str, Any], scored: list[int] = scored, length: int = len(ids)) -> dict[str, Any]:
            choice = answer["choices"][0]
            said = choice.get("prompt_logprobs")
            if said is None:
                raise HTTPModelError("the server gives no prompt_logprobs: it takes vLLM, or another server that knows them")
            if len(said) != length:
                raise ValueError(f"{len(said)} prompt_logprobs for {length} tokens")
            # The entry of token u + 1 is the distribution at position u.
            kept = [{int(id): float(entry["logprob"]) for id, entry in said[u + 1].items()} for u in scored]
            usage = answer.get("usage") or {}
            counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
            return {"ids": [list(row) for row in kept], "prompt_logprobs": [list(row.values()) for row in kept], **counts}

        jobs.append(Job(request, request, body, read))
    unique = {job.key: job for job in jobs}
    entries = {entry["key"]: entry for entry in model.run(list(unique.values()), log)}
    tops = []
    for job in jobs:
        entry = entries[job.key]
        top = _empty(len(entry["ids"]), k + 1)
        for i, (ids, logprobs) in enumerate(zip(entry["ids"], entry["prompt_logprobs"], strict=True)):
            _fill(top, i, dict(zip(ids, logprobs, strict=True)))
        tops.append(top)
    check_tops(examples, tops)
    return tops


def check_tops(examples: Sequence[Example], tops: Sequence[Top]) -> None:
    """
    Raises:
        CacheError: log-probabilities that are not those of a distribution, with the row.
    """
    for number, (example, (ids, logprobs)) in enumerate(zip(examples, tops, strict=True), 1):
        name = example.where or f"example {number}"
        if ids.shape != logprobs.shape or len(ids) != len(example.teacher_scored):
            raise CacheError(
                f"{name}: ids {ids.shape} and log-probabilities {logprobs.shape} for {len(example.teacher_scored)} scored tokens"
            )
        rising = np.sort(ids, axis=-1)
        if ((rising[:, 1:] == rising[:, :-1]) & (rising[:, 1:] >= 0)).any():
            raise CacheError(f"{name}: a token is named twice for one position")
        check_logprobs(ids, logprobs, lambda row, name=name: f"{name}, token {row + 1} of the response")  # type: ignore[misc]


def _empty(tokens: int, width: int) -> Top:
    return np.full((tokens, width), -1, np.int32), np.zeros((tokens, width), np.float32)


def _fill(top: Top, row: int, found: Mapping[int, float]) -> None:
    """The most likely first, as many as there is room for."""
    best = sorted(found.items(), key=lambda item: (-item[1], item[0]))[: top[0].shape[1]]
    top[0][row, : len(best)] = [id for id, _ in best]
    top[1][row, : len(best)] = [logprob for _, logprob in best]


def write_topk(
    examples: Sequence[Example],
    tops: Sequence[Top],
    out: Path,
    identity: Identity,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    max_length: int | None = None,
    started: Callable[[Plan], object] | None = None,
    report: Report | None = None,
) -> Manifest:
    """A ``topk`` cache of log-probabilities that are at hand; ``identity.k`` is their width.

    Raises:
        CacheError: an id beyond the vocabulary; log-probabilities that are not those of a distribution, with the row; and see
            ``write_cache``.
    """
    largest = max((int(top[0].max(initial=-1)) for top in tops), default=-1)
    if largest >= identity.vocab_size:
        raise CacheError(f"id {largest} of the server is not one of {identity.vocab_size} tokens: the tokenizer is not the teacher's")
    check_tops(examples, tops)
    begun = Begun.for_examples(out, identity, examples, shard_bytes, 1)
    identity = begun.identity
    salt = identity.hash()
    keys = [bytes.fromhex(example.key(salt)) for example in examples]
    counts = [len(example.teacher_scored) for example in examples]
    plan = Plan.of(keys, counts, bytes_per_token(identity), begun.shard_bytes)

    def produce(path: Path, start: int, stop: int) -> None:
        chosen = [tops[i] for i in plan.source[start:stop]]
        ids, logprobs = (torch.from_numpy(np.concatenate([top[part] for top in chosen])) for part in (0, 1))
        where = partial(place, [examples[i] for i in plan.source[start:stop]])
        columns = topk_columns(TopK(ids, logprobs), str(identity.dtype), where)
        write_parquet(path, plan.keys[start:stop], plan.counts[start:stop], columns)
        if report is not None:
            report(sum(plan.counts[start:stop]))

    return write_shards(out, begun, plan, produce, started, report, max_length=max_length)
