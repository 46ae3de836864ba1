"""Fused knowledge-distillation losses at vocabulary scale: ``import kdkernels as kd``; start at ``kd.distillation_loss``.

Names are imported at their first use, so that the command's ``--help`` does not import torch.
"""

from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from . import trainer
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

_MODULES = ("losses", "primitives", "divergences", "sides", "backends.selection")
"""Public names by the module that defines them."""

if not TYPE_CHECKING:  # with __getattr__, a type checker would accept any name

    def __getattr__(name):
        """Import a public name or a module of this package at its first use."""
        from importlib import import_module

        if name in __all__ and name != "trainer":
            modules = (import_module(f".{module}", __name__) for module in _MODULES)
            value = next(vars(module)[name] for module in modules if name in vars(module))
        else:
            try:
                value = import_module(f".{name}", __name__)
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
