"""Streamed data: read on demand with few examples in memory, in an order that depends on the seed, from any saved position."""

from __future__ import annotations

import base64
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from . import hub
from .collator import Item, pack
from .errors import DataError
from .example import Example
from .files import is_list
from .rows import Row, numbered_rows, parts_of

__all__ = ["ExampleStream", "Source"]

WINDOW = 256
"""Examples that are packed together."""
State = dict[str, Any]
"""A position in the data, as JSON."""


class Source:
    """An endless iterator over the examples of files and hub data sets.

    Each pass reads every row once. The next example is drawn from the ``buffer`` that were read first, so that with 1 the order is that of
    the rows.

    Args:
        names: files, folders and data sets of the hub.
        encode: makes the examples of a row; none of a row that is left out.
        seed: decides the draws.
        buffer: examples in memory that the next one is drawn from.

    Raises:
        DataError: no such file, or one that can only be read as a whole.
    """

    def __init__(self, names: Sequence[str], encode: Callable[[Row], list[Example]], seed: str, buffer: int) -> None:
        self.names, self.encode, self.seed, self.buffer = names, encode, seed, buffer
        self.parts = [part for name in names for part in parts_of(name)]
        self._status = {part: _status(part) for part in self.parts if isinstance(part, Path)}
        for part in self._status:
            if is_list(part):
                raise DataError(f"{part}: --streaming needs an object on each line, and this is one list: write it as JSONL")
        self._drawn, self._fruitful = 0, False
        self._waiting: list[Example] = []
        """Examples to draw from, in the order in which they were read."""
        self._reader: Iterator[tuple[int, Row]] | None = None
        self._opened: Any = None
        """The data set of the hub that is read."""
        self._hub: State | None = None
        self.restore({"part": 0, "row": 0, "hub": None, "drawn": 0, "fruitful": False, "buffer": []})

    def __next__(self) -> Example:
        """
        Raises:
            DataError: a row that can't be used; a pass without an example; a file that has changed.
        """
        self._fill()
        if not self._waiting:
            if not self._fruitful:
                raise DataError(f"{', '.join(self.names)}: no row is left to train on: all are too long or held out")
            self._part, self._fruitful = 0, False
            return next(self)
        index = random.Random(f"{self.seed}/{self._drawn}").randrange(min(self.buffer, len(self._waiting)))
        self._drawn, self._fruitful = self._drawn + 1, True
        return self._waiting.pop(index)

    @property
    def has_read_all(self) -> bool:
        """Return True if every row of this pass was read."""
        return self._part == len(self.parts)

    def rows(self) -> Iterator[Row]:
        """The rows from this position to the end of the pass."""
        while self._part < len(self.parts):
            part = self.parts[self._part]
            self._reader = self._reader or self._read(part)
            for number, row in self._reader:
                self._row = number
                yield row
            self._check_unchanged(part)
            self._part, self._row, self._hub, self._reader, self._opened = self._part + 1, 0, None, None, None

    def _fill(self) -> None:
        for row in self.rows() if len(self._waiting) < self.buffer else ():
            self._waiting += self.encode(row)
            if len(self._waiting) >= self.buffer:
                return

    def _read(self, part: str | Path) -> Iterator[tuple[int, Row]]:
        """The rows of a part behind the position in it, each with its number."""
        self._check_unchanged(part)
        if isinstance(part, Path):
            return numbered_rows(part, self._row)
        self._opened = hub.stream(part)
        if self._hub is not None:
            self._opened.load_state_dict(self._hub)
        return ((number, Row(fields, f"{part}, row {number}")) for number, fields in enumerate(self._opened, self._row + 1))

    def _check_unchanged(self, part: str | Path) -> None:
        if isinstance(part, Path) and _status(part) != self._status[part]:
            raise DataError(f"{part} has changed since the run was started: put the old file back, or train anew in another folder")

    def state(self) -> State:
        """Return this position and the examples in memory."""
        return {
            "part": self._part, "row": self._row, "hub": self._hub if self._opened is None else self._opened.state_dict(),
            "drawn": self._drawn, "fruitful": self._fruitful, "buffer": list(map(_to_json, self._waiting)),
        }  # fmt: skip

    def restore(self, state: State) -> None:
        """Continue at the position of a ``state``."""
        self._part, self._row, self._hub = state["part"], state["row"], state["hub"]
        self._drawn, self._fruitful = state["drawn"], state["fruitful"]
        self._waiting = list(map(_of_json, state["buffer"]))
        self._reader = self._opened = None


