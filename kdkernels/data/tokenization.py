"""Rows of text to token ids: the student's view, the teacher's view, and the response that both score."""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .ending import ended
from .example import Example
from .rows import DataError, Row, RowSource, read_rows
from .templates import chat_text, date_of

__all__ = ["RULES", "first_difference", "length_limit", "load_examples", "render"]

RULES = 2
"""Version of the rules that make a row into tokens. Raise it in a release that gives some row other tokens: a cache holds it."""


def load_examples(
    source: RowSource,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    overlong: str = "error",
    date: str | datetime.date | None = None,
) -> list[Example]:
    """Every row as an :class:`Example`.

    A row is one of

    - ``messages`` (the tokenizer's chat template) with a ``response``, or ending with the assistant's turn, which then is the response;
    - ``prompt`` with ``response`` or ``completion``: an end-of-text token follows. No token spans prompt and response;
    - ``text``: every token but the first is scored.

    The teacher reads the same, unless the row has ``teacher_messages``, ``teacher_prompt``, or ``demonstrations`` to read before the
    prompt. ``tools`` go to the chat template. A response whose ``finish_reason`` names a cut, such as
    ``"length"``, is learnt without an end. ``weight`` multiplies the row's loss; ``task`` is kept; other fields mean nothing here.

    Args:
        source: a JSONL or Parquet file, a folder of them, a ``datasets.Dataset`` or a list of rows.
        max_length: tokens of the longer view, at most.
        overlong: what happens to rows beyond it: ``"error"``, ``"drop"`` (with a warning that counts them) or ``"truncate"`` (the end of
            the response is cut off).
        date: what a chat template that writes the date writes into every row, such as ``"2026-11-28"``. Default: today.

    Raises:
        DataError: naming file, row and field.
    """
    found, dropped, longest = [], 0, 0
    day = date_of(tokenizer, date)  # one for all rows, though midnight may pass
    for row in read_rows(source):
        row.date = day
        example = _example(row, tokenizer)
        length = len(example)
        if max_length is not None and length > max_length:
            if overlong == "drop":
                dropped, longest = dropped + 1, max(longest, length)
                continue
            if overlong != "truncate":
                raise DataError(
                    f"{row.where}: {length} tokens, more than max_length={max_length}: raise it if the models can take more, "
                    "or choose overlong='drop' or overlong='truncate'"
                )
            example = _shortened(example, length - max_length, row)
        found.append(example)
    if dropped:
        warnings.warn(
            f"{dropped} of {dropped + len(found)} rows are over max_length={max_length} and left out; the longest has {longest} tokens",
            stacklevel=2,
        )
    if not found:
        raise DataError(f"no row is left: all {dropped} are over max_length={max_length}")
    return found


def _shortened(example: Example, cut: int, row: Row) -> Example:
    kept = len(example.student_scored) - cut
    if kept < 1:
        raise DataError(
            f"{row.where}: the prompt alone fills max_length, so no response token would be left: raise max_length or drop the row"
        )
    return dataclasses.replace(
        example,
        student_ids=example.student_ids[: len(example.student_ids) - cut],
        student_scored=example.student_scored[:kept],
        teacher_ids=example.teacher_ids[: len(example.teacher_ids) - cut],
        teacher_scored=example.teacher_scored[:kept],
    )


def _example(row: Row, tokenizer: Any) -> Example:
    if "messages" in row or isinstance(row.fields.get("prompt"), list):
        student, teacher, response = _chat(row, tokenizer)
    elif "prompt" in row:
        student, teacher, response = _prompted(row, tokenizer)
    elif "text" in row:
        if given := [name for name in ("teacher_messages", "teacher_prompt", "demonstrations") if name in row]:
            raise row.error(given[0], "a row of 'text' is one text for both models: give 'prompt' and 'response' instead")
        ids = _ended(_encode(tokenizer, row.text("text"), special=True), tokenizer)
        student, teacher, response = ids[:1], ids[:1], ids[1:]
    else:
        raise row.error("prompt", "a row needs 'prompt' and 'response', 'messages', or 'text'")
    if not response:
        raise row.error("text" if "text" in row else "response", "it holds no token to score")
    if not student or not teacher:
        raise row.error(
            "prompt", "it holds no token: the first token of a response needs one before it (a tokenizer with a BOS token adds one)"
        )
    return Example(
        array("i", student + response), range(len(student) - 1, len(student) + len(response) - 1),
        array("i", teacher + response), range(len(teacher) - 1, len(teacher) + len(response) - 1),
        row.number("weight", 1.0), row.text("task") if "task" in row else None,
        where=row.where, date=None if row.date is None else row.date.isoformat(),
    )  # fmt: skip


