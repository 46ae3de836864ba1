"""Shared by all recipes: read rows with helpful errors, request each reply once, write rows whole or not at all."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.ending import ended
from ..data.rows import Row as Fields
from ..data.rows import read_rows
from ..support.files import Lines, digest
from ..teachers.replies import OtherRequest
from ..teachers.text import REFUSED, Reply, Request, TextModel

__all__ = [
    "Item", "Message", "RecipeError", "Row", "Sampling", "Tally", "ask", "cut_short", "extended", "fingerprint", "keyed", "once",
    "once_each",    "read_items", "read_jsonl", "student_row",
]  # fmt: skip

Message = Mapping[str, str]
Row = dict[str, Any]


class RecipeError(ValueError):
    """A recipe cannot use the data or an option. The message names the file, the row and the field, or the option."""


@dataclass(frozen=True)
class Item:
    """One row of the data: a conversation that ends with the user's turn, and its response, if it has one."""

    key: str
    messages: tuple[Message, ...]
    response: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    where: str = "row"

    @property
    def prompt(self) -> str:
        return self.messages[-1]["content"]

    @property
    def task(self) -> str | None:
        return self.row.get("task")

    def text(self, name: str) -> str:
        """Return another field of the row as text.

        Raises:
            RecipeError: the row lacks the field, or it is neither text nor a number.
        """
        return _text(self.row, name, self.where)


@dataclass(frozen=True)
class Sampling:
    """Sampling options: ``samples`` replies of at most ``max_tokens`` tokens to each prompt.

    Raises:
        RecipeError: several samples at temperature 0, which would all be the same text.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    samples: int = 1
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.samples < 1:
            raise RecipeError(f"max_tokens {self.max_tokens}, samples {self.samples}: both must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise RecipeError(f"temperature {self.temperature}: it must be finite and >= 0")
        if self.samples > 1 and self.temperature == 0:
            raise RecipeError(
                f"samples {self.samples} at temperature 0 are {self.samples} times the same text: raise the temperature, such as 0.7"
            )


@dataclass
class Tally:
    """Counts of input rows, candidates and kept candidates, with the reasons why others were dropped."""

    rows: int = 0
    candidates: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    agreed: int = 0
    """Given labels that a judge names too."""
    judged: int = 0
    """Given labels that a judge was asked about."""

    def drop(self, reason: str) -> None:
        self.dropped[reason] += 1


def read_jsonl(path: Path) -> list[tuple[str, Row]]:
    """Return the rows of a JSONL (or Parquet) file with their places (``data.jsonl, row 3``) for error messages. Empty lines are skipped.

    Raises:
        DataError: the file does not exist, has no rows, or a line is not a JSON object.
    """
    return [(row.where, row.fields) for row in read_rows(path)]


def read_items(path: Path, prompt: str = "prompt", response: str = "response", needs_response: bool = True) -> list[Item]:
    """Return the items of a JSONL file with ``messages`` or a prompt field, and a response field.

    The response of ``messages`` that end with the assistant's turn is that turn. For the keys, see ``keyed``.

    Raises:
        RecipeError: a row lacks its prompt or response, or has two responses, or two rows have the same key.
        DataError: see ``read_jsonl``.
    """
    items: list[Item] = []
    for key, where, row in keyed(read_jsonl(path)):
        if "messages" in row:
            messages, known = _messages(row, where)
        else:
            messages, known = ({"role": "user", "content": _text(row, prompt, where)},), None
        if known is not None and response in row:
            raise RecipeError(f"{where}, field {response!r}: messages end with the assistant's turn too: leave one of the two answers out")
        if response in row or (needs_response and known is None):
            known = _text(row, response, where)
        items.append(Item(key, messages, known, row, where))
    return items


def keyed(rows: Iterable[tuple[str, Row]]) -> list[tuple[str, str, Row]]:
    """Return ``(key, where, row)`` for each row. The key is the row's ``key``, else a hash of its content, so that its replies and draws do
    not depend on its position. Equal rows are numbered.

    Raises:
        RecipeError: two rows have the same key.
    """
    with_keys, seen, equal = [], dict[str, str](), Counter[str]()
    for where, row in rows:
        key = str(row["key"]) if row.get("key") is not None else fingerprint(row)
        if row.get("key") is None:
            equal[key] += 1
            key += f"#{equal[key]}" if equal[key] > 1 else ""
        if key in seen:
            raise RecipeError(f"{where}: key {key!r} is that of {seen[key]} already; keys must differ")
        seen[key] = where
        with_keys.append((key, where, row))
    return with_keys


def student_row(item: Item, response: str, *, prompt: str | None = None, suffix: str = "", chat: bool = True, **fields: Any) -> Row:
    """Return a row for ``kdkernels train``: the item's conversation with ``prompt`` as its last turn, and ``response``.

    ``chat=False`` writes ``prompt`` instead of ``messages``, for students without a chat template. Fields that are None are left out.

    Raises:
        RecipeError: ``chat=False``, but the conversation has several turns.
    """
    messages = item.messages if prompt is None else extended(item.messages, prompt)
    view: Row = {"messages": [dict(m) for m in messages]}
    if not chat:
        if len(messages) > 1:
            raise RecipeError(f"{item.where}: a conversation of {len(messages)} turns is not a plain prompt: leave the chat format on")
        view = {"prompt": messages[0]["content"]}
    return {"key": item.key + suffix, **view, "response": response, **{name: value for name, value in fields.items() if value is not None}}


def extended(messages: Sequence[Message], prompt: str) -> tuple[Message, ...]:
    """Return the conversation with ``prompt`` as its last turn."""
    return (*messages[:-1], {"role": "user", "content": prompt})


def ask(
    model: TextModel, log: Path, prompts: Sequence[tuple[str, Sequence[Message]]], sampling: Sampling, *, replaceable: bool = False
) -> list[list[Reply]]:
    """Return ``sampling.samples`` replies to each ``(key, messages)``. Requests with a reply in ``log`` are not sent again.

    The key of a request contains a hash of its content, so that a log cannot answer a changed request.

    Args:
        replaceable: if ``log`` has another model's replies, write to a log beside it (``judge-2.jsonl``), with a warning.
    """
    requests = [
        Request(
            f"{key}/{sample}/{fingerprint([list(map(dict, messages)), sampling.max_tokens, sampling.temperature, sampling.stop])}",
            messages, sampling.max_tokens, sampling.temperature, sampling.stop,
        )
        for key, messages in prompts
        for sample in range(sampling.samples)
    ]  # fmt: skip
    if not requests:
        return []
    log.parent.mkdir(parents=True, exist_ok=True)
    replies = _complete(model, requests, log) if replaceable else model.complete(requests, log)
    return [list(replies[i : i + sampling.samples]) for i in range(0, len(replies), sampling.samples)]


def _complete(model: TextModel, requests: Sequence[Request], log: Path, number: int = 1) -> list[Reply]:
    """Return the replies of ``model``, using the first of ``log`` and its successors without another model's replies."""
    path = log if number == 1 else log.with_stem(f"{log.stem}-{number}")
    try:
        return list(model.complete(requests, path))
    except OtherRequest:
        following = log.with_stem(f"{log.stem}-{number + 1}")
    warnings.warn(f"{path.name} holds replies of another model or seed: those of this one are in {following.name}", stacklevel=3)
    return _complete(model, requests, log, number + 1)


