"""The examples of a run: rows of ``--data``, drawn by shares, and held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...data.agreement import check_ids
from ...data.example import Example
from ...data.layouts import training_rows
from ...data.rows import RowSource
from ...data.selection import draw, hold_out
from ...data.streaming import ExampleStream
from ...data.templates import date_of
from ...data.tokenization import RowTokenizer, Tally, load_examples
from ...support.files import digest
from .settings import Settings, TrainError
from .streamed import held_out_rows, stream_of

__all__ = ["RunData", "read_data"]


@dataclass(frozen=True)
class RunData:
    """Examples to train on, and those to evaluate on."""

    train: list[Example] | ExampleStream
    held_out: list[Example] | None = None


def read_data(
    settings: Settings,
    tokenizer: Any,
    cache: Any,
    limit: int | None,
    embeddings: int | None,
    tally: Tally | None = None,
    content: Any = None,
) -> RunData:
    """Tokenise the data of a run. Sets ``template_date`` of its arguments, which a resumed run needs.

    Args:
        cache: the cache used instead of a teacher, or None.
        limit: maximum tokens of an example.
        embeddings: rows of the models' smallest embedding.
        tally: counts training rows that were dropped, cut or split, and rows with reasoning.
        content: digests of the data, which a streamed run is known by.

    Raises:
        DataError: a row cannot be used, or one side of ``--eval-fraction`` has no rows.
    """
    args = settings.args
    day = date_of(tokenizer, args.template_date or getattr(cache, "date", None))
    args.template_date = None if day is None else day.isoformat()
    options = {"max_length": limit, "overlong": args.overlong, "date": day, "reasoning": args.reasoning, "learn": args.learn}
    prompts = args.on_policy_fraction == 1  # are enough

    def examples(source: RowSource, columns: str | None, **more: Any) -> list[Example]:
        made = load_examples(source, tokenizer, columns=columns, **options, **more)
        check_ids(made, tokenizer, embeddings)
        return made

    if settings.rows.streaming:
        held = held_out_rows(settings)
        evaluated = None if held is None else examples(*held)
        tokenize = RowTokenizer(tokenizer, **options, tally=tally, prompts=prompts)
        rows = () if held is None or settings.rows.eval_fraction is None else held[0]
        stream = stream_of(settings, tokenize, lambda made: check_ids(made, tokenizer, embeddings), limit, digest(content), rows)
        return RunData(stream, evaluated)
    train, held_out, columns = _rows(settings)
    trained = examples(train, columns, tally=tally, prompts=prompts)
    return RunData(trained, None if held_out is None else examples(held_out, columns))


def _rows(settings: Settings) -> tuple[RowSource, RowSource | None, str | None]:
    """Return training rows, held-out rows, and the names of columns that are still to be read."""
    columns, shares, fraction = settings.args.columns, settings.shares, settings.rows.eval_fraction
    if shares is None and fraction is None:
        return settings.sources, settings.eval_data or None, columns
    parts = [list(training_rows(source, columns)) for source in settings.sources]
    held_out: list[Any] = [row for source in settings.eval_data for row in training_rows(source, columns)]
    if fraction is not None:
        train, held_out = hold_out((row for part in parts for row in part), fraction)
        training_ids = {id(row) for row in train}
        parts = [[row for row in part if id(row) in training_ids] for part in parts]
    if shares is None:
        return [row for part in parts for row in part], held_out or None, None
    for name, part, share in zip(settings.sources, parts, shares, strict=True):
        if share and not part:
            raise TrainError(f"--data {name}={share:g}: all of its rows are held out: give a smaller --eval-fraction, or leave it out")
    draws = draw([len(part) for part in parts], shares, settings.args.data_seed)
    return [parts[source][row] for source, row in draws], held_out or None, None
