"""Figures of the source tree: files that a call crosses, sizes of functions, includes. To print them: python tests/support/layout.py

Two counts of the files between ``distillation_loss`` and the gradient of the head, forward and backward:

- The way: files with a function on the call stack while a matrix product runs or while a divergence's terms are computed. These are the
  files that a reader opens one after the other to get from the loss to the arithmetic. Functions that have returned by then, such as
  checks and the chunk plan, are not on the way.
- All files: files with a function that runs at all, and every file of csrc that the compiled sources include. The way is part of it.

Python and Triton's kernels (in its interpreter) are traced. C++ is not: its way is ``CALLS``, which tests/test_layout.py checks against the
sources.
"""

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


@dataclass(frozen=True)
class Calls:
    """A function and the functions of other files that its body calls, passes on, or registers."""

    file: str
    function: str
    callees: tuple[tuple[str, str], ...]
    """File and function."""


CALLS = {
    "native": (
        Calls("kdkernels/backends/cpu.py", "rows", (("csrc/bindings.cpp", "cpu_rows"),)),
        Calls("csrc/bindings.cpp", "PYBIND11_MODULE", (("csrc/cpu/dispatch.cpp", "cpu_rows"),)),
        Calls("csrc/cpu/dispatch.cpp", "for_rows", (("csrc/cpu/threads.h", "hand_out"),)),
        Calls("csrc/cpu/dispatch.cpp", "cpu_rows", (("csrc/cpu/rows.cpp", "rows"),)),
        Calls("csrc/cpu/rows.cpp", "rows", (("csrc/divergence.h", "with_divergence"),)),
        Calls("csrc/cpu/rows.cpp", "terms", (("csrc/divergence.h", "terms"),)),
    ),
    "cuda": (
        Calls("kdkernels/backends/cuda.py", "rows", (("csrc/bindings.cpp", "cuda_rows"),)),
        Calls("csrc/bindings.cpp", "PYBIND11_MODULE", (("csrc/cuda/two_sides.cu", "cuda_rows"),)),
        Calls("csrc/cuda/two_sides.cu", "cuda_rows", (("csrc/cuda/two_sides_f32.cu", "launch_f32"),)),
        Calls("csrc/cuda/two_sides_f32.cu", "launch_f32", (("csrc/cuda/launchers.h", "launch_rows"),)),
        Calls("csrc/cuda/launchers.h", "launch_rows", (("csrc/divergence.h", "with_divergence"),)),
        Calls(
            "csrc/cuda/launchers.h",
            "launch_rows_of",
            (("csrc/cuda/one_read.h", "one_read_rows"), ("csrc/cuda/two_read.h", "two_read_rows")),
        ),
        Calls("csrc/cuda/one_read.h", "one_read_rows", (("csrc/cuda/row.h", "column_terms"),)),
        Calls("csrc/cuda/two_read.h", "two_read_rows", (("csrc/cuda/row.h", "column_terms"),)),
        Calls("csrc/cuda/row.h", "column_terms", (("csrc/divergence.h", "terms"),)),
    ),
}
"""From a compiled backend's Python to a divergence's terms, in the order of the calls."""


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
    """Files of a loss and its gradients by hidden states and head: Python relative to kdkernels, C++ relative to csrc."""

    python: dict[str, None] = field(default_factory=dict)
    """Python files with a function that runs, in the order of their first."""
    python_way: dict[str, None] = field(default_factory=dict)
    """Python files on the way: see the module."""
    compiled: list[str] = field(default_factory=list)
    """``SOURCES`` of the backend, and what they include of csrc."""
    compiled_way: list[str] = field(default_factory=list)
    """C++ files on the way."""

    @property
    def way(self) -> list[str]:
        """All files on the way."""
        return [*self.python_way, *self.compiled_way]

    @property
    def all(self) -> list[str]:
        """All files."""
        return [*self.python, *self.compiled]


