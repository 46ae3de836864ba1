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
from ...sides import TopK
from ...support.errors import listed
from ...support.files import digest
from ..answers import NoLogprobs, Unreadable, counts_of, read_number
from ..http import HTTPModel, Job
from .checks import SLACK, check_logprobs, place
from .manifest import CacheError, Identity, Manifest
from .shards import Array, write_parquet
from .writer import DEFAULT_SHARD_BYTES, Begun, Plan, Report, bytes_per_token, topk_columns, write_shards

__all__ = ["TokenIds", "Top", "from_replies", "score", "silent_positions", "write_topk"]

Top: TypeAlias = tuple[Array, Array]
"""The result for one example: ids int32 and log-probabilities float32, both ``[scored tokens, k]``, padded with -1."""
MOST_LOST = 0.05
"""Largest share of rows or alternatives without a match. With more, the tokenizer is not the teacher's."""
NAMED = re.compile(r"token_id:(\d+)")


class TokenIds:
    """Map the name that a server gives a token to its id in one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        self._pieces = {piece: id for id, piece in enumerate(pieces) if piece is not None}
        self._bytes = _bytes_of_tokens(tokenizer, pieces)
        self._ids: dict[bytes, list[int]] = {}
        for id, data in enumerate(self._bytes):
            if data:
                self._ids.setdefault(data, []).append(id)

    def __call__(self, token: Mapping[str, Any]) -> int | None:
        """The id of an entry of a server's list; None where none, or more than one, is such a token."""
        ids = self.candidates(token)
        return ids[0] if len(ids) == 1 else None

    def candidates(self, token: Mapping[str, Any]) -> Sequence[int]:
        """The ids that an entry of a server's list can be: the one that it names, else those of its bytes, else of its text."""
        if (id := named_id(token)) is not None:
            return [id]
        text, raw = token["token"], token.get("bytes")
        if raw:
            return self._ids.get(bytes(raw), [])
        if "\ufffd" in text:  # half a character, which could be any
            return []
        return self._ids.get(text.encode()) or ([self._pieces[text]] if text in self._pieces else [])

    def spelling(self, token: Mapping[str, Any], ids: Sequence[int]) -> int:
        """Return how many of the first ``ids`` spell an entry, or 0. llama.cpp merges the tokens of one character into one entry."""
        raw, spelled = bytes(token.get("bytes") or ()), b""
        for count, id in enumerate(ids, 1):
            spelled += self._bytes[id]
            if len(spelled) >= len(raw) or not self._bytes[id]:
                return count if spelled == raw else 0
        return 0


def _bytes_of_tokens(tokenizer: Any, pieces: Sequence[str | None]) -> list[bytes]:
    """The bytes that each id stands for; b"" where that is not known."""
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    letters = _byte_letters()
    plain = [piece for id, piece in enumerate(pieces) if piece is not None and id not in added]
    if letters.keys() >= {letter for piece in plain for letter in piece}:  # byte-level
        texts = [""] * len(pieces)
    else:
        # Behind another token, so that a leading space is seen.
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        before = tokenizer.decode(anchor)
        decoded = tokenizer.batch_decode([[*anchor, id] for id in range(len(pieces))])
        texts = [text[len(before) :] if text.startswith(before) else "" for text in decoded]
    found = []
    for id, (piece, text) in enumerate(zip(pieces, texts, strict=True)):
        if id in added or piece is None:
            found.append(added.get(id, "").encode())
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            found.append(bytes.fromhex(byte[1]))
        elif text:
            found.append(b"" if "\ufffd" in text and "\ufffd" not in piece else text.encode())
        else:
            found.append(bytes(letters.get(letter, 0) for letter in piece) if letters.keys() >= set(piece) else b"")
    return found


