"""Traits of devices, the registry of backends, and the choice of a backend for a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

import torch

from ..support.errors import UserError
from . import Backend

GROUP = "kdkernels.backends"
"""Entry-point group for backends of other packages. It is read at the first unknown backend or device type, never at import."""


@dataclass(frozen=True)
class _BuiltIn:
    """A backend of this package."""

    load: Callable[[], Backend]
    """Import the backend's module at its first use."""
    auto: dict[str, int]
    """Position in the order of "auto", by device type."""


_BUILT_IN: dict[str, _BuiltIn] = {}


def _built_in(name: str, **auto: int) -> Callable[[Callable[[], Backend]], None]:
    def register(load: Callable[[], Backend]) -> None:
        _BUILT_IN[name] = _BuiltIn(load, auto)

    return register


# mypy checks that each of these modules is a Backend.
# The CUDA C++ kernels come second until they are measured on a GPU; ``backend="cuda"`` selects them.
@_built_in("cuda", cuda=2)
def _cuda() -> Backend:
    from . import cuda

    return cuda


@_built_in("triton", cuda=1)
def _triton() -> Backend:
    from . import triton

    return triton


@_built_in("native", cpu=1)
def _native() -> Backend:
    from . import cpu

    return cpu


@_built_in("torch", cuda=3, cpu=2)
def _torch() -> Backend:
    from . import torch

    return torch


REFERENCE = "reference"
"""The dense reference, ``kdkernels.reference``. It has no row kernels: ``fused.ops.run`` calls it instead of an op (``Call.is_dense``)."""

NAMES = (*_BUILT_IN, REFERENCE)
"""The built-in backends."""


@dataclass(frozen=True)
class Traits:
    """Traits of a device type. The defaults are for unknown device types."""

    wide_products: bool = False
    """The matrix product can read 16-bit operands and write float32."""
    host_memory: bool = False
    """The memory is host memory, and rows processed in small tiles stay in a core's cache."""
    asynchronous: bool = True
    """Launches are asynchronous: reading a result on the host waits for the device."""
    recycled_pages: bool = False
    """The first write to new memory causes page faults, so memory is reused between calls."""
    graphs: bool = False
    """Work can be captured into a CUDA graph; during capture the host must not read device memory."""
    narrow_gradients: bool = False
    """Logit gradients are stored in the dtype of the products that read them, even if the logits are wider."""
    enough_rows: int | None = None
    """Rows per chunk above which the matrix products are not faster; None if unknown."""
    cheap_bytes: int = 0
    """Chunk buffers up to this size are always used."""


_CPU = Traits(host_memory=True, asynchronous=False, recycled_pages=True, enough_rows=1024, cheap_bytes=256 << 20)
# ROCm's BLAS has no such product.
_CUDA = Traits(wide_products=torch.version.hip is None, graphs=True, narrow_gradients=True, enough_rows=8192)
_KNOWN = {"cpu": _CPU, "cuda": _CUDA}
_UNKNOWN = Traits()


def traits(device: torch.device | str) -> Traits:
    """Return the traits of a device or device type."""
    return _KNOWN.get(device.partition(":")[0] if isinstance(device, str) else device.type, _UNKNOWN)


def capturing(device: torch.device) -> bool:
    """Return whether the current stream is being captured into a CUDA graph."""
    return traits(device).graphs and torch.cuda.is_current_stream_capturing()


class BackendUnavailable(UserError):
    """The backend selected by name cannot run here. The message gives the reason."""


@lru_cache(maxsize=1)
def foreign() -> dict[str, EntryPoint]:
    """Return the entry points of other packages' backends by name, without those named like a built-in backend or "auto"."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in (*NAMES, "auto")}


@lru_cache(maxsize=64)
def load(name: str) -> Backend:
    """Return a backend by its name.

    Raises:
        ImportError: the backend cannot be imported, or required functions are missing.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name].load()
    try:
        backend = foreign()[name].load()
    except (AttributeError, OSError) as error:  # no such object in the module; a shared library that cannot be loaded
        raise ImportError(f"the entry point {name!r} of {GROUP} cannot be loaded: {error}") from error
    lacks = [part for part in ("unavailable", "state_scales", "rows") if not callable(getattr(backend, part, None))]
    if lacks:
        raise ImportError(f"the entry point {name!r} of {GROUP} has no {', '.join(lacks)}: see kdkernels.backends.Backend")
    return cast(Backend, backend)