def cut_short(reply: Reply) -> str | None:
    """Return the reason for dropping a reply that did not end by itself; None for any other reply."""
    if reply.finish_reason == REFUSED:
        return "refused by the server"
    if ended(reply.finish_reason):
        return None
    return "cut off at max_tokens" if reply.finish_reason == "length" else f"cut off (finish_reason {reply.finish_reason[:60]})"


def once(
    log: Path,
    keys: Sequence[str],
    make: Callable[[list[str]], list[str]],
    batch: int = 1,
    report: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Return the same as ``once_each``, for text alone."""
    return [str(made["text"]) for made in once_each(log, keys, lambda some: [{"text": text} for text in make(some)], batch, report)]


def once_each(
    log: Path,
    keys: Sequence[str],
    make: Callable[[list[str]], list[dict[str, Any]]],
    batch: int = 1,
    report: Callable[[int], object] = lambda count: None,
) -> list[dict[str, Any]]:
    """Return an object with ``text`` for each key. Those in ``log`` (JSONL) are read; ``make(keys)`` makes the others, at most ``batch`` at
    a time, and they are added to the log. ``report`` is called with the number of new objects.

    An incomplete last line, left by a killed process, is made again.
    """
    with Lines(log, _is_text) as lines:
        known = {str(line.get("key")): {"text": "", **line} for line in lines}
        missing = [key for key in keys if key not in known]
        report(len(keys) - len(missing))
        for start in range(0, len(missing), batch):
            some = missing[start : start + batch]
            for key, made in zip(some, make(some), strict=True):
                known[key] = made
                lines.append({"key": key, **made})
            report(len(some))
    return [known[key] for key in keys]


def _is_text(line: Mapping[str, Any]) -> bool:
    """Return whether a line was written by ``once_each``, for logs without a marker."""
    return set(line) == {"key", "text"} and re.fullmatch(r".+/[0-9a-f]{12}", str(line["key"])) is not None


def fingerprint(value: Any) -> str:
    """Return the first 12 hexadecimal digits of the sha256 of a JSON value."""
    return digest(value)[:12]


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        found = "there is none" if name not in row else f"it is {json.dumps(value)[:60]}"
        raise RecipeError(f"{where}, field {name!r}: text is needed, and {found}. The row has: {', '.join(map(str, row)) or 'nothing'}")
    return value


def _messages(row: Mapping[str, Any], where: str) -> tuple[tuple[Message, ...], str | None]:
    """Return the conversation up to the user's last turn, and the assistant's turn after it, if any."""
    turns = Fields(row, where).messages("messages")
    known = turns.pop().get("content") if turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise RecipeError(f"{where}, field 'messages': the last turn, but for the assistant's, must be the user's")
    return tuple(turns), known