def length_limit(max_length: int | None, configs: Iterable[Any], packing: bool = False) -> int | None:
    """Tokens of a row: what was asked for, or what every model can take.

    Args:
        configs: of each model, that of its text.

    Raises:
        ValueError: more than a model can take, or packing into rows of no given length.
    """
    limits = [getattr(config, "max_position_embeddings", None) for config in configs]
    limit = min((int(n) for n in limits if isinstance(n, int) and n > 0), default=None)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(f"max_length={max_length}, but a model takes {limit} tokens (its max_position_embeddings): give that or less")
    if packing and max_length is None and limit is None:
        raise ValueError("packing=True needs max_length, since no model names a limit of its own")
    return max_length or limit


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    end = tokenizer.eos_token_id
    # What some tokenizers add at the end of a text does not belong between prompt and response.
    return ids[:-1] if special and len(ids) > 1 and ids[-1] == end else ids


def _continued(tokenizer: Any, given: str, text: str, special: bool) -> tuple[list[int], list[int]]:
    """Ids of ``given``, and of ``text`` where it stands after it.

    SentencePiece begins a text with a space of its own, which ``text`` must not get. Where a token would span both, each is tokenised
    apart, so that the response is what follows the ids that the model is asked with.
    """
    before, whole = _encode(tokenizer, given, special), _encode(tokenizer, given + text, special)
    return before, whole[len(before) :] if whole[: len(before)] == before else _encode(tokenizer, text, special=False)


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _cut_short(row: Row) -> bool:
    """The teacher was stopped in the middle of its response, after which no end may be learnt."""
    return not ended(row.fields.get("finish_reason"))


