"""Figures of the source tree: files that a call crosses, sizes of functions, includes. To print them: python tests/support/layout.py"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from unittest import mock

import torch

import kdkernels as kd
from kdkernels.backends import _extension, cuda, selection

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kdkernels"
CSRC = ROOT / "csrc"

SOURCES = {
    "native": ("bindings.cpp", "cpu/dispatch.cpp", "cpu/rows.cpp"),
    "cuda": ("bindings.cpp", "cuda/two_sides.cu", "cuda/two_sides_f32.cu"),
}
"""The compiled files that a loss of float32 heads goes through."""


# ---- Python


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def lines_of(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class Function:
    """Size of a function."""

    name: str
    lines: int
    """Lines of its body without the docstring, functions inside it included."""
    parameters: int
    """Number of parameters without self."""
    jit: bool
    """Compiled by Triton."""

    @property
    def private(self) -> bool:
        return self.name.rpartition(": ")[2].startswith("_") and not self.name.endswith("__")


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def functions(file: Path) -> tuple[Function, ...]:
    return tuple(_functions(file))


def _functions(file: Path) -> Iterator[Function]:
    for node in ast.walk(tree(file)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
        parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len(parameters) - (parameters[:1] in (["self"], ["ctx"], ["cls"]))
        jit = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        yield Function(f"{file.relative_to(PACKAGE).as_posix()}: {node.name}", lines, count, jit)


# ---- a call


@dataclass
class Crossed:
    """Files of a loss and its gradients by hidden states and head."""

    python: dict[str, None] = field(default_factory=dict)
    """Files of the package with a function that runs, in the order of their first."""
    on_the_way: dict[str, None] = field(default_factory=dict)
    """Those that are on the stack when logits, rows or products of gradients are computed: the others return before."""
    compiled: list[str] = field(default_factory=list)
    """``SOURCES`` of the backend, and what they include of csrc."""

    @property
    def count(self) -> int:
        return len(self.python) + len(self.compiled)


def crossed(backend: str) -> Crossed:
    """Trace a loss of two heads, forward and backward, on the CPU."""
    hidden, weight = torch.randn(1, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    student, teacher = kd.LMHead(hidden, weight), kd.LMHead(torch.randn(1, 6), torch.randn(16, 6))
    loss_of = kd.distillation_loss
    prefix = f"{PACKAGE}{os.sep}"
    found = Crossed(compiled=includes(*SOURCES.get(backend, ())))

    def name(frame: FrameType) -> str | None:
        file = frame.f_code.co_filename
        return Path(file).relative_to(PACKAGE).as_posix() if file.startswith(prefix) else None

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or (file := name(frame)) is None:
            return
        found.python[file] = None
        if file == "fused/gemm.py" or (file.startswith("backends/") and frame.f_code.co_name == "rows"):
            caller: FrameType | None = frame
            while caller is not None:
                if (file := name(caller)) is not None:
                    found.on_the_way[file] = None
                caller = caller.f_back

    with cuda_kernels_on_the_cpu() if backend == "cuda" else _nothing():
        # What is imported and cached at a first call is not part of the way. Triton's interpreter is slow: its files are only imported.
        selection.select(backend, "cpu", (torch.float32,) * 2)
        loss_of(student, teacher, backend="torch" if backend == "triton" else backend).backward()
        sys.setprofile(profile)
        try:
            loss_of(student, teacher, backend=backend).backward()
        finally:
            sys.setprofile(None)
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def cuda_kernels_on_the_cpu() -> Iterator[None]:
    """Let ``backend="cuda"`` run its Python on tensors of a CPU, and the CPU's kernels in place of a launch."""

    def launch(kernel: Callable[..., None], arguments: object, where: torch.Tensor) -> None:
        _extension._C.cpu_rows(arguments, 1)

    def address(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device_type: str) -> int:
        return real(name, tensor, shape, dtype, "cpu")

    real = _extension.address_of
    selection._select.cache_clear()
    with (
        mock.patch.object(cuda, "unavailable", return_value=None),
        mock.patch.object(cuda, "_launch", launch),
        mock.patch.object(_extension, "address_of", address),
    ):
        yield
    selection._select.cache_clear()


# ---- C++


def includes(*sources: str) -> list[str]:
    """The sources and every file of csrc that they include, directly or not. The bindings declare all kernels: their includes do not
    count. Files for GPUs do not count for the CPU's sources."""
    found: dict[str, None] = {}
    gpu = any(source.startswith("cuda/") for source in sources)
    queue = list(sources)
    while queue:
        name = queue.pop(0)
        if name in found:
            continue
        found[name] = None
        if name == "bindings.cpp":
            continue
        for include in re.findall(r'^\s*#\s*include "([^"]+)"', (CSRC / name).read_text(encoding="utf-8"), re.MULTILINE):
            file = ((CSRC / name).parent / include).resolve()
            if file.exists() and (gpu or "cuda" not in file.relative_to(CSRC).parts):
                queue.append(file.relative_to(CSRC).as_posix())
    return list(found)


if __name__ == "__main__":
    everything = [function for file in package_files() for function in functions(file)]
    python, jit = ([f for f in everything if f.jit == compiled] for compiled in (False, True))
    for backend in selection.NAMES:
        if backend == "cuda" or (backend != "reference" and selection.unavailable(backend, "cpu", (torch.float32,) * 2) is None):
            files = crossed(backend)
            print(f"{backend}: {files.count} files, {len(files.python)} of them Python, of which {len(files.on_the_way)} on the way")
            print(f"    on the way: {', '.join(files.on_the_way)}")
            print(f"    besides: {', '.join(file for file in files.python if file not in files.on_the_way)}")
            print(f"    csrc: {', '.join(files.compiled)}")
    print("longest function:", max(python, key=lambda f: f.lines), "of Triton:", max(jit, key=lambda f: f.lines))
    print("most parameters of a private function:", max((f for f in python if f.private), key=lambda f: f.parameters))
    print("of a function of Triton:", max(jit, key=lambda f: f.parameters))
    print("longest file:", max((lines_of(file), file.name) for file in package_files()))
    print("modules at the top:", sorted(file.name for file in PACKAGE.glob("*.py")), "folders:", len([*PACKAGE.glob("*/__init__.py")]))
    print("lines of call, ops and checks:", sum(lines_of(PACKAGE / "fused" / f"{name}.py") for name in ("call", "ops", "checks")))
