"""Write a ``topk`` cache from a server's log-probabilities: of tokens that it generated, or of given tokens (vLLM's ``prompt_logprobs``).

A server names tokens by their text, but the cache needs ids. The teacher's tokenizer maps one to the other; if it cannot, the cache is not
written. Tokens that the server does not list are part of the tail (``tail="bucket"``), whose probability is 1 minus the listed ones.
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
"""Maximum share of rows or alternatives without a match. With more, the tokenizer is not the teacher's."""
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
        """Return the id of an entry of a server's list; None if no token, or more than one, matches."""
        ids = self.candidates(token)
        return ids[0] if len(ids) == 1 else None

    def candidates(self, token: Mapping[str, Any]) -> Sequence[int]:
        """Return the ids that match an entry of a server's list: the id in the entry, else the ids of its bytes, else of its text."""
        if (id := named_id(token)) is not None:
            return [id]
        text, raw = token["token"], token.get("bytes")
        if raw:
            return self._ids.get(bytes(raw), [])
        if "\ufffd" in text:  # part of an unknown character
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
    """Return the bytes of each id; b"" if they are unknown."""
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    letters = _byte_letters()
    plain = [piece for id, piece in enumerate(pieces) if piece is not None and id not in added]
    if letters.keys() >= {letter for piece in plain for letter in piece}:  # byte-level
        texts = [""] * len(pieces)
    else:
        # Decode each token after another one, because a leading space is dropped at the start of a text.
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
        before = tokenizer.decode(anchor)
        decoded = tokenizer.batch_decode([[*anchor, id] for id in range(len(pieces))])
        texts = [text[len(before) :] if text.startswith(before) else "" for text in decoded]
    encoded = []
    for id, (piece, text) in enumerate(zip(pieces, texts, strict=True)):
        if id in added or piece is None:
            encoded.append(added.get(id, "").encode())
        elif byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
            encoded.append(bytes.fromhex(byte[1]))
        elif text:
            encoded.append(b"" if "\ufffd" in text and "\ufffd" not in piece else text.encode())
        else:
            encoded.append(bytes(letters.get(letter, 0) for letter in piece) if letters.keys() >= set(piece) else b"")
    return encoded


def _byte_letters() -> dict[str, int]:
    """Return the byte of each letter of byte-level tokenizers: printable bytes are their own letter, the others follow from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(others)}}


def from_replies(rows: Sequence[Mapping[str, Any]], examples: Sequence[Example], tokenizer: Any) -> tuple[list[Top], int]:
    """Return the log-probabilities in each row's ``teacher_logprobs``, which the teacher had while it wrote the response.

    A row gets no probabilities (ids of -1) if the tokenizer splits its response into other tokens than the teacher generated, as happens
    now and then ("C" and "at" for "Cat"). If the ids that the server names spell the response, this does not count against the tokenizer.
    An end token gets no probabilities if the server omits it or does not name it; ``silent_positions`` counts such positions.

    Returns:
        The ``Top`` of each example, and the number of rows without probabilities.

    Raises:
        CacheError: log-probabilities are missing or cannot be read, or the tokenizer is not the teacher's: it lacks too many of the
            alternatives, or splits too many rows differently.
    """
    ids_of = TokenIds(tokenizer)
    special = special_ids(tokenizer)
    named = [example.where or f"row {number}" for number, example in enumerate(examples, 1)]
    listings = [_tokens_of(row, name) for row, name in zip(rows, named, strict=True)]
    width = 1 + max((len(token["top_logprobs"]) for tokens in listings for token in tokens), default=0)
    tops, lost, foreign, known, unknown = [], [], [], 0, 0
    for row, name, tokens, example in zip(rows, named, listings, examples, strict=True):
        scored = [example.teacher_ids[u + 1] for u in example.teacher_scored]
        top = _empty(len(scored), width)
        tops.append(top)
        reported = _matching(tokens, scored, ids_of, scored[-1] in special)
        if reported is None:
            lost.append(name)
            if not _spells(tokens, row, tokenizer):
                foreign.append(name)
            continue
        for i, token in enumerate(reported):
            if token is None:
                continue
            others = [other for other in token["top_logprobs"] if other.get("logprob") is not None]
            logprobs = {id: a["logprob"] for a in others if (id := ids_of(a)) is not None and 0 <= id < len(tokenizer)}
            known, unknown = known + len(logprobs), unknown + len(others) - len(logprobs)
            if token["logprob"] is not None:
                listed_as = logprobs.setdefault(scored[i], token["logprob"])
                check_token(token, listed_as, f"{name}, token {i + 1} of the response")
            _fill(top, i, logprobs)
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
    """Check the log-probabilities of one token and its alternatives, those without an id too.

    Args:
        listed_as: log-probability of the token in the list of alternatives.

    Raises:
        CacheError: a log-probability is above 0, the probabilities sum to more than 1, or the two log-probabilities of the token differ.
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