def _prompted(row: Row, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    prompt, name = row.text("prompt"), "completion" if "completion" in row and "response" not in row else "response"
    student, response = _continued(tokenizer, prompt, row.text(name), special=True)
    response = response if _cut_short(row) else _ended(response, tokenizer)
    teacher = student
    if "teacher_messages" in row:
        teacher = _encode(tokenizer, render(tokenizer, _shown_to_teacher(row, []), row, "teacher_messages"), special=False)
    elif "teacher_prompt" in row or "demonstrations" in row:
        asked = row.text("teacher_prompt") if "teacher_prompt" in row else prompt
        teacher = _encode(tokenizer, "".join("".join(demo) + "\n\n" for demo in _demonstrations(row)) + asked, special=True)
    return student, teacher, response


def _demonstrations(row: Row) -> list[str | tuple[str, str]]:
    """Each demonstration: text as it is, or a question and its answer."""
    value = row.fields.get("demonstrations", [])
    found: list[str | tuple[str, str]] = []
    for demo in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        fields = Row(demo, row.where) if isinstance(demo, Mapping) else None
        if fields is None and not isinstance(demo, str):
            raise row.error("demonstrations", "text, or objects with 'prompt' and 'response', are needed")
        found.append(demo if fields is None else (fields.text("prompt"), fields.text("response")))
    return found


def _chat(row: Row, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    name = "messages" if "messages" in row else "prompt"
    messages = row.messages(name)
    if isinstance(row.fields.get("completion"), list):
        answer, *more = row.messages("completion")
        if more:
            raise row.error("completion", f"one turn is needed, the assistant's, and there are {1 + len(more)}")
    elif "response" in row or "completion" in row:
        answer = {"role": "assistant", "content": row.text("response" if "response" in row else "completion")}
    elif messages[-1]["role"] == "assistant":
        answer = messages.pop()
    else:
        raise row.error("response", f"there is none, and {name!r} ends with the turn of the {messages[-1]['role']}, not the assistant")
    prefix, response = _split(tokenizer, messages, answer, row, name)
    content = str(answer.get("content", "")).strip()
    told = response[: response.rfind(content) + len(content)] if _cut_short(row) and content in response else response
    student, ids = _continued(tokenizer, prefix, told, special=False)
    ids = _cut(ids, tokenizer)
    shown, their_name = _shown_to_teacher(row, messages), "teacher_messages" if "teacher_messages" in row else name
    if shown is messages:
        return student, student, ids
    their_prefix, their_response = _split(tokenizer, shown, answer, row, their_name)
    if their_response != response:
        difference = first_difference(tokenizer, response, their_response)
        raise row.error(their_name, f"the chat template writes the response differently in the two views: {difference}")
    return student, _encode(tokenizer, their_prefix, special=False), ids


def _shown_to_teacher(row: Row, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the teacher reads before the response: ``messages``, which the student reads, unless the row says otherwise."""
    if "teacher_messages" in row:
        messages = row.messages("teacher_messages")
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        if not messages:
            raise row.error("teacher_messages", "there is no turn before the response")
    elif "teacher_prompt" in row:
        messages = [*messages[:-1], {"role": "user", "content": row.text("teacher_prompt")}]
    if "demonstrations" in row:
        messages = [*messages[:-1], *_turns(row), messages[-1]]
    return messages


def _turns(row: Row) -> list[dict[str, Any]]:
    turns = []
    for demo in _demonstrations(row):
        if isinstance(demo, str):
            raise row.error("demonstrations", "beside chat messages, objects with 'prompt' and 'response' are needed")
        turns += [{"role": "user", "content": demo[0]}, {"role": "assistant", "content": demo[1]}]
    return turns


def _cut(ids: list[int], tokenizer: Any) -> list[int]:
    """A response up to the last end-of-text token: what templates write after it is no part of what a model generates."""
    end = tokenizer.eos_token_id
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], row: Row, name: str, prompt: bool = True) -> str:
    """The conversation as the tokenizer's chat template writes it; with ``prompt`` up to where the assistant's turn begins.

    Raises:
        DataError: of the row's field ``name``: there is no template, or it refuses.
    """
    if tokenizer.chat_template is None:
        raise row.error(name, "the tokenizer has no chat template: set tokenizer.chat_template, or give rows with 'prompt' and 'response'")
    tools = row.fields.get("tools")
    if not isinstance(tools, list | None):
        raise row.error("tools", "a list of tools is needed, each described as the chat template wants it")
    try:
        return chat_text(tokenizer, messages, prompt=prompt, date=row.date, tools=tools)
    except Exception as error:  # a template may raise what it likes
        raise row.error(name, f"the chat template refuses it: {error}") from error


def _split(tokenizer: Any, messages: list[dict[str, Any]], answer: Mapping[str, Any], row: Row, name: str) -> tuple[str, str]:
    """The text that a model is given, and what it should write: the template with the answer, less the template that asks for it."""
    if not messages:
        raise row.error(name, "there is no turn before the response")
    prefix = render(tokenizer, messages, row, name)
    whole = render(tokenizer, [*messages, answer], row, name, prompt=False)
    if not whole.startswith(prefix):
        difference = first_difference(tokenizer, prefix, whole)
        raise row.error(name, f"the chat template does not put the response after the generation prompt: {difference}")
    return prefix, whole[len(prefix) :]


def first_difference(tokenizer: Any, one: str, other: str, other_tokenizer: Any = None) -> str:
    """In words: the first token in which two texts differ."""
    a, b = (t(text, add_special_tokens=False)["input_ids"] for t, text in ((tokenizer, one), (other_tokenizer or tokenizer, other)))
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    shown = [
        f"{t.decode(ids[at : at + 1])!r} (id {ids[at]})" if at < len(ids) else "the end"
        for t, ids in ((tokenizer, a), (other_tokenizer or tokenizer, b))
    ]
    return f"token {at} is {shown[0]} in one and {shown[1]} in the other"
