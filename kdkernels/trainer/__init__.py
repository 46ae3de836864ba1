"""The thin trainer: distil one causal language model into another with transformers."""

from importlib import import_module
from typing import Any

__all__ = ["DistillationArguments", "DistillationTrainer", "load_examples"]

_WHERE = {"DistillationArguments": ".arguments", "DistillationTrainer": ".trainer", "load_examples": "..data.tokenization"}


def __getattr__(name: str) -> Any:
    """Import on demand, so that code without transformers does not wait for it."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name], __name__), name)
