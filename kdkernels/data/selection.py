"""Select held-out rows, and draw rows from several sources by shares."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..support.files import digest
from .errors import DataError
from .forms import ANSWERS, conversation_field
from .rows import Row

__all__ = ["draw", "hold_out", "is_held_out", "prompt_digest", "read_shares"]


def read_shares(sources: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Parse names and shares of sources such as ``a.jsonl=0.7``; shares are None if no source has one. Existing paths have priority.

    Raises:
        ValueError: a share is not a number >= 0, only some sources have shares, or all shares are 0.
    """
    names, shares = [], []
    for source in sources:
        name, equals, share = source.rpartition("=")
        if not equals or Path(source).exists():
            names.append(source)
            continue
        try:
            number = float(share)
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise ValueError(f"--data {source}: the share must be a number >= 0, such as {name}=0.7")
        names.append(name)
        shares.append(number)
    if not shares:
        return names, None
    if len(shares) < len(names):
        without = next(source for source in sources if source in names)
        raise ValueError(f"--data {without} has no share, and others have: give shares to all sources, or to none")
    if not sum(shares):
        raise ValueError(f"--data {', '.join(sources)}: the shares are all 0, so no row would be drawn: give one a share above 0")
    return names, shares


def draw(counts: Sequence[int], shares: Sequence[float], seed: int) -> list[tuple[int, int]]:
    """Return one epoch of draws, one per row: source and row of each, in an order that depends only on ``seed``.

    The number of draws from each source is proportional to its share, rounded. A source is read in random order, and again in a new order
    when it is exhausted, so that the numbers of draws of its rows differ by at most one.

    Args:
        counts: number of rows of each source.
        shares: share of each source; they need not add up to 1.
    """
    total = sum(counts)
    quotas = [total * share / sum(shares) for share in shares]
    draws = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda source: (draws[source] - quotas[source], source))
    for source in by_remainder[: total - sum(draws)]:
        draws[source] += 1
    walks = [_walk(count, number, f"{seed}/{source}") for source, (count, number) in enumerate(zip(counts, draws, strict=True))]
    order = [source for source, number in enumerate(draws) for _ in range(number)]
    random.Random(str(seed)).shuffle(order)
    return [(source, next(walks[source])) for source in order]


def _walk(count: int, number: int, seed: str) -> Any:
    """Yield ``number`` row indices below ``count``, in a new random order each time all are drawn."""
    shuffle = random.Random(seed).shuffle
    rows: list[int] = []
    while len(rows) < number:
        order = list(range(count))
        shuffle(order)
        rows += order
    return iter(rows[:number])


def hold_out(rows: Iterable[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Split rows into training rows and about ``fraction`` of held-out rows.

    A hash of a row's field ``key``, or else of its prompt, decides. The split of a row does not change when other rows are added, with the
    order, or with the tokenizer. Rows with equal prompts are on the same side as the first of them.

    Raises:
        DataError: one of the sides has no rows.
    """
    sides: tuple[list[Row], list[Row]] = [], []
    known: dict[str, bool] = {}
    for row in rows:
        held = known.setdefault(prompt_digest(row), is_held_out(row, fraction))
        sides[held].append(row)
    train, held_out = sides
    if not train or not held_out:
        what = "nothing is held out" if train else "nothing is left to train on"
        raise DataError(
            f"eval_fraction={fraction:g} of {len(train) + len(held_out):,} rows: {what}. Give another fraction, or held-out rows of your "
            "own (--eval-data)"
        )
    return train, held_out


def is_held_out(row: Row, fraction: float) -> bool:
    """Return whether a hash of the row's ``key``, or else of its prompt, puts it on the held-out side, independent of other rows."""
    key = row.fields.get("key")
    decided_by = prompt_digest(row) if key is None else digest(str(key))
    return int(decided_by[:16], 16) < fraction * 2**64


def prompt_digest(row: Row) -> str:
    """Return a hash that rows with equal prompts share."""
    return digest(_prompt(row))


def _prompt(row: Row) -> Any:
    """Return the prompt of a row before tokenisation: the conversation without its answer, or the text of a text row."""
    name = conversation_field(row)
    if name is not None:
        turns = row.messages(name)
        answered = turns[-1]["role"] == "assistant" and not any(answer in row for answer in ANSWERS)
        return turns[:-1] if answered else turns
    if "prompt" in row:
        return [{"role": "user", "content": row.text("prompt")}]
    return row.fields.get("text", row.fields)
