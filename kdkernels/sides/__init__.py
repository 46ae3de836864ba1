"""The kinds of students and teachers, one file each.

A kind brings its public class with its checks, and a ``Form``: its rows chunk by chunk and the bytes that they take, its reference formula,
and the divergences that it is defined for. Nothing outside this folder asks what kind a side is.
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
"""What a loss takes for a teacher."""
