"""Batches: the student's view and the teacher's view of the same examples, padded or packed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .example import Example

__all__ = ["IGNORED", "Collator", "Item", "View", "left_padded", "pack", "pad_id", "view_of"]

IGNORED = -100
Item = tuple[Example, ...]
"""What a row of a batch is made of: one example, or several that are packed."""


@dataclass(frozen=True, eq=False)
class View:
    """A batch as one of the two models sees it. Both views score the same tokens in the same order.

    Rows may be packed: ``position_ids`` then start anew with each example.
    """

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor | None  # [B, L], 1 for a token; None where rows are packed without padding
    position_ids: Tensor | None  # [B, L], given where rows are packed
    scored: Tensor  # [n] int64: positions in the flattened [B * L] whose next token is scored
    keys: tuple[str, ...] = ()
    """Of each example, in order of ``scored``: what a cache finds it by."""
    counts: tuple[int, ...] = ()
    """Of each example, how many of ``scored`` are its own; they add up to n."""


def pack(examples: Sequence[Example], max_length: int) -> list[Item]:
    """Rows of at most ``max_length`` tokens in either view: each example goes to the open row that it fills best."""
    rows: list[tuple[list[Example], int]] = []
    open_rows: list[int] = []  # a few only, so that a large data set takes linear time
    for example in examples:
        size = len(example)
        fitting = [i for i in open_rows if rows[i][1] + size <= max_length]
        if fitting:
            best = max(fitting, key=lambda i: rows[i][1])
            rows[best] = ([*rows[best][0], example], rows[best][1] + size)
        else:
            open_rows = [*open_rows[-15:], len(rows)]
            rows.append(([example], size))
    return [tuple(row) for row, _ in rows]


@dataclass(frozen=True)
class Collator:
    """Items to a batch of tensors.

    The batch holds ``input_ids``, ``attention_mask`` (padded rows) or ``position_ids`` (packed ones) and ``labels`` of the student's view,
    the same with ``teacher_`` before it, and of the n scored tokens: ``scored`` and ``teacher_scored`` (positions in the flattened view),
    ``token_weights``, and ``response`` (False where a token of the prompt is scored); ``counts`` of them per example, ``sizes`` of the
    items in examples. ``labels`` hold scored tokens only, so what is counted is what is scored.

    Args:
        pad_id: of positions without a token.
        packed: rows hold several examples, so each starts at position 0 and no mask is given.
        flat: all rows of a packed batch in one, without padding: what flash attention needs.
        kd_on_prompt: prompts are scored too, where both views have the same one.
        salt: of the keys that a cache finds examples by; None for no keys.
        keep: the batch holds its items too, for a student that writes its own responses.
        multiple: the teacher's rows are padded to a multiple of it, but not beyond ``limit`` positions. With 16 a CPU's attention has no
            remainder that it adds up in another order, so that what a teacher makes of an example does not depend on the batch, and a
            cache of it is what it would have said, bit for bit.
    """

    pad_id: int = 0
    packed: bool = False
    flat: bool = False
    kd_on_prompt: bool = False
    salt: str | None = None
    keep: bool = False
    multiple: int = 1
    limit: int | None = None

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        scored = [tuple(map(with_prompt, item)) if self.kd_on_prompt else item for item in items]
        rows = [tuple(example for item in scored for example in item)] if self.flat else scored
        examples = [example for item in scored for example in item]
        counts = [len(example.student_scored) for example in examples]
        batch: dict[str, Any] = {
            **self._view(rows, "student", ""),
            **self._view(rows, "teacher", "teacher_"),
            "counts": tuple(counts),
            "sizes": tuple(map(len, items)),
            "token_weights": _token_weights(examples),
        }
        flat = batch["input_ids"].flatten()
        labels = torch.full_like(flat, IGNORED)
        labels[batch["scored"] + 1] = flat[batch["scored"] + 1]
        batch["labels"] = labels.view_as(batch["input_ids"])
        if self.kd_on_prompt:
            pairs = zip(examples, (example for item in items for example in item), strict=True)
            batch["response"] = torch.cat([torch.isin(_positions(every), _positions(learnt)) for every, learnt in pairs])
        if self.salt is not None:
            batch["keys"] = tuple(example.key(self.salt) for example in examples)
        if self.keep:
            batch["items"] = tuple(items)
        return batch

    def _view(self, rows: Sequence[Item], side: str, prefix: str) -> dict[str, Tensor]:
        ids = [[getattr(example, f"{side}_ids") for example in row] for row in rows]
        lengths = [sum(map(len, row)) for row in ids]
        length = max(lengths)
        if side == "teacher" and not self.flat:
            length = max(length, min(-(-length // self.multiple) * self.multiple, self.limit or sys.maxsize))
        tokens = torch.full((len(rows), length), self.pad_id)
        positions = torch.arange(length).repeat(len(rows), 1)
        scored = []
        for number, row in enumerate(rows):
            start = 0
            for example, own in zip(row, ids[number], strict=True):
                tokens[number, start : start + len(own)] = torch.tensor(own)
                positions[number, start : start + len(own)] = torch.arange(len(own))
                scored.append(torch.tensor(getattr(example, f"{side}_scored"), dtype=torch.int64) + number * length + start)
                start += len(own)
            positions[number, start:] = torch.arange(length - start)  # padding is one more example
        view = {f"{prefix}input_ids": tokens, f"{prefix}scored": torch.cat(scored)}
        if self.packed:
            view[f"{prefix}position_ids"] = positions
        else:
            view[f"{prefix}attention_mask"] = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
        return view


def _positions(example: Example) -> Tensor:
    """The scored positions of the student's view ``[n]``."""
    return torch.tensor(example.student_scored, dtype=torch.int64)


