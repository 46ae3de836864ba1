"""Fused knowledge-distillation losses at vocabulary scale: ``import kdkernels as kd``; start at ``kd.distillation_loss``."""

from ._version import __version__
from .dispatch import BackendUnavailable
from .divergences import (
    JSD,
    ABDivergence,
    AlphaDivergence,
    ForwardKL,
    LogitMSE,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
    SymmetricKL,
    TotalVariation,
)
from .losses import DistillationLoss, Plan, TokenStats, distillation_loss, plan
from .sides import LMHead

__all__ = [
    "ABDivergence",
    "AlphaDivergence",
    "BackendUnavailable",
    "DistillationLoss",
    "ForwardKL",
    "JSD",
    "LMHead",
    "LogitMSE",
    "Plan",
    "ReverseKL",
    "SkewKL",
    "SkewReverseKL",
    "SymmetricKL",
    "TokenStats",
    "TotalVariation",
    "__version__",
    "distillation_loss",
    "plan",
]
