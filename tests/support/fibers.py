"""Build and run the programs and the Python module of tests/cuda_on_cpu: the CUDA row kernels on CPU fibers."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest

from kdkernels.backends import _extension, cuda
from kdkernels.backends.rows import RowBatch, Stage
from kdkernels.fused.call import Call

FOLDER = Path(__file__).parents[1] / "cuda_on_cpu"
BUILD = FOLDER.parents[1] / "build" / "cuda_on_cpu"
PROGRAMS = ("rows", "heads", "launch")


def make(*targets: str) -> str:
    """Run make and return its output. The test fails if make fails; without a C++ compiler it is skipped."""
    if shutil.which(os.environ.get("CXX", "g++")) is None or shutil.which("make") is None:
        pytest.skip("no C++ compiler or no make")
    command = ["make", "--silent", *targets, f"BUILD={BUILD}", f"PYTHON={sys.executable}"]
    run = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run.stdout


def build(kind: str, *files: str) -> None:
    """Build files of one kind (plain, asan, tsan). Workers of pytest build the files of a kind one after the other."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        make(*(str(BUILD / file) for file in files))


def run(target: str, kind: str = "plain") -> str:
    """Run a target of the Makefile and return its output."""
    build(kind, *(f"{program}_{kind}" for program in PROGRAMS))
    return make(target)


@lru_cache(maxsize=1)
def _module() -> ModuleType:
    if (reason := _extension.missing()) is not None:
        pytest.skip(reason)
    build("plain", "cuda_on_cpu.so")
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", BUILD / "cuda_on_cpu.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CudaOnCpu:
    """The backend "cuda" for tensors on the CPU, as on a GPU with or without clusters."""

    def __init__(self, clusters: bool) -> None:
        self.module, self.clusters = _module(), clusters
        self.one_read = False
        """The last call ran the one-read kernel."""

    def state_scales(self, call: Call) -> tuple[float, float]:
        return cuda.state_scales(call)

    def rows(self, call: Call, batch: RowBatch, stages: Stage) -> None:
        self.one_read = self.module.rows(_extension.row_arguments(call, batch, stages, "cpu"), self.clusters)
