"""Which backend runs a call, and why not the others."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from . import backends  # noqa: F401  (the package of the modules named below)

AUTO_ORDER: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton", "torch"), "cpu": ("native", "torch")}
"""What "auto" tries, best first, by device type; other devices run plain torch."""

NAMES = ("cuda", "triton", "native", "torch", "reference")

_MODULES = {"triton": "kdkernels.backends.triton", "torch": "kdkernels.backends.torch"}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


def load(name: str) -> ModuleType:
    """The module of a backend that is available."""
    return importlib.import_module(_MODULES[name])


def unavailable(name: str, device_type: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why ``name`` cannot run on such tensors, or None.

    Args:
        name: one of ``NAMES``.
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtypes: storage dtypes of the logits of both sides.
    """
    if name == "reference":
        return None
    if name not in _MODULES:
        return "the compiled extension kdkernels._C is not part of this version"
    try:
        module = load(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    reason: str | None = module.unavailable(device_type, dtypes)
    return reason


def select(backend: str, device_type: str, dtypes: tuple[torch.dtype, ...]) -> tuple[str, dict[str, str]]:
    """The backend to run, and for every other one the reason why not.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
        BackendUnavailable: an explicit choice cannot run; only "auto" falls back.
    """
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"backend {backend!r} is unknown; valid names: auto, {', '.join(NAMES)}")
    reasons = {name: unavailable(name, device_type, dtypes) for name in NAMES}
    order = AUTO_ORDER.get(device_type, ("torch",))
    if backend != "auto":
        if (reason := reasons[backend]) is not None:
            raise BackendUnavailable(f"backend={backend!r} cannot run here: {reason}")
        chosen = backend
    else:
        chosen = next(name for name in order if reasons[name] is None)
    others = {}
    for name in NAMES:
        if name == chosen:
            continue
        if backend != "auto":
            fallback = f"backend={backend!r} was asked for"
        elif name in order:
            fallback = f"{chosen} is faster"
        elif name == "reference":
            fallback = "dense and slow: for checks only"
        else:
            fallback = f"never chosen by itself on {device_type}"
        others[name] = reasons[name] or fallback
    return chosen, others
