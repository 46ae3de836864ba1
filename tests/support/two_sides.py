"""Pairs of a student and a teacher, of heads and dense logits."""

from __future__ import annotations

from typing import Any

import pytest
from oracle import make_side
from torch import Tensor

import kdkernels as kd

SIDES = [(8, 12), (8, None), (None, 12), (None, None)]  # hidden sizes; None: logits
sides = pytest.mark.parametrize("dims", SIDES, ids=["head/head", "head/dense", "dense/head", "dense/dense"])
REDUCTIONS = ("mean", "sum", "none")
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


def pair(
    dims: tuple[int | None, int | None] = (8, 12), leading: tuple[int, ...] = (6,), vocab: int = 33, device: str = "cpu", **kw: Any
) -> tuple[Any, Any]:
    return tuple(make_side(leading, vocab, d, seed=i, device=device, **kw) for i, d in enumerate(dims))


def tensors(side: kd.LMHead | Tensor) -> list[Tensor]:
    if isinstance(side, Tensor):
        return [side]
    return [t for t in (side.hidden, side.weight, side.bias) if t is not None]
