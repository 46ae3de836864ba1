"""Collate examples into batches, padded or packed, with the student's view and the teacher's view."""

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
"""Content of one row of a batch: an example, or several packed examples."""


@dataclass(frozen=True, eq=False)
class View:
    """One model's view of a batch. Both views score the same tokens in the same order.

    Rows may be packed; ``position_ids`` then restart at 0 for each example.
    """

    input_ids: Tensor  # [B, L]
    attention_mask: Tensor | None  # [B, L], 1 for a token; None if rows are packed without padding
    position_ids: Tensor | None  # [B, L] for packed rows, else None
    scored: Tensor  # [n] int64: positions in the flattened [B * L] whose next token is scored
    keys: tuple[str, ...] = ()
    """Cache key of each example, in order of ``scored``."""
    counts: tuple[int, ...] = ()
    """Number of scored tokens of each example; they add up to n."""


def pack(examples: Sequence[Example], max_length: int) -> list[Item]:
    """Pack examples into rows of at most ``max_length`` tokens in either view, each into the open row that it fills best."""
    rows: list[tuple[list[Example], int]] = []
    open_rows: list[int] = []  # limited in number, so that packing takes linear time
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
    """Convert items to a batch of tensors.

    The batch has ``input_ids``, ``attention_mask`` (padded rows) or ``position_ids`` (packed rows) and ``labels`` of the student's view,
    and the same with prefix ``teacher_``. For the n scored tokens it has ``scored`` and ``teacher_scored`` (positions in the flattened
    views), ``token_weights``, and ``response`` (False for scored tokens of the prompt). ``counts`` are scored tokens per example,
    ``sizes`` examples per item. ``labels`` contain only scored tokens, so that transformers counts the scored tokens.

    Args:
        pad_id: id for positions without a token.
        packed: rows have several examples; each starts at position 0, and there is no mask.
        flat: put all rows of a packed batch into one row without padding, for flash attention.
        kd_on_prompt: score prompts as well. Both views must have the same prompt.
        salt: salt of the cache keys; None for no keys.
        keep: include the items in the batch, for a student that writes its own responses.
        multiple: pad the teacher's rows to a multiple of this, but not beyond ``limit`` positions. With 16, a CPU's attention has no
            remainder with another summation order, so that the teacher's results do not depend on the batch and equal those of a cache
            bit for bit.
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
            for example, example_ids in zip(row, ids[number], strict=True):
                tokens[number, start : start + len(example_ids)] = torch.tensor(example_ids)
                positions[number, start : start + len(example_ids)] = torch.arange(len(example_ids))
                scored.append(torch.tensor(getattr(example, f"{side}_scored"), dtype=torch.int64) + number * length + start)
                start += len(example_ids)
            positions[number, start:] = torch.arange(length - start)  # padding counts as another example
        view = {f"{prefix}input_ids": tokens, f"{prefix}scored": torch.cat(scored)}
        if self.packed:
            view[f"{prefix}position_ids"] = positions
        else:
            view[f"{prefix}attention_mask"] = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
        return view


def _positions(example: Example) -> Tensor:
    """Return the scored positions of the student's view ``[n]``."""
    return torch.tensor(example.student_scored, dtype=torch.int64)


def _token_weights(examples: Sequence[Example]) -> Tensor:
    """Return the weight of each scored token: row weight times turn weight."""
    counts, weights = zip(*((count, e.weight * weight) for e in examples for count, weight in e.parts), strict=True)
    return torch.repeat_interleave(torch.tensor(weights), torch.tensor(counts))


def view_of(batch: Mapping[str, Any], prefix: str = "") -> View:
    """Return the student's view of a batch or, with ``"teacher_"``, the teacher's view."""
    get = batch.get
    return View(
        batch[f"{prefix}input_ids"], get(f"{prefix}attention_mask"), get(f"{prefix}position_ids"), batch[f"{prefix}scored"],
        tuple(get("keys", ())), tuple(batch["counts"]),
    )  # fmt: skip


def pad_id(tokenizer: Any, embeddings: int | None = None) -> int:
    """Return the id for positions without a token. Its value does not affect results.

    It is 0 if the tokenizer's pad id is beyond the models' ``embeddings`` (a pad token that was added only to the tokenizer).
    """
    pad = int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)
    return pad if embeddings is None or pad < embeddings else 0


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask ``[B, L]`` int64 of prompts for generation. Each prompt ends in the last column."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return ids, mask


def with_prompt(example: Example) -> Example:
    """Return the example with its prompt scored as well.

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
