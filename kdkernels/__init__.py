"""Fused knowledge-distillation losses at vocabulary scale: ``import kdkernels as kd``; start at ``kd.distillation_loss``."""

from . import trainer
from ._version import __version__
from .backends.selection import BackendUnavailable
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
from .primitives import cross_entropy, entropy, log_softmax, logsumexp, sample, softmax, token_logprobs, topk_logprobs
from .sides import Ensemble, LMHead, Sampled, TopK

__all__ = [
    "ABDivergence",
    "AlphaDivergence",
    "BackendUnavailable",
    "DistillationLoss",
    "Ensemble",
    "ForwardKL",
    "JSD",
    "LMHead",
    "LogitMSE",
    "Plan",
    "ReverseKL",
    "Sampled",
    "SkewKL",
    "SkewReverseKL",
    "SymmetricKL",
    "TokenStats",
    "TopK",
    "TotalVariation",
    "__version__",
    "cross_entropy",
    "distillation_loss",
    "entropy",
    "log_softmax",
    "logsumexp",
    "plan",
    "sample",
    "softmax",
    "token_logprobs",
    "topk_logprobs",
    "trainer",
]
