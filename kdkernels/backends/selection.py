"""Which backend runs a call, and why not the others."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch

from .. import backends  # noqa: F401  (the package of the modules named below)
from ..support.errors import UserError

AUTO_ORDER: dict[str, tuple[str, ...]] = {"cuda": ("triton", "cuda", "torch"), "cpu": ("native", "torch")}
"""What "auto" tries, in order, by device type; other devices run plain torch. The CUDA C++ kernels come second until they have been
measured on a GPU: ``backend="cuda"`` runs them."""

NAMES = ("cuda", "triton", "native", "torch", "reference")

_MODULES = {
    "cuda": "kdkernels.backends.cuda",
    "triton": "kdkernels.backends.triton",
    "native": "kdkernels.backends.native",
    "torch": "kdkernels.backends.torch",
}


class BackendUnavailable(UserError):
    """A backend that was asked for by name cannot run here; the message says why."""


def load(name: str) -> ModuleType:
    """The module of a backend that is available."""
    return importlib.import_module(_MODULES[name])


def unavailable(name: str, device: torch.device | str, dtypes: tuple[torch.dtype, ...], kernels: str = "rows") -> str | None:
    """Why ``name`` cannot run on such tensors, or None.

    Args:
        name: one of ``NAMES``.
        device: the tensors'; ``"cuda"`` is the current GPU.
        dtypes: storage dtypes of the logits of both sides.
        kernels: ``"rows"`` (two sides), ``"head_rows"`` (one side) or ``"softmax_rows"``, as in backends/__init__.py.
    """
    if name == "reference":
        return None
    try:
        module = load(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    reason: str | None = module.unavailable(_exactly(device), dtypes)
    return reason if reason is not None or hasattr(module, kernels) else "it has kernels for the distillation loss only"


def _exactly(device: torch.device | str) -> torch.device:
    """With the number of the GPU, which may be another by the next call where it is the current one."""
    device = torch.device(device)
    if str(device) == "cuda" and torch.cuda.is_available():  # and not "cuda:0"
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_name(backend: str) -> None:
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"backend {backend!r} is unknown; valid names: auto, {', '.join(NAMES)}")


@lru_cache(maxsize=256)
def _select(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...], kernels: str) -> str:
    if backend == "auto":
        order = AUTO_ORDER.get(device.type, ("torch",))
        return next(name for name in order if unavailable(name, device, dtypes, kernels) is None)
    check_name(backend)
    if (reason := unavailable(backend, device, dtypes, kernels)) is not None:
        raise BackendUnavailable(f"backend={backend!r} cannot run here: {reason}")
    return backend


def select(backend: str, device: torch.device | str, dtypes: tuple[torch.dtype, ...], kernels: str = "rows") -> str:
    """The backend to run: the one that was asked for, or the best that can.

    Raises:
        ValueError: unknown name; the message lists the valid ones.
        BackendUnavailable: an explicit choice cannot run; only "auto" falls back.
    """
    return _select(backend, _exactly(device), dtypes, kernels)


# As torch.compiler.assume_constant_result does, which imports torch._dynamo: two seconds more of every start.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def not_chosen(
    chosen: str, backend: str, device: torch.device | str, dtypes: tuple[torch.dtype, ...], kernels: str = "rows"
) -> dict[str, str]:
    """For every backend other than the chosen one, the reason."""
    device_type = torch.device(device).type
    order = AUTO_ORDER.get(device_type, ("torch",))

    def reason(name: str) -> str:
        if (why := unavailable(name, device, dtypes, kernels)) is not None:
            return why
        if backend != "auto":
            return f"backend={backend!r} was asked for"
        if name in order:
            return f"{chosen} comes first"
        return "dense and slow: for checks only" if name == "reference" else f"never chosen by itself on {device_type}"

    return {name: reason(name) for name in NAMES if name != chosen}