def _token_weights(examples: Sequence[Example]) -> Tensor:
    """The weight of each scored token: that of its row times that of its turn."""
    counts, weights = zip(*((count, e.weight * weight) for e in examples for count, weight in e.parts), strict=True)
    return torch.repeat_interleave(torch.tensor(weights), torch.tensor(counts))


def view_of(batch: Mapping[str, Any], prefix: str = "") -> View:
    """The student's view of a batch, or with ``"teacher_"`` the teacher's."""
    get = batch.get
    return View(
        batch[f"{prefix}input_ids"], get(f"{prefix}attention_mask"), get(f"{prefix}position_ids"), batch[f"{prefix}scored"],
        tuple(get("keys", ())), tuple(batch["counts"]),
    )  # fmt: skip


def pad_id(tokenizer: Any, embeddings: int | None = None) -> int:
    """The id that fills positions without a token. Which one makes no difference, so where the tokenizer's is beyond the ``embeddings`` of
    the models (a pad token that was added to the tokenizer alone), it is 0."""
    wanted = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)
    return wanted if embeddings is None or wanted < embeddings else 0


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask ``[B, L]`` int64 of prompts to be continued: each ends in the last column."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def with_prompt(example: Example) -> Example:
    """The example with its prompt scored too.

    Raises:
        ValueError: the two views have different prompts.
    """
    if list(example.student_ids) != list(example.teacher_ids):
        raise ValueError(
            "kd_on_prompt=True scores prompts, but a row gives the teacher another prompt than the student: leave it False for such data"
        )
    stop = example.student_scored[-1] + 1 if example.student_scored else len(example.student_ids) - 1
    unlearnt = {position for turn in example.unlearnt for position in turn}
    every = [position for position in range(stop) if position not in unlearnt] if unlearnt else range(stop)
    weights: dict[int, float] = {}
    if example.turns:
        of_turns = (weight for count, weight in example.turns for _ in range(count))
        weights = dict(zip(example.student_scored, of_turns, strict=True))
    runs = groupby(weights.get(position, 1.0) for position in every) if weights else ()
    turns = tuple((len(list(run)), weight) for weight, run in runs)
    return dataclasses.replace(example, student_scored=every, teacher_scored=every, turns=turns)
