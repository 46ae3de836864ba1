"""Checks of log-probabilities when they are written to a cache and when they are read from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...data.example import Example
from .manifest import CacheError
from .shards import Array

__all__ = ["SLACK", "check_finite", "check_logprobs", "place"]

SLACK = 0.01
"""Accepted excess of a log-probability over 0, and of a row's sum over 1. Rounding to float16, bfloat16 or few digits is smaller."""


def check_logprobs(ids: Array, logprobs: Array, where: Callable[[int], str]) -> None:
    """Check a teacher's log-probabilities. ``-inf`` is probability 0.

    Args:
        ids, logprobs: ``[n, K]``, padded with ids of -1.
        where: returns the name of a row for messages.

    Raises:
        CacheError: a row has NaN or values above 0, or its probabilities sum to more than 1. The message names the first such row.
    """
    values = np.where(ids >= 0, logprobs, -np.inf).astype(np.float64)
    above = values > SLACK
    mass = np.exp(np.minimum(values, 1.0)).sum(-1)
    wrong = np.isnan(values).any(-1) | above.any(-1) | (mass > 1 + SLACK)
    if not wrong.any():
        return
    row = int(wrong.argmax())
    if np.isnan(values[row]).any():
        problem = "a log-probability is NaN (not a number)"
    elif above[row].any():
        problem = f"a log-probability is {values[row].max():g}, above 0: of probabilities take the logarithm, of logits log_softmax"
    else:
        problem = (
            f"the probabilities of its {(ids[row] >= 0).sum()} tokens sum to {mass[row]:.4g}, more than 1: they must be those of one "
            "distribution, at one temperature"
        )
    raise CacheError(f"{where(row)}: {problem}")


def check_finite(finite: bool, where: str) -> None:
    """Raise ``CacheError`` if the teacher's values are not finite."""
    if not finite:
        raise CacheError(
            f"{where}: the teacher gives values that are not finite: check its --dtype (float16 overflows; try bfloat16 or float32)"
        )


def place(examples: Sequence[Example], row: int) -> str:
    """Return the name of the example and the number of the token for a row of the scored tokens of all ``examples``."""
    ends = np.cumsum([len(example.teacher_scored) for example in examples])
    number = int(np.searchsorted(ends, row, side="right"))
    example = examples[number]
    token = row - int(ends[number]) + len(example.teacher_scored) + 1
    return f"{example.where or f'example {number + 1}'}, token {token} of {len(example.teacher_scored)}"
