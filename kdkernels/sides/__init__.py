"""The kinds of students and teachers, one file each.

Each file has a public class with its checks, and a ``Form``: the side's rows chunk by chunk and their size in bytes, its reference
formula, and the divergences that it supports. Code outside this folder does not depend on the kind of a side.
"""

from __future__ import annotations

from typing import TypeAlias

from .ensemble import Ensemble
from .head import LMHead, Side, check_side, check_teacher
from .sampled import Sampled
from .side import check_number
from .topk import Tail, TopK

__all__ = ["Ensemble", "LMHead", "Sampled", "Side", "Tail", "Teacher", "TopK", "check_number", "check_side", "check_teacher"]

Teacher: TypeAlias = Side | TopK | Sampled | Ensemble
"""Types that a loss accepts as its teacher."""
