"""Fixtures: backends, devices, and memory filled with NaN to detect reads of uninitialised values."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from kdkernels.backends import selection
from kdkernels.fused import gemm, pages

BACKENDS = ("torch", "native", "triton", "cuda")
"""Backends of the numeric tests, each where it can run. On a CPU, triton runs in its interpreter (TRITON_INTERPRET=1), which is slow:
tests with large shapes check ``interpreted``."""

# Without a GPU, its thousands of variants are not collected, instead of being skipped one by one.
HAS_GPU = torch.cuda.is_available()
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu)) if HAS_GPU else ("cpu",)
RUNNABLE = BACKENDS if HAS_GPU else tuple(name for name in BACKENDS if name != "cuda")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from interpreter import accelerate

    accelerate()

# Deadlines would measure the machine. Derandomised examples make every failure reproducible.
settings.register_profile("kdkernels", deadline=None, derandomize=True, max_examples=40, print_blob=True)
settings.load_profile("kdkernels")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one worker per core already


def require(backend: str, device: str, *dtypes: torch.dtype) -> None:
    """Skip the test, with the backend's reason, if it cannot run on logits of these dtypes."""
    dtypes = dtypes or (torch.float32,)
    reason = selection.unavailable(backend, device, (dtypes[0], dtypes[-1]))
    if reason is not None:
        pytest.skip(f"{backend} on {device}: {reason}")


def interpreted(backend: str, device: str) -> bool:
    return backend == "triton" and device == "cpu"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    yield request.param
    if request.param == "cuda":
        leave_lost_gpu()


def leave_lost_gpu() -> None:
    """End this process if its CUDA context is lost. After an illegal access every later CUDA call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # pytest starts another worker, with a new context
        pytest.exit(f"the CUDA context is lost: {error}", returncode=1)


@pytest.fixture(params=RUNNABLE)
def backend(request: pytest.FixtureRequest, device: str) -> str:
    require(request.param, device)
    return request.param


@pytest.fixture
def engine_backend(backend: str, device: str) -> str:
    """Return backends for tests of the engine, which do not need the slow interpreter."""
    if interpreted(backend, device):
        pytest.skip("a test of the engine: not in Triton's slow interpreter")
    return backend


@pytest.fixture(params=("reference", *RUNNABLE))
def any_backend(request: pytest.FixtureRequest, device: str) -> str:
    """Return backends including the reference, for tests that do not depend on chunks."""
    require(request.param, device)
    return request.param


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _nan(allocate(*args, **kwargs))

    return filled


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised and recycled floating-point memory with NaN, so that an output that was not written cannot pass as zero."""
    scratch, recycled = pages.scratch, pages.recycled
    monkeypatch.setattr(pages, "scratch", lambda name, nbytes: scratch(name, nbytes).fill_(255))  # NaN in every format
    monkeypatch.setattr(pages, "recycled", lambda tensor: _nan(recycled(tensor)))
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the engine's matrix products by kind."""
    counts = dict.fromkeys(("logits", "grad_hidden", "add_grad_weight"), 0)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return wrapper

    for name in counts:
        monkeypatch.setattr(gemm, name, counted(name, getattr(gemm, name)))
    return counts


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect sweeps, the walk with a real model and, without a GPU, tests that need one, unless ``-m`` names them."""
    for mark in ("sweep", "real", *([] if HAS_GPU else ["gpu"])):
        if mark not in config.option.markexpr:
            config.hook.pytest_deselected(items=[item for item in items if mark in item.keywords])
            items[:] = [item for item in items if mark not in item.keywords]
