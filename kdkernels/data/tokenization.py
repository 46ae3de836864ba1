"""Rows of text to examples: which rows are read, how long they may be, and what became of those that were too long."""

from __future__ import annotations

import datetime
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..support.errors import counted
from .example import Example
from .forms import Learn, Reasoning, RowEncoder
from .layouts import training_rows
from .rows import DataError, Row, RowSource, check_fits
from .templates import date_of

__all__ = ["RULES", "RowTokenizer", "Tally", "length_limit", "load_examples"]

RULES = 2
"""Version of the rules that convert a row to tokens, saved in caches. Increment it in a release that gives other tokens for some row."""


@dataclass
class Tally:
    """Counts of rows that were dropped, cut, split, or have reasoning."""

    dropped: int = 0
    """Number of dropped rows over the length."""
    longest: int = 0
    """Tokens of the longest dropped row."""
    cut: int = 0
    """Number of rows whose response was cut."""
    cut_tokens: int = 0
    split: int = 0
    """Number of text rows that were split."""
    blocks: int = 0
    """Number of blocks of the split rows."""
    reasoning: Counter[str] = field(default_factory=Counter)
    """Number of rows with reasoning by treatment: ``template`` (as the chat template writes it), ``tags`` or ``dropped``."""

    def of_lengths(self, max_length: int | None, kept: int, overlong: str) -> str | None:
        """Return a sentence about rows over the length, or None."""
        count = self.dropped + kept - self.blocks + self.split
        if self.split:
            return f"{self.split} of {count} rows are over max_length={max_length}: split into {self.blocks:,} blocks"
        if overlong == "truncate" and self.cut + self.dropped:
            alone = f", and left out {self.dropped} whose prompt alone fills it" if self.dropped else ""
            over = f"{self.cut + self.dropped} of {count} rows are over max_length={max_length}"
            return f"{over}: cut {self.cut}, by {self.cut_tokens:,} tokens of their responses{alone}"
        if self.dropped:
            return f"{self.dropped} of {count} rows are over max_length={max_length} and left out; the longest has {self.longest} tokens"
        return None

    def of_reasoning(self) -> list[str]:
        """Return a sentence for each treatment of reasoning."""
        ways = {
            "template": "learnt as the chat template writes reasoning_content",
            "tags": "learnt between <think> and </think>",
            "dropped": "left out (--reasoning drop)",
        }
        return [f"reasoning of {counted(self.reasoning[way], 'row')}: {words}" for way, words in ways.items() if self.reasoning[way]]


def load_examples(
    source: RowSource,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    overlong: str = "error",
    date: str | datetime.date | None = None,
    reasoning: Reasoning = "learn",
    columns: str | Mapping[str, str] | None = None,
    learn: Learn | None = None,
    tally: Tally | None = None,
    prompts: bool = False,
) -> list[Example]:
    """Every row as an :class:`Example`.

    A row is one of

    - ``messages`` (the tokenizer's chat template) with a ``response``, or ending with the assistant's turn, which then is the response;
    - ``prompt`` with ``response`` or ``completion``: an end-of-text token follows. No token spans prompt and response;
    - ``text``: every token but the first is scored;
    - Alpaca's ``instruction``, ``input`` and ``output``, or ShareGPT's ``conversations``: read as ``messages``.

    A row that can be read in two of these ways is refused. A chat response is learnt up to the token that ends the template's turns.
    ``reasoning`` beside a response, or ``reasoning_content`` in its turn, is learnt before it, as the chat template writes it, or between
    ``<think>`` and ``</think>``.

    The teacher reads the same, unless the row has ``teacher_messages``, ``teacher_prompt``, or ``demonstrations`` to read before the
    prompt. The ``weight`` of a message of the assistant multiplies the loss of its turn; with 0 it is not scored. ``tools`` go to the chat
    template. A response whose ``finish_reason`` names a cut, such as
    ``"length"``, is learnt without an end. ``weight`` multiplies the row's loss; ``task`` is kept; other fields mean nothing here.

    Args:
        source: a JSONL, JSON, CSV, Parquet or text file, a folder of them, a data set of the hub (``org/name[:SPLIT[:CONFIG]]``), several
            of these, a ``datasets.Dataset``, or a list of rows.
        max_length: tokens of the longer view, at most.
        overlong: what happens to rows beyond it: ``"error"``, ``"drop"``, ``"truncate"`` (the end is cut off; a row whose prompt alone
            fills the length is left out) or ``"split"`` (a row of ``text`` becomes blocks in which each of its tokens but the first is
            scored once). A warning counts them.
        date: what a chat template that writes the date writes into every row, such as ``"2026-11-28"``. Default: today.
        reasoning: ``"learn"``, or ``"drop"`` to learn the response alone.
        columns: names of columns for the fields of a row, as ``"prompt=question,response=answer"``. Other fields that would make a row
            another form are then not read.
        learn: ``"all"`` turns of the assistant in ``messages`` that end with one, or the ``"last"``. Beside a response, demonstrations or
            any ``teacher_*`` field only the response is learnt. None is ``"all"``, but where the chat template writes an earlier turn
            otherwise than the last, the row is learnt as with ``"last"``; a warning counts them.
        tally: counts rows that were dropped or cut, and those with reasoning.
        prompts: a row may be without a response, because the student writes all of them: a full stop is in its place.

    Raises:
        DataError: naming file, row and field.
    """
    check_fits(source)
    tokenize = RowTokenizer(
        tokenizer, max_length=max_length, overlong=overlong, date=date, reasoning=reasoning, learn=learn, tally=tally, prompts=prompts
    )
    examples = [example for row in training_rows(source, columns) for example in tokenize(row)]
    for warning in tokenize.warnings(len(examples)):
        warnings.warn(warning, stacklevel=2)
    return examples


