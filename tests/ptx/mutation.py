"""Removes the barriers of compiled kernels one at a time: a case must notice each that orders anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import kdkernels as kd
from kdkernels.backends import triton as triton_backend

from .cases import Case, Draws, Head, Rows, Softmax, WrongResultError
from .driver import executing
from .machine import MachineError
from .memory import MemoryFault

_NAME = re.compile(r"\.entry\s+(\w+)")
_LINE = re.compile(r"\.loc[^/\n]*//\s*(.*)")
_BARRIER = re.compile(r"^\s*bar\.sync\s+0;", re.MULTILINE)

CASES: tuple[tuple[Case, str], ...] = (
    # The gradient is narrower than the logits that it lies over. Only in a row's first block does it meet columns of the same block.
    (Rows(kd.ForwardKL(), 8208), "kd_rows_kernel"),
    (Rows(kd.LogitMSE(centered=True), 777, dense=True, labels=True), "kd_rows_kernel"),
    (Head(8208, ids=5), "head_rows_kernel"),
    (Head(1040, entropy=True, ids=70), "head_rows_kernel"),  # one block: no other barrier comes before the columns at ids
    (Draws(4643, draws=1), "sample_rows_kernel"),
    (Softmax(8208, in_place=True), "softmax"),
    (Softmax(33000, dtype="bfloat16", in_place=True, logarithm=True), "softmax"),
)
"""With what the names of the kernels whose barriers are removed begin with."""


@dataclass(frozen=True)
class Barrier:
    """A ``bar.sync`` of a kernel, the source lines it comes from, and what a case without it reports ("" for nothing)."""

    kernel: str
    index: int
    source: str
    noticed: str = ""

    @property
    def written(self) -> bool:
        """Return whether the barrier is in the package's source. Triton adds others to exchange values between warps."""
        file, line, *_ = self.source.split(":")
        path = Path(triton_backend.__file__).with_name(file)
        return path.is_file() and "debug_barrier" in path.read_text().splitlines()[int(line) - 1]


def barriers(ptx: str) -> list[Barrier]:
    """Every barrier of a kernel, in the order of its text."""
    name = _NAME.search(ptx)
    assert name is not None
    found = []
    for index, place in enumerate(_BARRIER.finditer(ptx)):
        lines = _LINE.findall(ptx, 0, place.start())
        found.append(Barrier(name.group(1), index, lines[-1].strip() if lines else ""))
    return found


def without(ptx: str, barrier: Barrier) -> str:
    """The PTX without a barrier, if it is that of the barrier's kernel."""
    name = _NAME.search(ptx)
    assert name is not None
    if name.group(1) != barrier.kernel:
        return ptx
    place = list(_BARRIER.finditer(ptx))[barrier.index]
    return ptx[: place.start()] + ptx[place.end() :]


def mutants(case: Case, kernels: str, arch: int, everything: bool = True) -> Iterator[Barrier]:
    """Run a case without each barrier of such kernels in turn; without ``everything`` only those that the package's source asks for."""
    found: dict[str, list[Barrier]] = {}

    def look(ptx: str) -> str:
        of_kernel = barriers(ptx)
        if of_kernel and of_kernel[0].kernel.startswith(kernels):
            found[of_kernel[0].kernel] = of_kernel
        return ptx

    with executing(arch, rewrite=look):
        case.run()
    for barrier in (barrier for of_kernel in found.values() for barrier in of_kernel if everything or barrier.written):
        noticed = ""
        with executing(arch, rewrite=partial(without, barrier=barrier)):
            try:
                case.run()
            except (MemoryFault, MachineError, WrongResultError) as fault:
                noticed = f"{type(fault).__name__}: {fault}"
        yield Barrier(barrier.kernel, barrier.index, barrier.source, noticed)