def _byte_letters() -> dict[str, int]:
    """Bytes by the letters that byte-level tokenizers write them with: printable ones for themselves, others from 256 on, in order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}


def from_replies(rows: Sequence[Mapping[str, Any]], examples: Sequence[Example], tokenizer: Any) -> tuple[list[Top], int]:
    """The teacher's log-probabilities while it wrote each row's response (its ``teacher_logprobs``), for the row's example.

    A row whose response the tokenizer cuts into other tokens than the teacher did gets no probabilities (ids of -1). Models write such
    tokens now and then ("C" and "at" for "Cat"); if the ids that the server names spell the response, the tokenizer is the teacher's all
    the same. An end token that the server leaves out or does not name gets none either; ``silent_positions`` counts them.

    Returns:
        Of each example, its ``Top``; and how many rows got none.

    Raises:
        CacheError: rows without log-probabilities, or with some that can't be read; a tokenizer that knows too few of the tokens, or cuts
            too many rows differently, where no ids show that it is the teacher's.
    """
    ids_of = TokenIds(tokenizer)
    special = special_ids(tokenizer)
    said = [_said(row, example.where or f"row {number}") for number, (row, example) in enumerate(zip(rows, examples, strict=True), 1)]
    width = 1 + max((len(token["top_logprobs"]) for tokens in said for token in tokens), default=0)
    tops, lost, foreign, known, unknown = [], [], [], 0, 0
    for number, (row, tokens, example) in enumerate(zip(rows, said, examples, strict=True), 1):
        scored = [example.teacher_ids[u + 1] for u in example.teacher_scored]
        top = _empty(len(scored), width)
        tops.append(top)
        reported = _matching(tokens, scored, ids_of, scored[-1] in special)
        if reported is None:
            lost.append(example.where or f"row {number}")
            if not _spells(tokens, row, tokenizer):
                foreign.append(lost[-1])
            continue
        for i, token in enumerate(reported):
            if token is None:
                continue
            others = [other for other in token["top_logprobs"] if other.get("logprob") is not None]
            found = {id: a["logprob"] for a in others if (id := ids_of(a)) is not None and 0 <= id < len(tokenizer)}
            known, unknown = known + len(found), unknown + len(others) - len(found)
            if token["logprob"] is not None:
                listed_as = found.setdefault(scored[i], token["logprob"])
                check_token(token, listed_as, f"{example.where or f'row {number}'}, token {i + 1} of the response")
            _fill(top, i, found)
    if len(foreign) > MOST_LOST * len(rows) or len(lost) == len(rows) or unknown > MOST_LOST * (known + unknown):
        thoughts = sum(bool(row.get("reasoning")) for row in rows)
        raise CacheError(
            f"the server's tokens can't be mapped to ids: {len(lost)} of {len(rows)} responses are cut into other tokens by the tokenizer "
            f"{f'({listed(lost)}) ' if lost else ''}and {unknown} of {known + unknown} alternatives have no token of their own. Give "
            "the teacher's own tokenizer, or a server that names ids (vLLM: return_tokens_as_token_ids)"
            + (
                f". {thoughts} rows have reasoning: its log-probabilities must be among the server's, written as by its template"
                * (thoughts > 0)
            )
        )
    check_tops(examples, tops)
    return tops, len(lost)


def check_token(token: Mapping[str, Any], listed_as: float, where: str) -> None:
    """Check what a server says of one token, alternatives without an id included.

    Raises:
        CacheError: log-probabilities above 0, more than a distribution, or of two temperatures.
    """
    values = [a["logprob"] for a in token["top_logprobs"] if a.get("logprob") is not None]
    numbers = np.asarray([[token["logprob"], *(values or [-np.inf])]])
    check_logprobs(np.zeros((1, 1), np.int32), numbers[:, :1], lambda _: where)
    check_logprobs(np.zeros((1, numbers.shape[1] - 1), np.int32), numbers[:, 1:], lambda _: where)
    if abs(listed_as - token["logprob"]) > SLACK * max(1.0, abs(listed_as)):
        raise CacheError(
            f"{where}: its log-probability is {token['logprob']:g}, and {listed_as:g} among the alternatives: both must be at one "
            "temperature"
        )


def _said(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The tokens in a row's ``teacher_logprobs``, each with a list of alternatives.

    Raises:
        CacheError: there are none, or not in this form.
    """
    tokens = row.get("teacher_logprobs")
    if not tokens:
        raise CacheError(f"{name} has no teacher_logprobs: make the data with `kdkernels generate --logprobs K`")
    if isinstance(tokens, Sequence) and all(map(_is_token, tokens)):
        said = [{"logprob": None, **token, "top_logprobs": token.get("top_logprobs") or []} for token in tokens]
        listed_well = all(isinstance(token["top_logprobs"], Sequence) and all(map(_is_token, token["top_logprobs"])) for token in said)
        if listed_well and any(token["logprob"] is not None for token in said):  # null in a row, which readers leave out
            return said
    raise CacheError(
        f"{name}, teacher_logprobs: a list is needed of objects with token (text), logprob and top_logprobs (a list of the same)"
    )


