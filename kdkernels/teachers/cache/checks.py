"""Log-probabilities are checked on every way into a cache and out of it: each column, each row's sum, and the row is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...data.example import Example
from .manifest import CacheError
from .shards import Array

__all__ = ["SLACK", "check_finite", "check_logprobs", "place"]

SLACK = 0.01
"""How far above 0 a log-probability, and above 1 a row's sum, may be: float16, bfloat16 and servers that print few digits round by less."""


def check_logprobs(ids: Array, logprobs: Array, where: Callable[[int], str]) -> None:
    """Checks log-probabilities of a teacher. ``-inf`` is a token that it rules out.

    Args:
        ids, logprobs: ``[n, K]``, padded with ids of -1.
        where: names the example of a row.

    Raises:
        CacheError: naming the first row that holds NaN or values above 0, or whose probabilities sum to more than 1.
    """
    values = np.where(ids >= 0, logprobs, -np.inf).astype(np.float64)
    above = values > SLACK
    mass = np.exp(np.minimum(values, 1.0)).sum(-1)
    wrong = np.isnan(values).any(-1) | above.any(-1) | (mass > 1 + SLACK)
    if not wrong.any():
        return
    row = int(wrong.argmax())
    if np.isnan(values[row]).any():
        says = "a log-probability is NaN (not a number)"
    elif above[row].any():
        says = f"a log-probability is {values[row].max():g}, above 0: of probabilities take the logarithm, of logits log_softmax"
    else:
        says = (
            f"the probabilities of its {(ids[row] >= 0).sum()} tokens sum to {mass[row]:.4g}, more than 1: they must be those of one "
            "distribution, at one temperature"
        )
    raise CacheError(f"{where(row)}: {says}")


def check_finite(finite: bool, where: str) -> None:
    """
    Raises:
        CacheError: the teacher's values are not finite.
    """
    if not finite:
        raise CacheError(
            f"{where}: the teacher gives values that are not finite: check its --dtype (float16 overflows; try bfloat16 or float32)"
        )


def place(examples: Sequence[Example], row: int) -> str:
    """Names the example and the token of one row of the scored tokens of ``examples``, side by side."""
    ends = np.cumsum([len(example.teacher_scored) for example in examples])
    number = int(np.searchsorted(ends, row, side="right"))
    example = examples[number]
    token = row - int(ends[number]) + len(example.teacher_scored) + 1
    return f"{example.where or f'example {number + 1}'}, token {token} of {len(example.teacher_scored)}"