def auto_order(device_type: str) -> tuple[str, ...]:
    """Return the backends that "auto" tries on a device type, in order.

    For device types that no built-in backend declares: the backends of other packages that declare it, then torch.
    """
    places = {name: built_in.auto[device_type] for name, built_in in _BUILT_IN.items() if device_type in built_in.auto}
    if places:
        return tuple(sorted(places, key=places.__getitem__))
    return *(name for name in foreign() if device_type in _declared(name)), "torch"


def _declared(name: str) -> tuple[str, ...]:
    try:
        return tuple(getattr(load(name), "DEVICE_TYPES", ()))
    except ImportError:
        return ()  # not for "auto"; selecting it by name raises the reason


def unavailable(name: str, device: torch.device | str, dtypes: tuple[torch.dtype, ...], kernels: str = "rows") -> str | None:
    """Return the reason why the backend ``name`` cannot run on such tensors, or None.

    Args:
        name: one of ``NAMES`` or ``foreign()``.
        device: device of the tensors; ``"cuda"`` is the current GPU.
        dtypes: storage dtypes of the logits of both sides.
        kernels: ``"rows"`` (two sides), ``"head_rows"`` (one side) or ``"softmax_rows"``, as in ``Backend``.
    """
    if name == REFERENCE:
        return None
    try:
        backend = load(name)
    except ImportError as error:
        return f"cannot be imported: {error}"
    reason = backend.unavailable(_exactly(device), dtypes)
    return reason if reason is not None or hasattr(backend, kernels) else "it has kernels for the distillation loss only"


def _exactly(device: torch.device | str) -> torch.device:
    """Resolve "cuda" to an index. It means the current GPU, which can change between calls."""
    device = torch.device(device)
    if str(device) == "cuda" and torch.cuda.is_available():  # and not "cuda:0"
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_name(backend: str) -> None:
    """Raise ``ValueError`` for an unknown backend name. The message lists the valid names."""
    if backend != "auto" and backend not in NAMES and backend not in foreign():
        raise ValueError(f"backend {backend!r} is unknown; valid names: auto, {', '.join((*NAMES, *foreign()))}")


@lru_cache(maxsize=256)
def _select(backend: str, device: torch.device, dtypes: tuple[torch.dtype, ...], kernels: str) -> str:
    if backend == "auto":
        return next(name for name in auto_order(device.type) if unavailable(name, device, dtypes, kernels) is None)
    check_name(backend)
    if (reason := unavailable(backend, device, dtypes, kernels)) is not None:
        raise BackendUnavailable(f"backend={backend!r} cannot run here: {reason}")
    return backend


def select(backend: str, device: torch.device | str, dtypes: tuple[torch.dtype, ...], kernels: str = "rows") -> str:
    """Return the backend to run: the one selected by name, or for "auto" the first that can run.

    Raises:
        ValueError: unknown name; the message lists the valid names.
        BackendUnavailable: the backend selected by name cannot run. Only "auto" falls back.
    """
    return _select(backend, _exactly(device), dtypes, kernels)


# Same as torch.compiler.assume_constant_result, which would import torch._dynamo and add two seconds to every start.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


def not_chosen(
    chosen: str, backend: str, device: torch.device | str, dtypes: tuple[torch.dtype, ...], kernels: str = "rows"
) -> dict[str, str]:
    """Return the reason against each built-in backend that was not chosen, and against other packages' backends that "auto" tried."""
    device_type = torch.device(device).type
    order = auto_order(device_type)

    def reason(name: str) -> str:
        if (why := unavailable(name, device, dtypes, kernels)) is not None:
            return why
        if backend != "auto":
            return f"backend={backend!r} was selected"
        if name in order:
            return f"{chosen} comes first"
        return "dense and slow: for checks only" if name == REFERENCE else f'"auto" never chooses it on {device_type}'

    return {name: reason(name) for name in dict.fromkeys((*NAMES, *order)) if name != chosen}
