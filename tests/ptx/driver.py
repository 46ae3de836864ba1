"""A stand-in for Triton's driver: compiles kernels for an absent GPU and runs their PTX on CPU tensors.

Inside ``executing()`` the package's own host code launches as usual. The process must not have TRITON_INTERPRET=1.
"""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver as triton_driver
from triton.runtime.jit import JITFunction

from .machine import Grid, Order, mixed_orders
from .memory import GUARD, Memory
from .program import Program, parse

_SCALARS = {"i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u32": "<I", "u64": "<Q", "fp32": "<f", "fp64": "<d"}


@dataclass
class Target:
    """The part of a driver that Triton's compiler uses."""

    arch: int

    def get_current_device(self) -> int:
        """The architecture: Triton keeps what it has compiled per device."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@dataclass
class Execution:
    """State of ``executing()``, with a record of the launches.

    ``rewrite`` changes a kernel's PTX before it runs; ``programs`` lists what has been launched.
    """

    order: Order = mixed_orders
    rewrite: Callable[[str], str] = lambda ptx: ptx
    programs: list[Program] = field(default_factory=list)

    def launch(self, kernel: Any, ctas: int, arguments: Sequence[Any]) -> None:
        """Run a compiled kernel; ``arguments`` are those that are not constants."""
        program = parse(self.rewrite(kernel.asm["ptx"]))
        self.programs.append(program)
        heap = Heap([value for value in arguments if isinstance(value, Tensor)])
        signature = [kind for kind in kernel.src.signature.values() if kind != "constexpr"]
        packed = [
            struct.pack("<Q", heap.address(value)) if isinstance(value, Tensor) else struct.pack(_SCALARS[kind], value)
            for kind, value in zip(signature, arguments, strict=True)
        ]
        packed += [bytes(8)] * (len(program.parameters) - len(packed))  # scratch memory that these kernels ask none of
        Grid(program, ctas, packed, heap.memory, kernel.metadata.shared, self.order).run()
        heap.write_back()


class Heap:
    """Global memory with the tensors of a launch in it, each storage at an address as aligned as its own.

    Only the elements of the tensors may be touched, not what their strides step over.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spans: dict[int, tuple[Tensor, int, int]] = {}  # by storage: its bytes, and the part of them that tensors reach
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start, stop = _reach(tensor)
            _, low, high = spans.get(storage.data_ptr(), (None, start, stop))
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            spans[storage.data_ptr()] = whole, min(low, start), max(high, stop)
        self._places: dict[int, int] = {}
        self._copies: list[tuple[Tensor, int, int]] = []
        top = GUARD
        for pointer, (whole, low, high) in spans.items():
            top += (low - top) % 256
            self._places[pointer] = top - low
            self._copies.append((whole[low - pointer : high - pointer], top, top + high - low))
            top += high - low + GUARD
        self.memory = Memory(top, "global")
        for data, start, stop in self._copies:
            self.memory.bytes[start:stop] = data.numpy()
        for tensor in tensors:
            if tensor.numel():
                strides = [step * tensor.element_size() for step in tensor.stride()]
                shape = (*tensor.shape, tensor.element_size())
                np.lib.stride_tricks.as_strided(self.memory.allowed[self.address(tensor) :], shape, (*strides, 1))[...] = True

    def address(self, tensor: Tensor) -> int:
        return tensor.data_ptr() + self._places[tensor.untyped_storage().data_ptr()]

    def write_back(self) -> None:
        for data, start, stop in self._copies:
            data.copy_(torch.from_numpy(self.memory.bytes[start:stop]))


def _reach(tensor: Tensor) -> tuple[int, int]:
    """First and last address, exclusive, of a tensor's elements."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else -1
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def _only_ptx() -> Iterator[None]:
    """Compile up to PTX: machine code would take as long again, and nothing runs it. Such kernels have a cache of their own."""
    assemble, folder = CUDABackend.make_cubin, knobs.cache.dir
    CUDABackend.make_cubin = lambda *arguments: b""
    knobs.cache.dir = f"{folder}-ptx"
    try:
        yield
    finally:
        CUDABackend.make_cubin, knobs.cache.dir = assemble, folder


@contextmanager
def executing(arch: int = 90, order: Order = mixed_orders, rewrite: Callable[[str], str] = lambda ptx: ptx) -> Iterator[Execution]:
    """Compile every kernel that is launched for ``arch`` and run its PTX on its (CPU) arguments."""
    execution = Execution(order, rewrite)
    compile_only, driver = JITFunction.run, triton_driver._active

    def run(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        kernel = compile_only(self, *args, grid=grid, warmup=True, **kwargs)
        signature = inspect.signature(self.fn)
        bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name in signature.parameters})
        arguments = [bound.arguments[name] for name, kind in kernel.src.signature.items() if kind != "constexpr"]
        execution.launch(kernel, grid[0], arguments)
        return kernel

    JITFunction.run = run
    triton_driver.set_active(Target(arch))
    try:
        with _only_ptx():
            yield execution
    finally:
        JITFunction.run = compile_only
        triton_driver.set_active(driver)