def _tokens_of(row: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the tokens in a row's ``teacher_logprobs``, each with a list of alternatives.

    Raises:
        CacheError: the field is missing or has another form.
    """
    tokens = row.get("teacher_logprobs")
    if not tokens:
        raise CacheError(f"{name} has no teacher_logprobs: make the data with `kdkernels generate --logprobs K`")
    if isinstance(tokens, Sequence) and all(map(_is_token, tokens)):
        entries = [{"logprob": None, **token, "top_logprobs": token.get("top_logprobs") or []} for token in tokens]
        valid = all(isinstance(entry["top_logprobs"], Sequence) and all(map(_is_token, entry["top_logprobs"])) for entry in entries)
        if valid and any(entry["logprob"] is not None for entry in entries):  # readers drop fields that are null
            return entries
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
    tokens: Sequence[Mapping[str, Any]], scored: Sequence[int], ids_of: TokenIds, has_end: bool
) -> Sequence[Mapping[str, Any] | None] | None:
    """Return the server's entry for each scored token (None without an entry), or None if the server's tokens are other tokens.

    An entry for several tokens has the probabilities of the last one if it names its id. If the last token is the end token (``has_end``),
    the server may omit its entry, or name it in a form that no token matches.
    """
    reported: list[Mapping[str, Any] | None] = []
    for number, token in enumerate(tokens, 1):
        rest = scored[len(reported) :]
        if not rest:
            break
        if rest[0] in ids_of.candidates(token):
            reported.append(token)
        elif count := ids_of.spelling(token, rest):
            reported += [None] * (count - 1) + [token if token.get("id") == rest[count - 1] else None]
        elif has_end and len(rest) == 1 and number == len(tokens):
            reported.append(None)
        else:
            return None
    missing = len(scored) - len(reported)
    return [*reported, *[None] * missing] if missing <= 1 else None


def _spells(tokens: Sequence[Mapping[str, Any]], row: Mapping[str, Any], tokenizer: Any) -> bool:
    """Return whether the server names an id for every token, and the tokenizer decodes them to the row's response."""
    ids = [named_id(token) for token in tokens]
    if any(id is None or not 0 <= id < len(tokenizer) for id in ids):
        return False
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return bool(text.strip() == str(row.get("response", "")).strip())


def named_id(token: Mapping[str, Any]) -> int | None:
    """Return the id in a server's entry: in ``id`` for llama.cpp, in its text for vLLM; None without an id."""
    if isinstance(id := token.get("id"), int):
        return id
    named = NAMED.fullmatch(token["token"])
    return int(named[1]) if named else None


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the special tokens, including those that end a turn."""
    return {*tokenizer.all_special_ids, *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)}


def silent_positions(examples: Sequence[Example], tops: Sequence[Top], tokenizer: Any) -> tuple[int, int]:
    """Return the number of scored positions without probabilities, and how many of them are a special token that ends a response."""
    special = special_ids(tokenizer)
    silent = ends = 0
    for example, (ids, _) in zip(examples, tops, strict=True):
        none = np.flatnonzero((ids < 0).all(-1))
        silent += len(none)
        last = len(ids) - 1
        ends += last in none and example.teacher_ids[example.teacher_scored[last] + 1] in special
    return silent, ends


def score(model: HTTPModel, examples: Sequence[Example], k: int, log: Path) -> list[Top]:
    """Return the ``k`` most likely tokens at each scored position, from a server that accepts token ids and ``prompt_logprobs`` (vLLM).

    Raises:
        HTTPModelError, FileError: see ``HTTPModel.complete``.
    """
    jobs = []
    for example in examples:
        ids, scored = list(example.teacher_ids), list(example.teacher_scored)
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k}
        request = digest([ids, scored, k, model.settings])

        def read(answer: dict[str, Any], scored: list[int] = scored, length: int = len(ids)) -> dict[str, Any]:
            listings = answer["choices"][0].get("prompt_logprobs")
            if listings is None:
                raise NoLogprobs("the server gives no prompt_logprobs: use vLLM, or another server that supports them")
            if len(listings) != length:
                raise Unreadable(f"it has {len(listings)} prompt_logprobs for {length} tokens")
            # The entry of token u + 1 is the distribution at position u.
            rows = [{int(id): read_number(entry["logprob"]) for id, entry in (listings[u + 1] or {}).items()} for u in scored]
            rows = [{id: logprob for id, logprob in row.items() if logprob is not None and 0 <= id < 2**31} for row in rows]
            return {"ids": [list(row) for row in rows], "prompt_logprobs": [list(row.values()) for row in rows], **counts_of(answer)}

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
    """Check ids and log-probabilities of all examples.

    Raises:
        CacheError: the log-probabilities of a row are not those of a distribution; the message names the row.
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


def _fill(top: Top, row: int, logprobs: Mapping[int, float]) -> None:
    """Write the most likely tokens of a row, in falling order, as many as fit."""
    best = sorted(logprobs.items(), key=lambda item: (-item[1], item[0]))[: top[0].shape[1]]
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
    """Write a ``topk`` cache of log-probabilities; ``identity.k`` is their width.

    Raises:
        CacheError: an id is outside the vocabulary, or the log-probabilities of a row are not those of a distribution (the message names
            the row); see also ``write_cache``.
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
