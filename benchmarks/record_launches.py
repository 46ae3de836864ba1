"""Compile the kernels that the Triton backend would launch on a GPU, without a GPU and without launching them.

As a program it makes the calls of ``benchmarks.gpu_smoke`` and of the suites ``rows`` and ``headline``. As a pytest plugin
(``-p benchmarks.record_launches -k triton-cpu``) it records the calls of the tests. The torch backend computes the results. Each process
writes a JSON file into the folder ``$KDKERNELS_RECORD``: folder in Triton's cache -> the part of the hash of its name that does not depend
on the build of Triton. Import it with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver
from triton.runtime.cache import triton_key
from triton.runtime.jit import JITFunction

import kdkernels.backends.triton as backend
from kdkernels.backends import torch as torch_rows
from kdkernels.sides.head import HeadRows

NAMES: dict[str, str] = {}


class AbsentDriver:
    """Replace Triton's CUDA driver. It names the GPU to compile for and launches nothing."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> ModuleType:
        return torch.cuda

    def map_python_to_cpp_type(self, name: str) -> str:
        return "int"


def _recorded(get_cache_key: Callable[..., str]) -> Callable[..., str]:
    def recorded(*arguments: Any, **keywords: Any) -> str:
        key = get_cache_key(*arguments, **keywords)
        folder = base64.b32encode(hashlib.sha256(key.encode()).digest()).decode().rstrip("=")
        NAMES[folder] = key[len(triton_key()) + 1 :]
        return key

    return recorded


def _both(ours: Callable[..., None], torch_function: Callable[..., None]) -> Callable[..., None]:
    def both(*arguments: Any, **keywords: Any) -> None:
        ours(*arguments, **keywords)
        torch_function(*arguments, **keywords)

    return both


def start() -> None:
    """Make every later launch compile without running."""
    driver.set_active(AbsentDriver(int(os.environ.get("KDKERNELS_RECORD_ARCH", "90"))))
    compiler.get_cache_key = _recorded(compiler.get_cache_key)
    run = JITFunction.run
    JITFunction.run = lambda self, *arguments, grid, warmup, **keywords: run(self, *arguments, grid=grid, warmup=True, **keywords)
    unavailable = "float64 is for the torch backend"
    backend.unavailable = lambda device, dtypes: unavailable if torch.float64 in dtypes else None
    for name in ("rows", "head_rows", "softmax_rows", "softmax_gradient_rows"):
        setattr(backend, name, _both(getattr(backend, name), getattr(torch_rows, name)))
    # As on a GPU: the gradient in the dtype of the products, over float32 logits.
    HeadRows.dz_dtype = property(lambda head: head.dtype)  # type: ignore[assignment,method-assign]


def save() -> None:
    """Write this process's kernels into the folder."""
    folder = Path(os.environ["KDKERNELS_RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{os.getpid()}.json").write_text(json.dumps(NAMES))


def pytest_sessionstart() -> None:
    import conftest

    start()
    conftest.interpreted = lambda backend, device: False  # use the shapes of a GPU


def pytest_sessionfinish() -> None:
    save()


def main() -> None:
    """Compile the kernels of the benchmarks."""
    from kdkernels.bench import suites, variants

    from .gpu_smoke import VOCABULARIES, checks

    start()
    for _, check in checks("triton", "cpu", VOCABULARIES):
        check()
    for suite in ("rows", "headline"):
        for job in suites.jobs(suite, "cuda", backends=["triton"], peers=[]):
            # Sizes that do not affect launches are small. N stays a multiple of 16.
            case = replace(job.case, n=16, ds=job.case.ds and 16, dt=job.case.dt and 16)
            for name in job.variants:
                if variants.Variant.parse(name).name == "triton":
                    inputs = variants.build_inputs(case, "cpu")
                    step = variants.build(name, case, inputs)
                    variants.prepare(step)
                    step()
    save()
    print(f"{len(NAMES)} kernels")


if __name__ == "__main__":
    main()