def crossed(backend: str) -> Crossed:
    """Trace a loss of two heads, forward and backward, on the CPU."""
    hidden, weight = torch.randn(1, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    student, teacher = kd.LMHead(hidden, weight), kd.LMHead(torch.randn(1, 6), torch.randn(16, 6))
    loss_of = kd.distillation_loss
    prefix = f"{PACKAGE}{os.sep}"
    files = Crossed(compiled=includes(*SOURCES.get(backend, ())), compiled_way=compiled_way(backend))

    def name(frame: FrameType) -> str | None:
        file = frame.f_code.co_filename
        return Path(file).relative_to(PACKAGE).as_posix() if file.startswith(prefix) else None

    def profile(frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or (file := name(frame)) is None:
            return
        files.python[file] = None
        if _is_arithmetic(file, frame.f_code.co_name):
            stack, caller = [], frame.f_back
            while caller is not None:
                stack.append(name(caller))
                caller = caller.f_back
            files.python_way |= {caller: None for caller in (*reversed(stack), file) if caller is not None}

    with cuda_kernels_on_the_cpu() if backend == "cuda" else _nothing():
        # What is imported and cached at a first call is not part of the way. Triton's interpreter is slow: its files are only imported.
        selection.select(backend, "cpu", (torch.float32,) * 2)
        loss_of(student, teacher, backend="torch" if backend == "triton" else backend).backward()
        sys.setprofile(profile)
        try:
            loss_of(student, teacher, backend=backend).backward()
        finally:
            sys.setprofile(None)
    return files


def _is_arithmetic(file: str, function: str) -> bool:
    """Return whether a function multiplies matrices, runs a backend's rows, or computes a divergence's terms."""
    if file.startswith("backends/"):
        return function == "rows" or file == "backends/triton/divergences.py"
    return file == "fused/gemm.py" or (file, function) == ("divergences.py", "terms")


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


def compiled_way(backend: str) -> list[str]:
    """Return the C++ files on the way of a compiled backend, in the order of the calls."""
    files = [file for calls in CALLS.get(backend, ()) for file in (calls.file, *(callee for callee, _ in calls.callees))]
    return list(dict.fromkeys(file.removeprefix("csrc/") for file in files if file.startswith("csrc/")))


def body(file: str, function: str) -> str | None:
    """Return the body of a Python or C++ function without comments, from its first definition in the file; None without one."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if file.endswith(".py"):
        nodes = [node for node in tree(ROOT / file).body if isinstance(node, ast.FunctionDef) and node.name == function]
        return "\n".join(map(ast.unparse, nodes[0].body)) if nodes else None
    text = re.sub(r"//.*", "", text)
    for match in re.finditer(rf"(?<![.\w]){function}(?=\()", text):
        head = _enclosed(text, match.end(), "()")
        definition = re.match(r"\s*(?:const\s*)?(?={)", text[head:])
        if definition is not None:
            start = head + definition.end()
            return text[start : _enclosed(text, start, "{}")]
    return None


def _enclosed(text: str, start: int, brackets: str) -> int:
    """Return the end of the bracketed text that begins at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == brackets[0]) - (text[i] == brackets[1])
        if not depth:
            return i + 1
    raise ValueError(f"{text[start : start + 40]!r} is not closed")


def calls(text: str, function: str) -> bool:
    """Return whether a body calls a function or passes it on."""
    return re.search(rf"(?<![.\w]){function}\b|\b{function}\(|_C\.{function}\b", text) is not None


def includes(*sources: str) -> list[str]:
    """Return the sources and every file of csrc that they include, directly or not. The bindings declare all kernels: their includes do not
    count. Files for GPUs do not count for the CPU's sources."""
    files: dict[str, None] = {}
    gpu = any(source.startswith("cuda/") for source in sources)
    queue = list(sources)
    while queue:
        name = queue.pop(0)
        if name in files:
            continue
        files[name] = None
        if name == "bindings.cpp":
            continue
        for include in re.findall(r'^\s*#\s*include "([^"]+)"', (CSRC / name).read_text(encoding="utf-8"), re.MULTILINE):
            file = ((CSRC / name).parent / include).resolve()
            if file.exists() and (gpu or "cuda" not in file.relative_to(CSRC).parts):
                queue.append(file.relative_to(CSRC).as_posix())
    return list(files)


if __name__ == "__main__":
    everything = [function for file in package_files() for function in functions(file)]
    python, jit = ([f for f in everything if f.jit == compiled] for compiled in (False, True))
    for backend in selection.NAMES:
        if backend == "cuda" or (backend != "reference" and selection.unavailable(backend, "cpu", (torch.float32,) * 2) is None):
            files = crossed(backend)
            print(f"{backend}: {len(files.way)} files on the way, {len(files.all)} in all")
            print(f"    on the way: {', '.join(files.way)}")
            print(f"    others: {', '.join(file for file in files.all if file not in files.way)}")
    print("longest function:", max(python, key=lambda f: f.lines), "of Triton:", max(jit, key=lambda f: f.lines))
    print("most parameters of a private function:", max((f for f in python if f.private), key=lambda f: f.parameters))
    print("of a function of Triton:", max(jit, key=lambda f: f.parameters))
    print("longest file:", max((lines_of(file), file.name) for file in package_files()))
    print("modules at the top:", sorted(file.name for file in PACKAGE.glob("*.py")), "folders:", len([*PACKAGE.glob("*/__init__.py")]))
    print("lines of call, ops and checks:", sum(lines_of(PACKAGE / "fused" / f"{name}.py") for name in ("call", "ops", "checks")))