class RowTokenizer:
    """Makes the examples of one row at a time.

    Args:
        tokenizer: of both models; the others as for ``load_examples``.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        overlong: str = "error",
        date: str | datetime.date | None = None,
        reasoning: Reasoning = "learn",
        learn: Learn | None = None,
        tally: Tally | None = None,
        prompts: bool = False,
    ) -> None:
        self.max_length, self.overlong, self.prompts = max_length, overlong, prompts
        self.tally, self.encode = tally if tally is not None else Tally(), RowEncoder(tokenizer, reasoning, learn)
        self.date = date_of(tokenizer, date)  # one for all rows, though midnight may pass

    def __call__(self, row: Row) -> list[Example]:
        """Return the examples of a row with the fields that trainings know: one, several of a text that is split, or none.

        Raises:
            DataError: naming file, row and field.
        """
        row.date = self.date
        if self.prompts and not _has_response(row):
            row.fields["response"] = "."
        return _fitting(self.encode(row), row, self.max_length, self.overlong, self.tally)

    def warnings(self, count: int) -> list[str]:
        """Return sentences about the rows so far that were not taken as they are.

        Args:
            count: examples that were made of them.

        Raises:
            DataError: there are none.
        """
        self.tally.reasoning.update(self.encode.thoughts)
        if not count:
            raise DataError(f"no row is left: all {self.tally.dropped} are over max_length={self.max_length}")
        sentences = [self.tally.of_lengths(self.max_length, count, self.overlong)]
        if self.encode.only_last:
            sentences.append(
                f"of {self.encode.only_last:,} conversations only the last turn of the assistant is learnt, since the chat template writes "
                "an earlier turn otherwise than the last: choose learn='last' to say so, or a template with {% generation %}"
            )
        return [sentence for sentence in sentences if sentence is not None]


def _fitting(example: Example, row: Row, max_length: int | None, overlong: str, tally: Tally) -> list[Example]:
    """The example within ``max_length`` tokens: as it is, cut, in blocks, or none.

    Raises:
        DataError: it is longer, and ``overlong`` does not say what to do with such a row.
    """
    length = len(example)
    if max_length is None or length <= max_length:
        return [example]
    over = f"{row.where}: {length} tokens, more than max_length={max_length}"
    if overlong == "split":
        if "text" not in row or max_length < 2:
            reason = "only rows of 'text' are split" if "text" not in row else "a block needs 2 tokens"
            raise DataError(f"{over}, and {reason}: raise it, or choose overlong='drop' or overlong='truncate'")
        blocks = example.blocks(max_length)
        tally.split, tally.blocks = tally.split + 1, tally.blocks + len(blocks)
        return blocks
    if overlong not in ("drop", "truncate"):
        raise DataError(
            f"{over}: raise it if the models can take more, or choose overlong='drop', overlong='truncate' or, for text, overlong='split'"
        )
    shortened = None if overlong == "drop" else example.cut_to(max_length)
    if shortened is None:
        tally.dropped, tally.longest = tally.dropped + 1, max(tally.longest, length)
        return []
    tally.cut, tally.cut_tokens = tally.cut + 1, tally.cut_tokens + length - max_length
    return [shortened]


def _has_response(row: Row) -> bool:
    turns = row.fields.get("messages", row.fields.get("prompt"))
    last = turns[-1] if isinstance(turns, list) and turns else None
    return any(name in row for name in ("response", "completion", "text")) or (
        isinstance(last, Mapping) and last.get("role") == "assistant"
    )


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
