"""The data of ``kdkernels train --streaming``, which is read as it is needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from ...data.example import Example
from ...data.layouts import Columns, give_form
from ...data.rows import DataError, Row
from ...data.selection import is_held_out, prompt_digest
from ...data.streaming import ExampleStream, Source
from ...data.tokenization import RowTokenizer
from .settings import Settings
from .steps import items_per_step

__all__ = ["first_rows", "held_out_rows", "stream_of"]

MOST_HELD_OUT = 1000
"""Rows of ``--eval-fraction`` that are evaluated, at most. They are held in memory."""
FIRST = 100
"""Rows that are compared before the training."""


def stream_of(
    settings: Settings,
    tokenize: RowTokenizer,
    check: Callable[[Sequence[Example]], None],
    limit: int | None,
    identity: str,
    evaluated: Iterable[Row] = (),
) -> ExampleStream:
    """Return the examples to train on, once the first of them are read. Warns of what is wrong with those.

    Args:
        check: raises an error for examples that the models can't be given.
        limit: tokens of an example, at most.
        evaluated: rows held out of the data; rows with the same prompts are not trained on.

    Raises:
        DataError: one of the first rows can't be trained on, or none is left.
    """
    args, rows = settings.args, settings.rows
    columns = None if args.columns is None else Columns(args.columns)
    evaluated_prompts = {prompt_digest(row) for row in evaluated}
    count = 0

    def examples_of(row: Row) -> list[Example]:
        nonlocal count
        give_form(row, columns)
        if rows.eval_fraction is not None and (is_held_out(row, rows.eval_fraction) or prompt_digest(row) in evaluated_prompts):
            return []
        examples = tokenize(row)
        check(examples)
        count += len(examples)
        return examples

    groups = [settings.sources] if settings.shares is None else [[name] for name in settings.sources]
    sources = [Source(names, examples_of, f"{args.data_seed}/{number}", rows.shuffle_buffer) for number, names in enumerate(groups)]
    stream = ExampleStream(sources, settings.shares, args.max_steps, items_per_step(args), limit if args.packing else None, identity)
    stream[0]
    for warning in tokenize.warnings(count):
        warnings.warn(f"in the first rows of the data: {warning}", stacklevel=2)
    if columns is not None and columns.unseen():
        if stream.has_read_all:
            columns.check_seen()
        warnings.warn(f"--columns {','.join(columns.unseen())}: none of the first rows has such a column", stacklevel=2)
    return stream


def first_rows(settings: Settings) -> list[Row]:
    """Return rows from the beginning of the data."""
    return list(islice(_rows(settings.sources), FIRST))


def held_out_rows(settings: Settings) -> tuple[Any, str | None] | None:
    """Return what is evaluated, and names of columns that are still to be read; None where there is nothing.

    Of ``--eval-fraction`` it is the first rows of each source that are held out.

    Raises:
        DataError: no row is held out.
    """
    fraction, names = settings.rows.eval_fraction, settings.sources
    if fraction is None:
        return (settings.eval_data, settings.args.columns) if settings.eval_data else None
    columns = None if settings.args.columns is None else Columns(settings.args.columns)

    def held(name: str) -> Iterator[Row]:
        for row in _rows([name]):
            give_form(row, columns)
            if is_held_out(row, fraction):
                yield row

    most = -(-MOST_HELD_OUT // len(names))
    rows = [list(islice(held(name), most + 1)) for name in names]
    if any(len(part) > most for part in rows):
        warnings.warn(
            f"--eval-fraction {fraction:g} holds out more than {MOST_HELD_OUT:,} rows: the first are evaluated, the others left out",
            stacklevel=2,
        )
    held_out = [row for part in rows for row in part[:most]]
    if not held_out:
        raise DataError(f"--eval-fraction {fraction:g}: no row is held out. Give a larger fraction, or --eval-data")
    return held_out, None


def _rows(names: Sequence[str]) -> Iterator[Row]:
    return Source(names, lambda row: [], "", 1).rows()
