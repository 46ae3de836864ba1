"""Convert rows of other tools to prompts, responses and messages: Alpaca, ShareGPT, and renamed columns."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from .errors import DataError
from .rows import Row, RowSource, read_rows
from .values import as_json, read_json

__all__ = ["Columns", "give_form", "training_rows"]

FORMS = ("prompt", "response", "completion", "messages", "text", "conversations", "instruction", "input", "output", "system", "history")
"""Fields that determine the form of a row. With ``--columns``, only the named ones are read."""
ASKED = ("prompt", "messages", "text", "conversations", "instruction")
"""Required fields of the forms."""
BESIDE = (
    "key", "weight", "task", "tools", "reasoning", "finish_reason", "demonstrations", "teacher_messages", "teacher_prompt",
)  # fmt: skip
LISTS = ("messages", "conversations", "demonstrations", "teacher_messages", "history")
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant",
    "system": "system", "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""Roles of ShareGPT's ``from``."""


class Columns:
    """Column names for the fields of a row, from text such as ``prompt=question,response=answer`` or a mapping.

    Raises:
        ValueError: the text has no pairs, a field is unknown, or a field is repeated.
    """

    def __init__(self, pairs: str | Mapping[str, str]) -> None:
        parts = [pair.partition("=") for pair in pairs.split(",")] if isinstance(pairs, str) else [(f, "=", c) for f, c in pairs.items()]
        self.named: dict[str, str] = {}
        for field, _, column in parts:
            field, column = field.strip(), str(column).strip()
            if not field or not column:
                raise ValueError(f"columns={pairs!r}: expected pairs of field=column, such as prompt=question,response=answer")
            if field not in (*FORMS, *BESIDE):
                near = difflib.get_close_matches(field, (*FORMS, *BESIDE), n=1, cutoff=0.5)
                known = f"nearest: {near[0]}" if near else f"choose from {', '.join((*FORMS, *BESIDE))}"
                raise ValueError(f"columns={pairs!r}: {field!r} is not a field of a row; {known}. Write field=column")
            if field in self.named:
                raise ValueError(f"columns={pairs!r}: {field!r} is given twice: leave one of the two out")
            self.named[field] = column
        self._seen: set[str] = set()

    def __str__(self) -> str:
        return ",".join(f"{field}={column}" for field, column in self.named.items())

    def rename(self, row: Row) -> None:
        """Rename the columns of a row to its fields. Form fields that are not named are dropped.

        Raises:
            DataError: the row lacks the column of its prompt, messages or text.
        """
        fields = {name: value for name, value in row.fields.items() if name not in FORMS and name not in self.named}
        for field, column in self.named.items():
            if column in row.fields:
                self._seen.add(field)
                fields[field] = row.fields[column]
            elif field in ASKED:
                raise row.error(column, f"--columns {field}={column} names this column, and the row has no value in it")
        row.fields = fields
        row.names.update(self.named)

    def unseen(self) -> list[str]:
        """Return the pairs whose column has not occurred in any row so far."""
        return [f"{field}={column}" for field, column in self.named.items() if field not in self._seen]

    def check_seen(self) -> None:
        """Check that every column occurred in at least one row.

        Raises:
            DataError: a column did not occur; the message names it.
        """
        if unseen := self.unseen():
            raise DataError(f"--columns {','.join(unseen)}: no row has such a column: correct the name, or leave it out")


def training_rows(source: RowSource, columns: str | Mapping[str, str] | None = None) -> Iterator[Row]:
    """Yield the rows of a source with the standard fields.

    Args:
        columns: names of columns, see ``Columns``.

    Raises:
        DataError: see ``read_rows``; an Alpaca or ShareGPT row is invalid; a column does not occur in any row.
    """
    named = None if columns is None else Columns(columns)
    for row in read_rows(source):
        give_form(row, named)
        yield row
    if named is not None:
        named.check_seen()


def give_form(row: Row, named: Columns | None) -> None:
    """Convert a row to the standard fields.

    Raises:
        DataError: a column is missing, or an Alpaca or ShareGPT row is invalid.
    """
    if named is not None:
        named.rename(row)
    if row.cells:
        _read_cells(row)
    if "conversations" in row:
        _of_sharegpt(row)
    if "instruction" in row and ("output" in row or not any(name in row for name in FORMS[:5])):
        _of_alpaca(row)


def _read_cells(row: Row) -> None:
    """Parse numbers and lists in text cells. Text that cannot be parsed is unchanged and raises where it is used."""
    for name in LISTS:
        if str(row.fields.get(name, "")).lstrip().startswith(("[", "{")):
            with suppress(ValueError):
                row.fields[name] = as_json(read_json(row.fields[name]))
    if "weight" in row:
        with suppress(ValueError):
            row.fields["weight"] = float(row.fields["weight"])


def _convert(row: Row, own: str, turns: list[Any]) -> None:
    """Give the row ``messages``, which errors call by the field's ``own`` name.

    Raises:
        DataError: it has messages already.
    """
    if "messages" in row:
        raise row.error(own, f"the row has {row.name('messages')!r} too, and can be read in two ways: choose one with --columns")
    row.fields["messages"] = turns
    row.names["messages"] = row.name(own)


def _of_sharegpt(row: Row) -> None:
    """Convert ``conversations``, a list of ``from`` and ``value``, to messages."""
    value = row.fields["conversations"]
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise row.error("conversations", 'a list of {"from": ..., "value": ...} is needed')
    turns = [_sharegpt_turn(row, number, turn) for number, turn in enumerate(value)]
    if isinstance(row.fields.get("system"), str) and turns[0].get("role") != "system":
        turns.insert(0, {"role": "system", "content": row.fields["system"]})
    _convert(row, "conversations", turns)
    del row.fields["conversations"]


def _sharegpt_turn(row: Row, number: int, turn: Mapping[str, Any]) -> dict[str, Any]:
    if "from" not in turn:
        return dict(turn)  # role and content are checked later
    role = ROLES.get(str(turn["from"]))
    if role is None:
        raise row.error(f"conversations[{number}].from", f"{turn['from']!r} is not one of {', '.join(ROLES)}")
    more = {name: part for name, part in turn.items() if name not in ("from", "value")}
    if turn["from"] != "function_call":
        return {"role": role, "content": turn.get("value"), **more}
    try:
        calls = json.loads(str(turn.get("value")))
    except ValueError:
        raise row.error(f"conversations[{number}].value", "a function_call needs JSON text with a name and arguments") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": role, "tool_calls": [{"type": "function", "function": call} for call in calls], **more}


def _of_alpaca(row: Row) -> None:
    """Convert ``instruction``, ``input`` and ``output`` to messages. The input follows the instruction on a new line."""
    asked = row.text("instruction")
    if row.fields.get("input", "") != "":
        asked += f"\n{row.text('input')}"
    turns = [{"role": "system", "content": row.text("system")}] if row.fields.get("system", "") != "" else []
    for pair in row.fields.get("history", []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.error("history", "a list of pairs of a question and its answer is needed")
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns.append({"role": "user", "content": asked})
    if "output" in row:
        turns.append({"role": "assistant", "content": row.fields["output"]})
    _convert(row, "output" if "output" in row else "instruction", turns)
    for name in ("instruction", "input", "output", "history"):
        row.fields.pop(name, None)