class ExampleStream(Dataset[Item]):
    """The items of a training that are made when they are asked for, in order: of steps 0, 1, ...

    Args:
        sources: where the examples come from.
        shares: of the examples from each source; None where there is one.
        steps: steps of the training.
        a_step: items of a step, in all processes.
        packed_to: tokens of an item of several examples; None for items of one.
        identity: names the content of the data.
    """

    def __init__(
        self, sources: Sequence[Source], shares: Sequence[float] | None, steps: int, a_step: int, packed_to: int | None, identity: str
    ) -> None:
        self.sources, self.shares, self.a_step, self.packed_to, self.identity = sources, shares or [1.0], a_step, packed_to, identity
        self._length = steps * a_step
        self._begin: State = {"first": 0, "items": [], "packed": [], "drawn": [0] * len(sources), "sources": [s.state() for s in sources]}
        self.restore(self._begin)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(self._length))

    @property
    def has_read_all(self) -> bool:
        """Return True if every row of this pass was read."""
        return all(source.has_read_all for source in self.sources)

    def __getitem__(self, index: int) -> Item:
        """
        Raises:
            IndexError: beyond the training, or an item that was forgotten.
        """
        if not self._first <= index < self._length:
            raise IndexError(f"item {index} of a stream that has come to {self._first} of {self._length}")
        while index >= self._first + len(self._items):
            self._items.append(self._next())
        return self._items[index - self._first]

    def _next(self) -> Item:
        if not self._packed:
            if self.packed_to is None:
                return (self._example(),)
            self._packed.extend(pack([self._example() for _ in range(WINDOW)], self.packed_to))
        return self._packed.popleft()

    def _example(self) -> Example:
        """The next example of the source that is furthest behind its share."""
        total = sum(self._drawn) + 1
        behind = [share / sum(self.shares) * total - drawn for share, drawn in zip(self.shares, self._drawn, strict=True)]
        source = behind.index(max(behind))
        self._drawn[source] += 1
        return next(self.sources[source])

    def state(self, step: int) -> State:
        """Return what the training needs to continue after ``step`` steps, and forget the items of those."""
        self.forget(step)
        return {
            "first": self._first, "items": [list(map(_to_json, item)) for item in self._items],
            "packed": [list(map(_to_json, item)) for item in self._packed], "drawn": list(self._drawn),
            "sources": [source.state() for source in self.sources],
        }  # fmt: skip

    def restore(self, state: State) -> None:
        """Continue with the training of a ``state``."""
        self._first: int = state["first"]
        self._items, self._packed = (deque(tuple(map(_of_json, item)) for item in state[name]) for name in ("items", "packed"))
        self._drawn: list[int] = list(state["drawn"])
        for source, position in zip(self.sources, state["sources"], strict=True):
            source.restore(position)

    def begin(self) -> None:
        """Go back to the first item, where it was forgotten."""
        if self._first:
            self.restore(self._begin)

    def forget(self, step: int) -> None:
        """Free the items of the first ``step`` steps."""
        while self._first < step * self.a_step:
            if not self._items:
                self._items.append(self._next())
            self._items.popleft()
            self._first += 1


def _status(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None for a file that is gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_size, stat.st_mtime_ns


# Examples as JSON

SAME = "same"


def _numbers(numbers: Sequence[int]) -> Any:
    """Bounds of a range, or the 32-bit integers in base64."""
    return [numbers.start, numbers.stop] if isinstance(numbers, range) else base64.b64encode(array("i", numbers).tobytes()).decode()


def _of_numbers(value: Any) -> Sequence[int]:
    return range(*value) if isinstance(value, list) else array("i", base64.b64decode(value))


def _to_json(example: Example) -> State:
    ids, scored = _numbers(example.student_ids), _numbers(example.student_scored)
    teacher_ids, teacher_scored = _numbers(example.teacher_ids), _numbers(example.teacher_scored)
    return {
        "student": [ids, scored], "teacher": SAME if (teacher_ids, teacher_scored) == (ids, scored) else [teacher_ids, teacher_scored],
        "weight": example.weight, "task": example.task, "where": example.where, "turns": example.turns,
        "unlearnt": list(map(_numbers, example.unlearnt)), "date": example.date,
    }  # fmt: skip


def _of_json(value: State) -> Example:
    student_ids, student_scored = map(_of_numbers, value["student"])
    teacher_ids, teacher_scored = (student_ids, student_scored) if value["teacher"] == SAME else map(_of_numbers, value["teacher"])
    return Example(
        student_ids, student_scored, teacher_ids, teacher_scored, value["weight"], value["task"], value["where"],
        tuple((count, weight) for count, weight in value["turns"]), tuple(range(*bounds) for bounds in value["unlearnt"]), value["date"],
    )  # fmt: skip
