"""The rows that a training holds out, and those that it draws from several sources by their shares."""

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

__all__ = ["draw", "hold_out", "is_held_out", "read_shares"]


def read_shares(sources: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Names and shares of sources such as ``a.jsonl=0.7``; None where none has a share. An existing path with such a name wins.

    Raises:
        ValueError: a share that is not a number >= 0, shares of some sources only, or shares that are all 0.
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
    """One epoch of draws, as many as there are rows: the source and the row of each, in an order that depends on ``seed`` only.

    Each source is drawn from in proportion to its share, rounded to whole draws. It is gone through in random order, and anew when it runs
    out, so that its rows are drawn equally often but for one.

    Args:
        counts: rows of each source.
        shares: of each source; they need not add up to 1.
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
    """An iterator over ``number`` rows of ``count``, in a new random order each time all are drawn."""
    shuffle = random.Random(seed).shuffle
    rows: list[int] = []
    while len(rows) < number:
        order = list(range(count))
        shuffle(order)
        rows += order
    return iter(rows[:number])


def hold_out(rows: Iterable[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and about ``fraction`` of all that are held out.

    A hash of a row's field ``key``, else of its prompt, decides, so that a row stays on its side when others are added, in any order, and
    with any tokenizer. Rows with equal prompts are on one side: that of the first of them.

    Raises:
        DataError: no row is on one of the sides.
    """
    sides: tuple[list[Row], list[Row]] = [], []
    known: dict[str, bool] = {}
    for row in rows:
        held = known.setdefault(digest(_prompt(row)), is_held_out(row, fraction))
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
    """Report the side of a row by a hash of its ``key``, else of its prompt, without regard to other rows."""
    key = row.fields.get("key")
    decided_by = digest(_prompt(row) if key is None else str(key))
    return int(decided_by[:16], 16) < fraction * 2**64


def _prompt(row: Row) -> Any:
    """What a row asks, before any tokenizer: a conversation without its answer, or the text of a row that is nothing else."""
    name = conversation_field(row)
    if name is not None:
        turns = row.messages(name)
        answered = turns[-1]["role"] == "assistant" and not any(answer in row for answer in ANSWERS)
        return turns[:-1] if answered else turns
    if "prompt" in row:
        return [{"role": "user", "content": row.text("prompt")}]
    return row.fields.get("text", row.fields)