def _is_token(token: object) -> bool:
    return (
        isinstance(token, Mapping)
        and isinstance(token.get("token"), str)
        and (token.get("logprob") is None or (isinstance(token.get("logprob"), float | int) and abs(token["logprob"]) < 2**53))
        and all(isinstance(byte, int) and 0 <= byte < 256 for byte in token.get("bytes") or ())
    )


def _matching(
    said: Sequence[Mapping[str, Any]], scored: Sequence[int], ids_of: TokenIds, has_end: bool
) -> Sequence[Mapping[str, Any] | None] | None:
    """The server's entry for each scored token, None where there is none; None where the server's tokens are others.

    An entry that stands for several tokens has the probabilities of the last, if it names that. Of the last token, if it is the end token
    (``has_end``), the server may say nothing, or what can't be reported from other tokens.
    """
    reported: list[Mapping[str, Any] | None] = []
    for number, token in enumerate(said, 1):
        rest = scored[len(reported) :]
        if not rest:
            break
        if rest[0] in ids_of.candidates(token):
            reported.append(token)
        elif count := ids_of.spelling(token, rest):
            reported += [None] * (count - 1) + [token if token.get("id") == rest[count - 1] else None]
        elif has_end and len(rest) == 1 and number == len(said):
            reported.append(None)
        else:
            return None
    missing = len(scored) - len(reported)
    return [*reported, *[None] * missing] if missing <= 1 else None


def _spells(said: Sequence[Mapping[str, Any]], row: Mapping[str, Any], tokenizer: Any) -> bool:
    """Return whether the server names an id for every token, and the tokenizer decodes them to the row's response."""
    ids = [named_id(token) for token in said]
    if any(id is None or not 0 <= id < len(tokenizer) for id in ids):
        return False
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return bool(text.strip() == str(row.get("response", "")).strip())


def named_id(token: Mapping[str, Any]) -> int | None:
    """Return the id that a server names for an entry: llama.cpp in ``id``, vLLM in its text; None where it names none."""
    if isinstance(id := token.get("id"), int):
        return id
    named = NAMED.fullmatch(token["token"])
    return int(named[1]) if named else None


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of special tokens, those that end a turn among them."""
    return {*tokenizer.all_special_ids, *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)}


def silent_positions(examples: Sequence[Example], tops: Sequence[Top], tokenizer: Any) -> tuple[int, int]:
    """Scored positions without any probability, and how many of them are ends: special tokens that end a response."""
    special = special_ids(tokenizer)
    silent = ends = 0
    for example, (ids, _) in zip(examples, tops, strict=True):
        none = np.flatnonzero((ids < 0).all(-1))
        silent += len(none)
        last = len(ids) - 1
        ends += last in none and example.teacher_ids[example.teacher_scored[last] + 1] in special
    return silent, ends


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
            said = answer["choices"][0].get("prompt_logprobs")
            if said is None:
                raise NoLogprobs("the server gives no prompt_logprobs: it takes vLLM, or another server that knows them")
            if len(said) != length:
                raise Unreadable(f"it has {len(said)} prompt_logprobs for {length} tokens")
            # The entry of token u + 1 is the distribution at position u.
            kept = [{int(id): read_number(entry["logprob"]) for id, entry in (said[u + 1] or {}).items()} for u in scored]
            kept = [{id: logprob for id, logprob in row.items() if logprob is not None and 0 <= id < 2**31} for row in kept]
            return {"ids": [list(row) for row in kept], "prompt_logprobs": [list(row.values()) for row in kept], **counts_of(answer)}

        jobs.append(Job(request, request, body, read, example.where or f"request {request!r}"))
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
    options: Mapping[str, Any] | None = None,
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

    return write_shards(out, begun, plan, produce, started, report, options=options)
